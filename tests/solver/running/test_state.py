"""What steps write to, replace, let grow or make is as before an evaluation."""

import random
from contextlib import suppress

import numpy
import pytest
import torch
from small_modules import network
from torch import nn
from torch.testing import assert_close

from lrf_lightning import compress
from lrf_lightning.solver.running import state
from lrf_lightning.solver.running.evaluation import evaluate
from lrf_lightning.solver.running.state import restored_state

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
    with suppress(RuntimeError), restored_state(model):
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


class Stateful(nn.Module):
    """State in every place but buffers."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 4)
        self.teacher = nn.Linear(4, 4).requires_grad_(False)
        self.mean, self.steps, self.seen, self.hidden = torch.zeros(4), 0, [], None
        self.noise = [torch.Generator().manual_seed(1), random.Random(2), numpy.random.default_rng(3)]
        self.older = numpy.random.RandomState(4)

    def step(self):
        """What it draws, and everything changed."""
        drawn = [float(torch.rand((), generator=self.noise[0])), self.noise[1].random(), self.noise[2].random()]
        drawn.append(self.older.rand())
        self.steps += 1
        self.seen.append(torch.ones(2))
        self.hidden = torch.ones(3)
        self.mean.add_(1)
        with torch.no_grad():
            self.teacher.weight.mul_(0.5)
            self.teacher.bias.data.add_(1)
        return drawn


def test_everything_that_a_step_keeps_is_as_before():
    model = Stateful()
    values, mean = {name: value.clone() for name, value in model.state_dict().items()}, model.mean
    drawn = []
    for _ in range(2):
        with restored_state(model):
            drawn.append([model.step(), model.step()])
        assert_close(model.state_dict(), values, rtol=0, atol=0)
        assert (model.steps, model.seen, model.hidden, model.mean.tolist()) == (0, [], None, [0] * 4)
        assert model.mean is mean
    assert drawn[0] == drawn[1], "generators are rewound"
    assert drawn[0][0] != drawn[0][1]


def test_buffers_that_cannot_be_written_are_left_alone():
    model = nn.Sequential(nn.LazyBatchNorm1d(), nn.Linear(2, 2, device="meta"))
    model.register_buffer("expanded", torch.ones(1).expand(4))
    model.register_buffer("meta", torch.ones(3, device="meta"))
    with torch.inference_mode():
        model.register_buffer("inference", torch.ones(3))
    with restored_state(model):
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


class Centred(nn.Module):
    """Keeps a moving average of its outputs, by which the next ones are divided."""

    def __init__(self, kind):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 8))
        mean = torch.zeros(8)
        if kind == "buffer":
            self.register_buffer("mean", mean)
        else:
            self.mean = nn.Parameter(mean, requires_grad=False) if kind == "parameter" else mean

    def forward(self, x):
        y = self.net(x)
        self.mean.data.mul_(0.9).add_(y.detach().mean(0) + 0.1)
        return y / (1 + self.mean.square().sum())


def test_it_does_not_matter_where_state_is_kept():
    splits = [[torch.randn(12, 12) for _ in range(3)] for _ in range(3)]
    found = []
    for kind in ("buffer", "parameter", "attribute"):
        torch.manual_seed(0)
        options = {"objective": "budget", "keep": 0.5, "speed": "none"}
        result = compress(Centred(kind), lambda model, x: (model(x) - 1).square().mean(1), *splits, **options)
        assert result.model.mean.tolist() == [0] * 8
        found.append(result.certificate)
    assert found[0].verdict != "unchanged"
    assert found[1] == found[2] == found[0]


class Pinned(nn.Linear):
    """A class whose mode cannot be changed."""

    training = property(lambda self: False, lambda self, value: None)


def test_what_cannot_be_kept_is_left_alone():
    model = nn.Sequential(nn.Linear(2, 2), Pinned(2, 2))
    model.nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    model.source, model.freed = random.SystemRandom(), torch.ones(4)
    model.data = torch.zeros(state.LARGEST // 4 + 1)
    with restored_state(model):
        model.freed.untyped_storage().resize_(0)
        model.data += 1
    assert model.freed.tolist() == [1] * 4
    assert model.data[0] == 1, "what is large is data"


def test_a_graph_over_what_is_restored_stays_whole():
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False))
    model.register_buffer("scale", torch.ones(2))
    x = torch.ones(1, 2, requires_grad=True)
    loss = (model(x) * model.scale * x).sum()
    with restored_state(model):
        model(x)
    loss.backward()
    assert x.grad.isfinite().all()


class Table:
    """What is computed once and read again."""

    def __init__(self):
        self.ready, self.table = False, None

    def of(self, count):
        if not self.ready or len(self.table) < count:
            self.table, self.ready = torch.ones(count, 1), True
        return self.table[:count]


def test_an_object_is_restored_as_a_whole():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.cache = network(), Table()

        def forward(self, x):
            return self.net(x * self.cache.of(len(x)))

    sizes = ((8, 12), (12, 8), (8, 16))
    splits = [[torch.randn(size, 12) for size in each] for each in sizes]
    result = compress(
        Reader(), lambda model, x: (model(x) - 1).square().mean(1), *splits, objective="budget", keep=0.5, speed="none"
    )
    assert result.ranks
    assert not result.model.cache.ready
