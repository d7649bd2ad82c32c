"""A real result for the tests of report, tables, pictures and logs, solved once per session."""

import dataclasses
import itertools
from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import nn

from lrf_lightning import compress
from lrf_lightning.api import CompressionResult
from lrf_lightning.solver.running.evaluation import StepOutput
from lrf_lightning.solver.speed_result import Speed, Timing


class TinyNet(nn.Module):
    """Digits, 8 x 8; ``stem`` is left alone for its size."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.hidden = nn.Linear(256, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, images):
        x = torch.relu(self.conv(torch.relu(self.stem(images))))
        return self.head(torch.relu(self.hidden(x.flatten(1))))


def step(model, batch):
    logits = model(batch[0])
    losses = nn.functional.cross_entropy(logits, batch[1], reduction="none")
    return StepOutput(losses, (logits.argmax(1) == batch[1]).float(), logits, batch[1])


@cache
def tiny_result() -> CompressionResult:
    """A model of digits compressed to a fifth of its parameters, with all records of a solve."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
        batches = [
            (images[i : i + 100], torch.tensor(digits.target[i : i + 100])) for i in range(0, len(images) - 97, 100)
        ]
        model = TinyNet()
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(8):
            for batch in batches[:10]:
                optimizer.zero_grad()
                step(model, batch).loss.mean().backward()
                optimizer.step()
        return compress(
            model,
            step,
            batches[10:12],
            batches[12:14],
            batches[14:],
            objective="budget",
            keep=0.3,
            exclude=("stem",),
        )


@cache
def frontier_result() -> CompressionResult:
    """The same with five points on the frontier, of which the second is chosen, with changes that are set by hand."""
    result = tiny_result()
    (point,) = result.frontier
    points = [
        dataclasses.replace(
            point,
            params_model=round(share * result.params_model[0]),
            params_layers=round(share * result.params_layers[0]),
            loss=result.dense.loss + change,
            loss_change=change,
            loss_change_error=abs(change) / 4,
            score=result.dense.score - change,
            score_change=-change,
            score_change_error=abs(change) / 3,
            within_range=share > 0.2,
            chosen=share == 0.5,
            pareto=True,
        )
        for share, change in ((0.8, -0.001), (0.5, 0.002), (0.3, 0.01), (0.2, 0.1), (0.1, 0.7))
    ]
    return dataclasses.replace(result, frontier=points)


@cache
def budgets_result() -> CompressionResult:
    """The frontier with a verdict for every point, a knee, and a point that is not on the front."""
    result = frontier_result()
    verdicts = ("better", "not worse", "inconclusive", "worse", "worse")
    points = [
        dataclasses.replace(
            point,
            budget=budget,
            pareto=budget != 0.4,
            knee=budget == 0.2,
            certificate=dataclasses.replace(result.certificate, verdict=verdict),
        )
        for point, budget, verdict in zip(result.frontier, (0.8, 0.6, 0.4, 0.2, 0.1), verdicts, strict=True)
    ]
    return dataclasses.replace(result, frontier=points, score_name="accuracy")


def timed(result):
    """The result whose five points have speeds that are set by hand."""

    def speed(large, single):
        ratios = ((100, large, 1.0, 2 * large - 0.5), (1, single, single / 2, 1.0))
        timings = [Timing("eager", batch, (ratio, 1.0), ratio, low, high, 9) for batch, ratio, low, high in ratios]
        return Speed("a machine", "forward", timings, (4000, 1000), (2e6, 1e6))

    speeds = itertools.starmap(speed, zip((1.25, 1.5, 1.75, 2.0, 2.25), (0.75, 0.5, 0.25, 0.5, 0.75), strict=True))
    points = [dataclasses.replace(point, speed=found) for point, found in zip(result.frontier, speeds, strict=True)]
    return dataclasses.replace(result, frontier=points)


def with_certificate(result, **changes):
    """The result with changed fields of its certificate."""
    return dataclasses.replace(result, certificate=dataclasses.replace(result.certificate, **changes))


def with_layers(result, count):
    """The result with ``count`` factorizable layers with long names, and one that is left alone."""
    usable = [layer for layer in result.layers if layer.curve is not None]
    layers = [
        dataclasses.replace(
            usable[i % len(usable)],
            name=f"backbone.encoder.layers.{i // 4}.block{i % 4}.attention.projection",
            params_before=usable[i % len(usable)].params_before + i,
        )
        for i in range(count)
    ]
    alone = [layer for layer in result.layers if layer.curve is None]
    ranks = {layer.name: layer.rank for layer in layers if layer.rank is not None}
    points = [dataclasses.replace(point, ranks=ranks) for point in result.frontier]
    return dataclasses.replace(result, layers=layers + alone, ranks=ranks, frontier=points)
