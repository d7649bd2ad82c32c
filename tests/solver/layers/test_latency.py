import random

import pytest
import torch
from process_groups import run_together
from small_modules import QUICK, clouds, network
from torch import nn

from lrf_lightning import compress
from lrf_lightning.modules import LowRankModule
from lrf_lightning.solver.layers import latency
from lrf_lightning.solver.layers.latency import LayerLatency, LayerTimes, grid, median_polish, rising
from lrf_lightning.solver.layers.layer_input import LayerInput


def cross_entropy(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y, reduction="none")


def splits():
    return [[clouds(64, seed)] for seed in range(3)]


def slow_down(monkeypatch, cost):
    """Let a call of a layer last as long as ``cost(module)`` says, without any waiting."""

    def duration(module, x, calls):
        return cost(module) * len(x) * random.Random(len(x)).uniform(0.99, 1.01)

    monkeypatch.setattr(latency, "_duration", duration)


def by_rank(module):
    """Factors cost 0.2 + rank / 10 of the dense layer, so that ranks of 8 and more are slower."""
    return (0.2 + module.rank / 10 if isinstance(module, LowRankModule) else 1.0) * 1e-4


@pytest.mark.parametrize("disturbed", [0, 40])
def test_median_polish_finds_durations_under_disturbances(disturbed):
    generator = torch.Generator().manual_seed(0)
    true = torch.tensor([0.0, -1.0, -0.5, -0.2], dtype=torch.float64)
    slowness = torch.randn(25, 1, generator=generator, dtype=torch.float64)  # whole rounds up to ten times slower
    noise = 0.02 * torch.randn(25, 4, generator=generator, dtype=torch.float64)
    spikes = torch.zeros(100, dtype=torch.float64)
    spikes[torch.randperm(100, generator=generator)[: disturbed // 2]] = 2.0
    durations, errors = median_polish(true + slowness + noise + spikes.reshape(25, 4))
    ratios = durations - durations[0]
    torch.testing.assert_close(ratios, true, atol=0.03, rtol=0)
    assert bool((errors < 0.03).all())


def test_rising_is_the_isotonic_regression():
    sklearn = pytest.importorskip("sklearn.isotonic")
    values = torch.randn(30, generator=torch.Generator().manual_seed(1)).tolist()
    expected = sklearn.IsotonicRegression().fit_transform(range(30), values)
    assert rising(values) == pytest.approx(list(expected))
    assert rising([]) == []


@pytest.mark.parametrize(("max_rank", "multiple"), [(1, 8), (7, 8), (8, 8), (31, 8), (300, 8), (300, 1), (4000, 8)])
def test_grid_spans_all_ranks_on_multiples(max_rank, multiple):
    ranks = grid(max_rank, multiple)
    step = multiple if max_rank >= multiple else 1
    assert list(ranks) == sorted(set(ranks))
    assert ranks[0] == step
    assert max_rank - step < ranks[-1] <= max_rank
    assert all(rank % step == 0 for rank in ranks)
    assert len(ranks) <= 11


def test_durations_between_timed_ranks():
    times = LayerTimes(dense=2.0, ranks=(8, 16), ratios=(0.4, 0.8), errors=(0.0, 0.1))
    assert [times.seconds(rank) for rank in (None, 1, 8, 12, 16)] == pytest.approx([2.0, 0.8, 0.8, 1.2, 1.6])
    assert LayerLatency(((times, 3.0), (times, 1.0))).seconds(12) == pytest.approx(4.8)


def test_a_rank_within_the_noise_of_the_dense_layer_is_not_faster():
    def layer(ratio, error):
        return LayerLatency(((LayerTimes(1.0, (8,), (ratio,), (error,)), 1.0),))

    assert layer(0.9, 0.01).is_faster(8)
    assert not layer(0.9, 0.1).is_faster(8)
    assert not layer(1.1, 0.01).is_faster(8)


def test_a_layer_is_timed_on_the_like_of_its_input():
    x = torch.zeros(6, 3, 5, 5).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        seen = LayerInput.of(x, 6, 150)
    assert (seen.autocast, seen.channels_last, seen.dtype) == ("bfloat16", True, "float32")
    smaller = seen.cut(2)
    assert (smaller.shape, smaller.rows) == ((2, 3, 5, 5), 50)
    conv = nn.Conv2d(3, 4, 3)
    example = smaller.example(conv, torch.device("cpu"))
    assert example.shape == (2, 3, 5, 5)
    assert example.is_contiguous(memory_format=torch.channels_last)
    with seen.precision(torch.device("cpu")):
        assert conv(example).dtype == torch.bfloat16
    windows = LayerInput.of(torch.zeros(12, 7, 8), 3, 84)  # four windows per sample
    assert windows.cut(1).shape == (4, 7, 8)
    assert LayerInput.of(torch.zeros(5, 3, 8), 3, 15).cut(1).shape == (5, 3, 8), "the samples are not in front"


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Linear(32, 32), torch.randn(4, 6, 32)),
        (nn.Conv2d(16, 16, 3, groups=2), torch.randn(4, 16, 6, 6)),
        (nn.ConvTranspose2d(16, 16, 3), torch.randn(4, 16, 6, 6)),
        (nn.Embedding(40, 16), torch.randint(0, 40, (4, 6))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_real_layers_are_measured(module, x):
    times = latency._measure(module, LayerInput.of(x, 4, 24), (1, 2, 4), torch.device("cpu"), 1.0)
    assert times.dense > 0
    assert list(times.ratios) == sorted(times.ratios)
    assert all(error >= 0 for error in times.errors)


def test_only_ranks_that_are_faster_are_given(monkeypatch):
    slow_down(monkeypatch, by_rank)
    torch.manual_seed(0)
    model = network(width=48)
    found = compress(
        model, cross_entropy, *splits(), objective="budget", cost="latency", keep=0.7, rank_multiple=1, **QUICK
    )
    assert found.ranks
    assert all(rank < 8 for rank in found.ranks.values())
    before, after = found.latency_layers
    expected = sum(0.2 + found.ranks[n] / 10 if n in found.ranks else 1.0 for n in ("0", "2", "4")) / 3
    assert after / before == pytest.approx(expected, abs=0.03)
    assert after / before <= 0.7
    layer = next(layer for layer in found.layers if layer.rank is not None)
    assert layer.latency_after < layer.latency_before


def test_a_model_that_nothing_makes_faster_is_unchanged(monkeypatch):
    slow_down(monkeypatch, lambda module: 2e-4 if isinstance(module, LowRankModule) else 1e-4)
    for objective in ("lossless", "compact", "budget", "frontier"):
        found = compress(network(), cross_entropy, *splits(), objective=objective, cost="latency", **QUICK)
        assert found.ranks == {}
        assert "measurably faster" in found.message


def test_budgets_and_their_results_count_time(monkeypatch):
    slow_down(monkeypatch, by_rank)
    options = {"objective": "frontier", "cost": "latency", "budgets": [0.8, 0.6], "rank_multiple": 1, **QUICK}
    found = compress(network(48), cross_entropy, *splits(), **options)
    assert len(found.frontier) == 2
    for point in found.frontier:
        assert point.keep <= point.budget
    smallest = found.frontier[-1]
    taken = found.at(smallest.keep)
    assert taken.latency_layers[1] / taken.latency_layers[0] == pytest.approx(smallest.keep)
    times = [layer.latency_after for layer in taken.layers if layer.latency_after is not None]
    assert sum(times) == pytest.approx(taken.latency_layers[1])


def test_figures_are_measured_once_per_shape(monkeypatch):
    measured = []
    measure = latency._measure

    def counted(module, *args):
        measured.append(str(module))
        return measure(module, *args)

    monkeypatch.setattr(latency, "_measure", counted)
    model = nn.Sequential(nn.Linear(12, 24), nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 4))
    options = {"objective": "budget", "cost": "latency", "keep": 1.0, "probes": False, **QUICK}
    compress(model, cross_entropy, *splits(), **options)
    assert len(measured) == len(set(measured)) == 3, "two layers of one shape share their figures"
    compress(model, cross_entropy, *splits(), **options)
    assert len(measured) == 3


def solved(rank, world, model):
    """Ranks and times; only the first process may measure."""
    if rank > 0:
        latency._measure = None
    shares = [[(x, y)] for x, y in (clouds(16, 2 * seed + rank) for seed in range(3))]
    options = {"objective": "budget", "cost": "latency", "keep": 0.7, "rank_multiple": 1, **QUICK}
    found = compress(model, cross_entropy, *shares, **options)
    return found.ranks, [(layer.latency_before, layer.latency_after) for layer in found.layers]


def test_all_processes_count_the_times_of_the_first(monkeypatch):
    slow_down(monkeypatch, by_rank)
    first, second = run_together(solved, 2, network(48))
    assert first == second
    assert first[0], first


def test_timing_ends_in_time(monkeypatch):
    monkeypatch.setattr(latency, "PRECISION", 0.0)
    calls = []
    original = latency._duration
    monkeypatch.setattr(latency, "_duration", lambda *args: calls.append(args) or original(*args))
    latency._measure(nn.Linear(8, 8), LayerInput.of(torch.zeros(2, 8), 2, 2), (1, 2), torch.device("cpu"), 0.0)
    in_rounds = len(calls) - 3 - 3  # the batch's size and the warm-up come first
    assert in_rounds == latency.FEWEST_ROUNDS * 3
