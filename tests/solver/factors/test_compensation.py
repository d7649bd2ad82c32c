"""Compensation against direct least squares, and against fitting layer after layer by literal passes."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional

from lrf_lightning import compress
from lrf_lightning.solver.factors import compensation
from lrf_lightning.solver.factors.compensation import compensated_target, fit_layers
from lrf_lightning.solver.factors.conv_orders import layer_factors
from lrf_lightning.solver.factors.factorization import factorize
from lrf_lightning.solver.layers.statistics import RowSampler, collect_statistics
from lrf_lightning.surgery import find_layers

CPU = torch.device("cpu")


def loss(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


class AllRows(RowSampler):
    def positions(self, candidate, available, batch_index, device):
        return None


def net():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 9, 24),
        nn.ReLU(),
        nn.Linear(24, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    )


@pytest.fixture
def problem():
    model = net()
    batches = [(torch.randn(20, 3, 6, 6), torch.randint(4, (20,))) for _ in range(4)]
    candidates, _ = find_layers(model)
    sampler = AllRows(1, 80, 0)
    layers = collect_statistics(model, candidates, loss, batches, CPU, sampler=sampler)
    return model, batches, layers, sampler


def built(problem, ranks, **options):
    model, batches, layers, sampler = problem
    options = {"metric": "fisher", "damping": 1e-2, "compensation": True, "loss": loss} | options
    compressed = copy.deepcopy(model)
    chosen = {name: layer for name, layer in layers.items() if name in ranks}
    fit_layers(model, [(compressed, ranks)], chosen, batches=batches, device=CPU, sampler=sampler, **options)
    return compressed


def test_the_target_is_the_damped_least_squares_weight():
    weight = torch.randn(1, 5, 7, dtype=torch.float64)
    x, y = torch.randn(2, 40, 7, dtype=torch.float64)
    damping = 0.1
    moment = (y.T @ y / 40)[None]
    target = compensated_target(weight, (x.T @ y / 40)[None], moment, damping)
    # the same problem with the prior as extra rows: sqrt(e) (W - T) for every input direction
    ridge = (damping * moment[0].diagonal().mean() * 40).sqrt()
    rows = torch.cat([y, ridge * torch.eye(7, dtype=torch.float64)])
    wanted = torch.cat([x @ weight[0].T, ridge * weight[0].T])
    torch.testing.assert_close(target[0], torch.linalg.lstsq(rows, wanted).solution.T)


def test_without_evidence_the_weight_is_kept():
    weight = torch.randn(2, 3, 4, dtype=torch.float64)
    zero = torch.zeros(2, 4, 4, dtype=torch.float64)
    for damping in (0.0, 0.1):
        torch.testing.assert_close(compensated_target(weight, zero, zero, damping), weight)


def test_without_damping_null_directions_keep_the_weight():
    weight = torch.randn(1, 5, 6, dtype=torch.float64)
    y = torch.randn(30, 3, dtype=torch.float64) @ torch.randn(3, 6, dtype=torch.float64)
    moment = (y.T @ y / 30)[None]
    target = compensated_target(weight, moment, moment, 0.0)
    torch.testing.assert_close(target, weight)


def test_unchanged_inputs_give_the_plain_truncation(problem):
    model, _, layers, _ = problem
    name = next(iter(layers))
    compressed = built(problem, {name: 3})
    expected = factorize(
        layers[name].candidate.matrices(), layers[name].inputs.mean, layers[name].gradients.mean, damping=1e-2
    )
    left, right = expected.truncated(3)
    torch.testing.assert_close(
        compressed.get_submodule(name).weight.flatten(1), (left @ right)[0].float(), rtol=1e-4, atol=1e-5
    )
    assert model.get_submodule(name) is layers[name].candidate.module


@pytest.mark.parametrize("metric", ["euclidean", "activation", "fisher"])
def test_lockstep_equals_a_pass_for_every_layer(problem, metric):
    """Literally: replace one layer, run both models again, solve the next one from all of its rows."""
    model, batches, layers, _ = problem
    ranks = {name: max(1, layer.candidate.max_rank // 2) for name, layer in layers.items()}
    compressed = built(problem, ranks, metric=metric)
    literal = copy.deepcopy(model)
    for position, (name, rank) in enumerate(ranks.items()):
        layer = layers[name]
        inputs, cross = [], []
        for batch in batches:
            seen = {}
            for key, net in (("x", model), ("y", literal)):
                module = net.get_submodule(name)
                hook = module.register_forward_pre_hook(lambda _, args, key=key, seen=seen: seen.update({key: args[0]}))
                with torch.no_grad():
                    net(batch[0])
                hook.remove()
            x, y = (layer.reader.inputs(seen[key], None, 20).double() for key in ("x", "y"))
            inputs.append(y.transpose(1, 2) @ y)
            cross.append(x.transpose(1, 2) @ y)
        rows = 4 * x.shape[1]
        moment, other = sum(inputs) / rows, sum(cross) / rows
        target = layer.candidate.matrices().double()
        if position:
            target = compensated_target(target, other, moment, 1e-2)
        gradients = layer.gradients.mean if metric == "fisher" else None
        factors = factorize(target, None if metric == "euclidean" else moment, gradients, damping=1e-2)
        left, right = factors.truncated(rank)
        with torch.no_grad():
            module = literal.get_submodule(name)
            module.weight.copy_((left @ right).reshape(module.weight.shape))
    for name in ranks:
        torch.testing.assert_close(
            compressed.get_submodule(name).weight, literal.get_submodule(name).weight, rtol=1e-3, atol=1e-4
        )


def test_compensation_brings_the_outputs_nearer(problem):
    model, batches, layers, _ = problem
    ranks = {name: max(1, layer.candidate.max_rank // 2) for name, layer in layers.items()}
    images = torch.cat([batch[0] for batch in batches])
    ranks.popitem()  # so that the error of the outputs is the one that is minimised
    with torch.no_grad():
        errors = [
            float((built(problem, ranks, compensation=flag, metric="activation")(images) - model(images)).norm())
            for flag in (False, True)
        ]
    assert errors[1] < 0.9 * errors[0]


def test_a_step_may_change_its_batch(problem):
    model, batches, layers, sampler = problem

    def changing(model, batch):
        x = batch.pop(0).add_(0.5)
        return functional.cross_entropy(model(x), batch.pop(), reduction="none")

    def plain(model, batch):
        return loss(model, (batch[0] + 0.5, batch[1]))

    batches = [list(batch) for batch in batches]
    wanted, found = (
        built((model, batches, layers, sampler), dict.fromkeys(layers, 2), loss=function)
        for function in (plain, changing)
    )
    for name in layers:
        torch.testing.assert_close(found.get_submodule(name).weight, wanted.get_submodule(name).weight, rtol=0, atol=0)


def test_models_and_layers_are_as_before(problem):
    model, _, layers, _ = problem
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    compressed = built(problem, dict.fromkeys(layers, 1))
    assert model.training
    assert compressed.training
    assert all("forward" not in module.__dict__ for net in (model, compressed) for module in net.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


def test_an_error_in_the_loss_leaves_no_gate_behind(problem):
    model, batches, layers, _ = problem
    calls = []

    def fragile(model, batch):
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("no more")
        return loss(model, batch)

    with pytest.raises(RuntimeError, match="no more"):
        built(problem, dict.fromkeys(layers, 1), loss=fragile)
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert torch.isfinite(loss(model, batches[0])).all()


class Forked(nn.Module):
    """Takes its layers in another order for every second batch, and one layer twice."""

    def __init__(self):
        super().__init__()
        self.first, self.a, self.b, self.twice = (nn.Linear(12, 12) for _ in range(4))
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        order = (self.a, self.b) if x.shape[0] == 20 else (self.b, self.a)
        for layer in order:
            x = torch.tanh(layer(x))
        return self.head(torch.tanh(self.twice(torch.tanh(self.twice(x)))))


def test_layers_may_run_in_any_order_or_repeatedly():
    model = Forked()
    batches = [(torch.randn(size, 12), torch.randint(4, (size,))) for size in (20, 21, 20, 21)]
    candidates, _ = find_layers(model)
    sampler = AllRows(1, 82, 0)
    layers = collect_statistics(model, candidates, loss, batches, CPU, sampler=sampler)
    assert {name for name, layer in layers.items() if layer.repeated} == {"twice"}
    compressed = built((model, batches, layers, sampler), dict.fromkeys(layers, 2))
    assert all(type(compressed.get_submodule(name)).__name__ == "LowRankLinear" for name in layers)
    assert torch.isfinite(loss(compressed, batches[1])).all()


class Routed(nn.Module):
    """An expert for the rows in which the layer before it gives a positive first entry, and one for the others."""

    def __init__(self):
        super().__init__()
        self.first, self.positive, self.negative = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        hidden = self.first(x).flatten(0, 1)
        mixed = torch.zeros_like(hidden)
        for expert, chosen in ((self.positive, hidden[:, 0] > 0), (self.negative, hidden[:, 0] <= 0)):
            mixed[chosen] = expert(hidden[chosen])
        return self.head(mixed.reshape(len(x), -1, 8).mean(1))


def test_experts_that_get_other_rows_than_before_are_not_fitted_to_them():
    """Rows of both models do not match any more where the layer before an expert has sent others there."""
    model, ranks = Routed(), {"positive": 3, "negative": 3}
    batches = [(torch.randn(20, 5, 12), torch.randint(4, (20,))) for _ in range(4)]
    sampler = AllRows(1, 80, 0)
    layers = collect_statistics(model, find_layers(model)[0], loss, batches, CPU, sampler=sampler)
    coarse = built((model, batches, layers, sampler), {"first": 1}, compensation=False)

    def positive(each, x):
        return int((each.first(x)[..., 0] > 0).sum())

    def fitted(batches, **options):
        compressed = copy.deepcopy(coarse)
        options = {"metric": "fisher", "damping": 1e-2, "compensation": True, "loss": loss} | options
        chosen = {name: layers[name] for name in ranks}
        fit_layers(model, [(compressed, ranks)], chosen, batches=batches, device=CPU, sampler=sampler, **options)
        return [compressed.get_submodule(name).weight for name in ranks]

    assert all(positive(model, x) != positive(coarse, x) for x, _ in batches), "or the test tests nothing"

    def in_the_metric_of_what_they_get(batches):
        """The weights as they are, truncated in the metric of the rows that the experts of the coarse model get."""
        found = []
        for name, sign in (("positive", 1), ("negative", -1)):
            with torch.no_grad():
                rows = [coarse.first(x).flatten(0, 1) for x, _ in batches]
            rows = torch.cat([row[(row[:, 0] > 0) == (sign > 0)] for row in rows]).double()
            candidate, outputs = layers[name].candidate, layers[name].gradients.mean
            moment = (rows.T @ rows / len(rows))[None]
            left, right = factorize(candidate.matrices(), moment, outputs, damping=1e-2).truncated(3)
            found.append((left @ right)[0].float())
        return found

    def close(found, expected):
        return all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(found, expected, strict=True))

    assert close(fitted(batches), in_the_metric_of_what_they_get(batches))
    assert not close(fitted(batches, compensation=False), in_the_metric_of_what_they_get(batches))
    # as many rows as before in one of the batches, but others
    pool = torch.randn(2000, 5, 12)
    same = torch.stack([x for x in pool if positive(model, x) == positive(coarse, x)][:20])
    chance = (same, torch.randint(4, (20,)))
    assert not close(fitted([chance]), in_the_metric_of_what_they_get([chance])), "this one alone cannot be told"
    several = [*batches[1:], chance]
    assert close(fitted(several), in_the_metric_of_what_they_get(several))


def test_experts_keep_the_metric_of_their_inputs_when_calibration_has_freed_it():
    torch.manual_seed(0)
    model, data = Routed(), [(torch.randn(40, 5, 12), torch.randint(4, (40,))) for _ in range(3)]
    seen = {}

    def watched(candidate, target, inputs, *args, **options):
        seen[candidate.name] = inputs
        return layer_factors(candidate, target, inputs, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compensation, "layer_factors", watched)
        options = {"objective": "budget", "keep": 0.5, "speed": "none", "include": ["first", "positive", "negative"]}
        result = compress(model, loss, data, data, data, **options)
    sent = [[int((each.first(x)[..., 0] > 0).sum()) for x, _ in data] for each in (model, result.model)]
    assert all(before != after for before, after in zip(*sent, strict=True)), "or the test tests nothing"
    assert seen["positive"] is not None
    assert seen["negative"] is not None


def test_a_group_without_inputs_does_not_undamp_the_others():
    weight = torch.randn(2, 5, 6, dtype=torch.float64)
    x, y = (torch.randn(3, 6, dtype=torch.float64) for _ in range(2))  # fewer rows than inputs
    cross, inputs = (torch.stack([a.T @ b / 3, torch.zeros(6, 6)]) for a, b in ((x, y), (y, y)))
    together = compensated_target(weight, cross, inputs, 1e-2)
    torch.testing.assert_close(together[:1], compensated_target(weight[:1], cross[:1], inputs[:1], 1e-2))
    torch.testing.assert_close(together[1], weight[1])


class Local(nn.Module):
    """Adds the activations of its first layer further down."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 20), nn.Linear(20, 20), nn.Linear(20, 20)
        self.head = nn.Linear(20, 4)
        self.kept = []

    def forward(self, x):
        skip = torch.relu(self.a(x))
        return self.head(torch.relu(self.c(torch.relu(self.b(skip)) - skip)))


