"""Buffers that steps write to, replace, let grow or make are as before an evaluation."""

from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lrf_lightning import compress
from lrf_lightning.solver.running.buffers import restored_buffers
from lrf_lightning.solver.running.evaluation import evaluate

CPU = torch.device("cpu")


class Queued(nn.Module):
    """A loss against a queue of earlier outputs, which every step changes."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 8))
        self.register_buffer("queue", torch.randn(16, 8))
        self.register_buffer("ptr", torch.zeros(1, dtype=torch.long))
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.register_buffer("scale", None)
        self.length = 2

    def loss(self, x):
        y = self.net(x)
        losses = (y[:, None] - self.queue).square().mean((1, 2))
        at = (torch.arange(len(x)) + int(self.ptr)) % 16
        self.queue[at] = y.detach()
        self.ptr = (self.ptr + len(x)) % 16
        return losses


def queue_loss(model, batch):
    return model.loss(batch)


def written(model):
    model.queue.add_(1)
    model.ptr.fill_(3)


def written_past_autograd(model):
    model.queue.data.add_(1)


def replaced(model):
    model.queue = model.queue + 1


def grown(model):
    model.queue = torch.cat([model.queue, model.queue])
    model.length = 32


def resized(model):
    model.queue.data = torch.zeros(3, 3)


def made(model):
    model.register_buffer("new", torch.ones(3), persistent=False)
    model.scale = torch.ones(2)
    model.length = 5


def removed(model):
    del model.cache
    model.net[0].register_buffer("mask", torch.ones(2))


@pytest.mark.parametrize("change", [written, written_past_autograd, replaced, grown, resized, made, removed])
def test_buffers_are_as_before(change):
    model = Queued()
    objects = [(name, dict(module._buffers)) for name, module in model.named_modules()]
    values = {name: buffer.clone() for name, buffer in model.named_buffers()}
    attributes, persistent = set(model.__dict__), list(model.state_dict())
    with suppress(RuntimeError), restored_buffers(model):
        change(model)
        raise RuntimeError("a step may fail")
    for name, buffers in objects:
        now = model.get_submodule(name)._buffers
        assert list(now) == list(buffers)
        assert all(now[key] is buffer for key, buffer in buffers.items())
    assert_close(dict(model.named_buffers()), values, rtol=0, atol=0)
    assert model.length == 2
    assert set(model.__dict__) == attributes
    assert list(model.state_dict()) == persistent
    assert model._non_persistent_buffers_set == {"cache"}


def test_other_attributes_stay_while_buffers_keep_their_shapes():
    model = Queued()
    with restored_buffers(model):
        written(model)
        replaced(model)
        model.calls = 1
    assert model.calls == 1


def test_buffers_that_cannot_be_written_are_left_alone():
    model = nn.Sequential(nn.LazyBatchNorm1d(), nn.Linear(2, 2, device="meta"))
    model.register_buffer("expanded", torch.ones(1).expand(4))
    model.register_buffer("meta", torch.ones(3, device="meta"))
    with torch.inference_mode():
        model.register_buffer("inference", torch.ones(3))
    with restored_buffers(model):
        model[0](torch.randn(5, 3))
    assert model[0].running_mean.shape == (3,)
    assert model.expanded.tolist() == [1] * 4


def test_every_evaluation_starts_from_the_same_buffers():
    model, batches = Queued(), [torch.randn(6, 12) for _ in range(3)]
    queue = model.queue.clone()
    first, second = (evaluate(model, queue_loss, batches, CPU) for _ in range(2))
    assert_close(first.losses, second.losses, rtol=0, atol=0)
    assert_close(model.queue, queue, rtol=0, atol=0)


def test_the_compressed_model_has_the_buffers_of_the_original():
    model = Queued()
    splits = [[torch.randn(12, 12) for _ in range(3)] for _ in range(3)]
    result = compress(model, queue_loss, *splits, objective="budget", keep=0.5, speed="none")
    assert result.ranks
    assert_close(dict(result.model.named_buffers()), dict(model.named_buffers()), rtol=0, atol=0)
