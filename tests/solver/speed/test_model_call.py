import pytest
from small_modules import QUICK, clouds, network
from torch import nn

from lrf_lightning import compress


def cross_entropy(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y, reduction="none")


class Wrapped(nn.Module):
    """Its loss calls the part with the weights, or nothing that could be called again."""

    def __init__(self):
        super().__init__()
        self.net = network()


@pytest.mark.parametrize(
    ("model", "loss", "what"),
    [
        (Wrapped, lambda model, batch: cross_entropy(model.net, batch), "forward"),
        (network, lambda model, batch: cross_entropy(model, batch) + cross_entropy(model, batch), "step"),
    ],
    ids=["the part that holds the weights", "a model that the loss calls twice"],
)
def test_what_is_called(model, loss, what):
    splits = [[clouds(64, seed)] for seed in range(3)]
    speed = compress(model(), loss, *splits, **(QUICK | {"objective": "budget", "keep": 0.4, "cost": "params"})).speed
    assert speed.what == what
    assert {timing.batch for timing in speed.timings} == {1, 64}
