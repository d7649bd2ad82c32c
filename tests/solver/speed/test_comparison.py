import itertools
import random

import pytest
import torch
from process_groups import run_together
from scipy import stats
from small_modules import QUICK, clouds, network
from torch import nn

from lrf_lightning import compress
from lrf_lightning.modules import LowRankModule
from lrf_lightning.solver.model_size import model_bytes
from lrf_lightning.solver.speed import comparison as speed
from lrf_lightning.solver.speed.comparison import median_interval
from lrf_lightning.solver.speed.model_call import ModelCall


def cross_entropy(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y, reduction="none")


def squeezed(model=None, loss=cross_entropy, **options):
    defaults = {"objective": "budget", "keep": 0.4, "cost": "params", **QUICK}
    splits = [[clouds(64, seed)] for seed in range(3)]
    return compress(model or network(), loss, *splits, **(defaults | options))


def slow_down(monkeypatch, factor):
    """Let a low-rank model take ``factor`` times as long as a dense one, in rounds that are up to ten times slower."""
    rounds, shuffle = itertools.count(), random.Random(0)
    slowness = [1 + 9 * shuffle.random() for _ in range(10_000)]

    def seconds(call, repeats=1):
        low_rank = any(isinstance(module, LowRankModule) for module in call.model.modules())
        call.run()
        return (factor if low_rank else 1.0) * 1e-4 * call.size * slowness[next(rounds) // 2]

    monkeypatch.setattr(ModelCall, "seconds", seconds)


@pytest.mark.parametrize("count", [1, 2, 5, 7, 15, 31])
def test_interval_of_the_median_is_that_of_the_sign_test(count):
    low, high = median_interval(count)
    assert low == count - 1 - high
    outside = 2 * stats.binom.cdf(low, count, 0.5)  # the median lies below the lower or above the upper value
    if count > 5:
        assert outside <= 0.05 < 2 * stats.binom.cdf(low + 1, count, 0.5)
    else:
        assert low == 0, "the outermost values, even if they hold it with less confidence"


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_both_models_are_timed_in_pairs(monkeypatch, factor):
    slow_down(monkeypatch, factor)
    found = squeezed().speed
    assert [(timing.runtime, timing.batch) for timing in found.timings] == [("eager", 64), ("eager", 1)]
    for timing in found.timings:
        assert timing.lower <= timing.speedup <= timing.upper
        assert timing.speedup == pytest.approx(1 / factor, rel=0.5)
        assert timing.is_faster == (factor < 1)
        assert timing.throughput[0] == pytest.approx(timing.batch / timing.seconds[0])
    assert bool(found.timed_layers) == (factor > 1), "layers are looked at where the model is not faster"
    assert found.problems == []


def test_sizes_operations_and_memory():
    torch.manual_seed(0)
    model = network(width=200)
    result = squeezed(model)
    found = result.speed
    assert found.bytes_on_disk == (4 * result.params_model[0], 4 * result.params_model[1])
    multiply_adds = 12 * 200 + 200 * 200 + 200 * 4
    assert found.flops[0] == 2 * multiply_adds
    assert found.flops[1] < found.flops[0]
    alive = 4 * 64 * (200 + 200)  # a layer's input and its output, in the middle of the network
    assert found.peak_memory[0] == 4 * result.params_model[0] + alive
    assert found.peak_memory[1] < found.peak_memory[0]


class Encoder(nn.Module):
    """torch's encoder layer, whose fused path of evaluation hides its operations."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 2, 48, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        return self.head(self.encoder(x[:, None])[:, 0])


def test_operations_of_a_dense_encoder_are_counted():
    found = squeezed(Encoder()).speed
    multiply_adds = 4 * 12 * 12 + 2 * 12 * 48 + 12 * 4  # and two products of attention over a single token
    assert 2 * multiply_adds <= found.flops[0] <= 2 * (multiply_adds + 2 * 12)
    assert found.flops[1] < found.flops[0]
    assert torch.backends.mha.get_fastpath_enabled()


def test_shared_weights_count_once():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    assert model_bytes(model) == 4 * (16 * 16 + 2 * 16)


def test_a_batch_that_takes_too_long_is_cut(monkeypatch):
    slow_down(monkeypatch, 0.5)
    monkeypatch.setattr(speed, "CALL_SECONDS", (0.002, 0.002))
    assert squeezed().speed.timings[0].batch < 64


def test_a_model_that_takes_no_single_sample_is_timed_at_a_batch():
    def picky(model, batch):
        if len(batch[0]) == 1:
            raise RuntimeError("too few samples")
        return cross_entropy(model, batch) + 0 * cross_entropy(model, batch)

    found = squeezed(loss=picky).speed
    assert [timing.batch for timing in found.timings] == [64]
    assert found.problems == ["could not time eager at batch 1 (RuntimeError: too few samples)"]


def test_a_failure_costs_nothing_but_a_warning(monkeypatch):
    def fail(*_):
        raise RuntimeError("no clock")

    monkeypatch.setattr(speed, "_measured", fail)
    with pytest.warns(UserWarning, match=r"speed was not measured \(RuntimeError: no clock\)"):
        result = squeezed()
    assert result.speed is None
    assert result.ranks


def test_nothing_is_measured_without_need():
    assert squeezed(speed="none").speed is None
    assert squeezed(keep=1.0).speed is None, "nothing was compressed"


def test_random_states_and_hooks_stay():
    model = network()
    before = torch.get_rng_state()
    result = squeezed(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module._forward_pre_hooks for module in result.model.modules())


def solved(rank, world, model, counts):
    shares = [[clouds(16, 10 * seed + i) for i in range(count)][rank::world] for seed, count in enumerate(counts)]
    result = compress(model, cross_entropy, *shares, objective="budget", keep=0.4, **QUICK)
    return result.ranks, result.speed


@pytest.mark.parametrize("counts", [(2, 2, 2), (2, 2, 1)], ids=["all", "one without a batch"])
def test_all_processes_get_the_figures_of_the_first(counts):
    first, second = run_together(solved, 2, network(), counts)
    assert first == second
    assert [timing.batch for timing in first[1].timings] == [16, 1]


@pytest.mark.slow
def test_compiled_models_are_timed_too():
    found = squeezed(speed="compile").speed
    expected = [("eager", 64), ("eager", 1), ("compile", 64), ("compile", 1)]
    assert [(timing.runtime, timing.batch) for timing in found.timings] == expected, found.problems
