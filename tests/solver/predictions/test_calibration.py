"""The stages that learn about the layers, as far as whole solves do not show them."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from lrf_lightning import compress


class Backwards(nn.Module):
    """Runs its layers in the opposite order of their registration."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 4)
        self.third, self.second, self.first = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        for layer in (self.first, self.second, self.third):
            x = torch.tanh(layer(x))
        return self.head(x)


def loss(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.fixture
def splits():
    # a single batch each: the memory limit also bounds the batches of the compensation
    return [[(torch.randn(60, 16), torch.randint(4, (60,)))] for _ in range(3)]


@pytest.mark.parametrize("prediction", ["loss", "energy"])
def test_layers_in_groups_end_as_layers_at_once(splits, prediction):
    model = Backwards()
    options = {"objective": "budget", "keep": 0.5, "probes": False, "prediction": prediction}
    at_once = compress(model, loss, *splits, **options)
    in_groups = compress(model, loss, *splits, **options, memory_gib=1e-9)
    for result in (at_once, in_groups):
        assert [layer.name for layer in result.layers] == ["first", "second", "third", "head"]
        assert result.samples["calibration"] == 60
    assert in_groups.ranks == at_once.ranks
    assert len(at_once.ranks) > 1
    for name in at_once.ranks:
        products = (result.model.get_submodule(name).weight for result in (in_groups, at_once))
        torch.testing.assert_close(*products, rtol=1e-4, atol=1e-5)


def test_probes_have_a_known_error_where_a_batch_has_a_single_loss():
    """As many samples as would do are then one batch, whose difference says nothing of its noise."""

    def mean_loss(model, batch):
        return loss(model, batch).mean()

    data = [(torch.randn(300, 16), torch.randint(4, (300,))) for _ in range(6)]
    found = {}
    for function in (loss, mean_loss):
        result = compress(Backwards(), function, data, data, data, objective="budget", keep=0.7)
        probes = [probe for layer in result.layers for probe in layer.curve.probes]
        found[function] = [error for *_, error in probes]
        assert all(0 < error < float("inf") for error in found[function])
    single = [(torch.randn(300, 16), torch.randint(4, (300,)))]
    result = compress(Backwards(), mean_loss, single, single, single, objective="budget", keep=0.7)
    assert {error for layer in result.layers for *_, error in layer.curve.probes} == {float("inf")}
    assert all(all(layer.curve.allowed) for layer in result.layers), "one batch cannot tell"


def test_many_layers_are_probed_in_groups(splits):
    model = nn.Sequential(*(layer for _ in range(10) for layer in (nn.Linear(16, 16), nn.Tanh())), nn.Linear(16, 4))
    result = compress(model, loss, *splits, objective="budget", keep=0.7)
    curves = {layer.name: layer.curve for layer in result.layers}
    groups = {tuple(sorted([name, *curve.probed_with])) for name, curve in curves.items()}
    assert len(groups) == 8
    assert sorted(name for group in groups for name in group) == sorted(curves)
    for name, curve in curves.items():
        for other in curve.probed_with:
            assert [probe[1:] for probe in curves[other].probes] == [probe[1:] for probe in curve.probes], name
