"""What the pass over the calibration data sees of unusual models: checkpoints, short dtypes, function transforms."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.nn import functional
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from lrf_lightning.solver.factors.factorization import factorize
from lrf_lightning.solver.layers.statistics import RowSampler, collect_statistics
from lrf_lightning.solver.predictions.curves import component_derivatives
from lrf_lightning.surgery import find_layers

CPU = torch.device("cpu")


class Checkpointed(nn.Module):
    """Two blocks behind a first layer, whose activations are computed again in the backward pass if asked for."""

    def __init__(self, use_reentrant=None):
        super().__init__()
        self.first = nn.Linear(8, 10)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 10)) for _ in range(2))
        self.head = nn.Linear(10, 4)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        x = torch.tanh(self.first(x))
        for block in self.blocks:
            again = self.use_reentrant is not None
            x = x + (checkpoint(block, x, use_reentrant=self.use_reentrant) if again else block(x))
        return self.head(x)


class WhollyCheckpointed(Checkpointed):
    """No input of the checkpoint asks for a gradient."""

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class NormedCheckpoint(nn.Module):
    """Only a norm, which is not observed, could give the checkpoint an input with a gradient."""

    def __init__(self):
        super().__init__()
        self.norm, self.block, self.head = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(checkpoint(self.block, self.norm(x), use_reentrant=True))


def loss(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def observed(model, batches):
    """Statistics and derivatives of every layer."""
    candidates, _ = find_layers(model)
    layers = collect_statistics(model, candidates, loss, batches, CPU, sampler=RowSampler(10**6, 1, 0))
    factors = {
        name: factorize(layer.candidate.matrices(), layer.inputs.mean, layer.gradients.mean, damping=0.0, max_rank=3)
        for name, layer in layers.items()
    }
    return layers, component_derivatives(model, layers, factors, loss, batches, CPU)


@pytest.mark.parametrize("make", [lambda: Checkpointed(False), lambda: Checkpointed(True), WhollyCheckpointed])
def test_layers_that_run_again_in_the_backward_pass_are_seen_once(make):
    plain, again = Checkpointed().double(), make().double()
    again.load_state_dict(plain.state_dict())
    batches = [(torch.randn(size, 8, dtype=torch.float64), torch.randint(4, (size,))) for size in (6, 3)]
    (wanted, derivatives), (found, others) = observed(plain, batches), observed(again, batches)
    assert list(found) == list(wanted)
    for name, layer in found.items():
        assert not layer.problem
        assert not layer.repeated
        assert layer.rows_per_sample == wanted[name].rows_per_sample == 1
        assert layer.inputs.rows == layer.gradients.rows == 9
        assert_close(layer.inputs.mean, wanted[name].inputs.mean)
        assert_close(layer.gradients.mean, wanted[name].gradients.mean)
        assert_close(others[name].loss, derivatives[name].loss)


@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e3])
def test_gradients_in_float16_neither_vanish_nor_overflow(scale):
    """The smallest number in float16 is 6e-8 and the largest one 65504, so that the backward pass needs a scale."""

    def loss(model, batch):
        with torch.autocast("cpu", torch.float16, enabled=half):
            output = model(batch[0])
        return scale * functional.cross_entropy(output.float(), batch[1], reduction="none")

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 5)).eval()
    batches = [(torch.randn(30, 12), torch.randint(5, (30,))) for _ in range(2)]
    candidates, _ = find_layers(model)
    found = {}
    for half in (False, True):
        layers = collect_statistics(
            model, candidates, loss, batches, torch.device("cpu"), sampler=RowSampler(1000, 60, 0)
        )
        assert not any(layer.problem for layer in layers.values())
        found[half] = {name: layer.gradients.mean for name, layer in layers.items()}
    for name, expected in found[False].items():
        difference = torch.linalg.norm(found[True][name] - expected) / torch.linalg.norm(expected)
        assert difference < 0.02, name


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_why_a_reentrant_checkpoint_hides_its_layers_is_said():
    model, batches = NormedCheckpoint(), [(torch.randn(6, 8), torch.randint(4, (6,)))]
    layers = collect_statistics(model, find_layers(model)[0], loss, batches, CPU, sampler=RowSampler(10**6, 1, 0))
    assert not layers["head"].problem
    assert "use_reentrant=False helps" in layers["block"].problem


def scalar(model):
    return lambda x: model(x[None]).sum()


@pytest.mark.parametrize(
    ("usable", "values"),
    [
        (True, lambda model, x: grad(lambda x: model(x).square().sum())(x)),
        (False, lambda model, x: vmap(scalar(model))(x)[:, None]),
        (False, lambda model, x: vmap(grad(scalar(model)))(x)),
        (False, lambda model, x: vmap(hessian(scalar(model)))(x).flatten(1)),
        (False, lambda model, x: jvp(model, (x,), (torch.ones_like(x),))[1]),
        (False, lambda model, x: grad(lambda x: grad(lambda x: model(x).square().sum())(x).square().sum())(x)),
        (False, lambda model, x: vmap(scalar(model))(x)[:, None] + model(x)),
    ],
    ids=["grad", "vmap", "vmap of grad", "hessian", "jvp", "grad of grad", "beside a plain call"],
)
def test_layers_in_function_transforms_are_left_alone_where_they_cannot_be_observed(usable, values):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6))
    batches = [torch.randn(5, 4) for _ in range(2)]
    layers = collect_statistics(
        model,
        find_layers(model)[0],
        lambda model, x: values(model, x).square().mean(1),
        batches,
        CPU,
        sampler=RowSampler(10**6, 1, 0),
    )
    for layer in layers.values():
        assert (layer.problem == "") == usable
        assert usable or "function transform of torch.func" in layer.problem


def test_gradients_by_parameters_are_observed():
    model, batches = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6)), [torch.randn(5, 4)]

    def penalty(model, x):
        def mean(parameters):
            return functional_call(model, parameters, (x,)).square().mean()

        return sum(value.square().sum() for value in grad(mean)(dict(model.named_parameters())).values())

    layers = collect_statistics(model, find_layers(model)[0], penalty, batches, CPU, sampler=RowSampler(10**6, 1, 0))
    assert not any(layer.problem for layer in layers.values())
