"""Solutions made by hand, for tests that do not care how the ranks were found."""

import math

import torch
from torch import nn

from lrf_lightning.api import CompressionResult
from lrf_lightning.solver.result import Certificate, FrontierPoint, Interval, LayerCurve, LayerResult, Measurement
from lrf_lightning.solver.settings import Settings
from lrf_lightning.surgery import set_structure


def compressed(model, ranks):
    """Give layers of a model random factors, in place; every factor is drawn, so nothing is left uninitialised."""
    set_structure(model, ranks)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    return model


def solution(model, ranks, shapes):
    """A solution with one frontier point, an infinite bound and NaN in a curve.

    Args:
        model: a compressed model.
        ranks: its ranks by name.
        shapes: kind and shape of the dense weight by name.
    """
    curve = LayerCurve(
        [1, 2], [0.1, 0.0], [math.nan, 0.1], [1.0, 0.5], [1.1, 0.5], [0.9, 0.1], [False, True], [3, 2, 1]
    )
    layers = [
        LayerResult(name, kind, shape, min(shape[:2]), ranks[name], math.prod(shape), 7, curve=curve)
        for name, (kind, shape) in shapes.items()
    ]
    params = sum(parameter.numel() for parameter in model.parameters())
    point = FrontierPoint(0.5, dict(ranks), params, 7, 7, 0.01, 0.001, 0.5, 0.01, 0.02, chosen=True)
    change = Interval(0.01, math.inf, -math.inf, math.inf, 1, "student")
    measured = Measurement(64, 0.5, 0.9)
    certificate = Certificate("inconclusive", measured, measured, change, None, 0.02, 0.005, 0.95, samples_needed=1000)
    return CompressionResult(
        model=model,
        ranks=dict(ranks),
        layers=layers,
        frontier=[point],
        dense=measured,
        certificate=certificate,
        settings=Settings(),
        params_model=(params + 50, params),
        params_layers=(100, 50),
        flops_layers=(100, 50),
        message="chosen by hand",
        seconds={"curves": 0.1},
        samples={"calibration": 64},
    )


class Net(nn.Module):
    """A convolution, two linear layers of which one is called twice, batch norm with buffers."""

    def __init__(self, features=12):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, groups=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Linear(features, features)
        self.head = nn.Linear(features, 5)
        self.stretch = nn.Linear(8, features)

    def forward(self, x):
        x = self.norm(self.conv(x)).mean((-2, -1))
        return self.head(self.body(torch.relu(self.body(self.stretch(x)))))


RANKS = {"conv": 3, "body": 4}
SHAPES = {"conv": ("Conv2d", (8, 3, 3, 3)), "body": ("Linear", (12, 12))}


def net_solution(seed=0):
    """A solution whose model is a compressed :class:`Net` in evaluation mode with its own weights for each seed."""
    torch.manual_seed(seed)
    net = compressed(Net(), RANKS).eval()
    net.norm.running_mean.normal_()
    return solution(net, RANKS, SHAPES)
