"""A small network in float64 and literal, rank-by-rank computations on it; shared by tests of curves and paper mode."""

import torch
from torch import nn
from torch.nn import functional

from lrf_lightning.solver.factors.factorization import factorize
from lrf_lightning.solver.layers.statistics import RowSampler, collect_statistics
from lrf_lightning.solver.predictions.curves import component_derivatives, predict
from lrf_lightning.surgery import find_layers

CPU = torch.device("cpu")


class Network(nn.Module):
    """Grouped, strided and dilated convolutions, a Linear over positions and a linear head."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=2, dilation=2, groups=2, padding_mode="circular")
        self.token = nn.Linear(12, 10, bias=False)
        self.head = nn.Linear(10, 8)

    def forward(self, x):
        x = torch.tanh(self.grouped(torch.tanh(self.conv(x))))
        x = torch.tanh(self.token(x.flatten(2).transpose(1, 2)))
        return self.head(x.mean(1))


LAYERS = ("conv", "grouped", "token", "head")


def problem(seed=0):
    """A network and batches of different size."""
    torch.manual_seed(seed)
    model = Network().double()
    batches = [(torch.randn(size, 3, 6, 6, dtype=torch.float64), torch.randint(8, (size,))) for size in (5, 5, 3)]
    return model, batches


def per_sample(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def mean_loss(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


def solved(model, batches, metric="fisher", loss=per_sample, seed=0):
    """Factors and derivatives of every layer by the library."""
    candidates, _ = find_layers(model)
    layers = collect_statistics(model, candidates, loss, batches, CPU, sampler=RowSampler(10**6, 1, 0))
    factors = {name: components(layer, metric) for name, layer in layers.items()}
    return factors, component_derivatives(model, layers, factors, loss, batches, CPU, seed=seed)


def components(layer, metric):
    candidate = layer.candidate
    return factorize(
        candidate.module.weight.detach().reshape(candidate.groups, candidate.rows, candidate.columns),
        None if metric == "euclidean" else layer.inputs.mean,
        layer.gradients.mean if metric == "fisher" else None,
        damping=1e-3,
        max_rank=candidate.max_rank,
    )


def predictions(model, batches, metric="fisher", loss=per_sample):
    factors, derivatives = solved(model, batches, metric, loss)
    return {name: predict(derivatives[name].tails(), factors[name].relative_tail()) for name in factors}


def as_matrices(weight, groups):
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def sample_gradients(model, batches, name):
    """Gradient of every sample's loss with respect to a layer's weight, one backward pass each."""
    weight = model.get_parameter(f"{name}.weight")
    gradients = []
    for inputs, target in batches:
        for i in range(len(target)):
            loss = per_sample(model, (inputs[i : i + 1], target[i : i + 1])).sum()
            gradients.append(torch.autograd.grad(loss, weight)[0])
    return torch.stack(gradients)