class OnSelf(Local):
    """Keeps them on itself meanwhile."""

    def forward(self, x):
        self.skip = torch.relu(self.a(x))
        return self.head(torch.relu(self.c(torch.relu(self.b(self.skip)) - self.skip)))


class InAList(Local):
    """Keeps them in a list that it clears."""

    def forward(self, x):
        self.kept.clear()
        self.kept.append(torch.relu(self.a(x)))
        return self.head(torch.relu(self.c(torch.relu(self.b(self.kept[0])) - self.kept[0])))


class InABuffer(Local):
    """Replaces a buffer by them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("skip", torch.zeros(1), persistent=False)

    def forward(self, x):
        self.skip = torch.relu(self.a(x))
        return self.head(torch.relu(self.c(torch.relu(self.b(self.skip)) - self.skip)))


@pytest.mark.parametrize("keeping", [OnSelf, InAList, InABuffer])
@pytest.mark.parametrize("sizes", [(20, 20, 20), (20, 13, 7)])
def test_activations_kept_on_modules_are_those_of_the_same_pass(keeping, sizes):
    local = Local()
    batches = [(torch.randn(size, 12), torch.randint(4, (size,))) for size in sizes]
    found = []
    for model in (local, keeping()):
        model.load_state_dict(local.state_dict())
        candidates, _ = find_layers(model)
        sampler = AllRows(1, sum(sizes), 0)
        layers = collect_statistics(model, candidates, loss, batches, CPU, sampler=sampler)
        attributes, kept = set(model.__dict__), list(model.kept)
        found.append(built((model, batches, layers, sampler), dict.fromkeys(layers, 2)))
        assert set(model.__dict__) == attributes
        assert list(map(id, model.kept)) == list(map(id, kept))
    torch.testing.assert_close(found[1].state_dict(), found[0].state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [threading.Lock, threading.RLock, threading.Semaphore])
def test_a_lock_around_the_forward_pass_stops_nobody(kind):
    class Locked(nn.Sequential):
        def __init__(self, *layers):
            super().__init__(*layers)
            self.lock = kind()

        def forward(self, x):
            with self.lock:
                return super().forward(x)

    torch.manual_seed(0)
    model = Locked(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))
    batches = [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(4)]

    def per_sample(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    result = compress(model, per_sample, batches, batches, batches, objective="budget", keep=0.6, speed="none")
    assert result.ranks
    assert type(result.model.lock) is type(model.lock)
    result.model(batches[0][0])
