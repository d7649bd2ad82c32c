"""Many budgets from one calibration against separate solves."""

import copy
import dataclasses
from io import StringIO

import pytest
import torch
from rich.console import Console
from small_modules import QUICK, clouds, loader, network
from torch import nn
from torch.nn import functional

from lrf_lightning import StepOutput, compress, load_compressed
from lrf_lightning.reports.budgets import budgets_table
from lrf_lightning.reports.tables import frontier_rows
from lrf_lightning.saving.structure_hook import register_structure_hook
from lrf_lightning.solver import joint
from lrf_lightning.solver.factors import compressed_copies
from lrf_lightning.solver.points.point_models import PointModels
from lrf_lightning.solver.speed.comparison import measure_speed

BUDGETS = (0.6, 0.5, 0.3, 0.25)


def loss(model, batch):
    logits = model(batch[0])
    losses = functional.cross_entropy(logits, batch[1], reduction="none")
    return StepOutput(losses, (logits.argmax(1) == batch[1]).float(), logits, batch[1])


def squeeze(model, **options):
    options = QUICK | {"objective": "frontier", "budgets": BUDGETS} | options
    return compress(model, loss, loader(seed=1), loader(seed=2), loader(seed=3), **options)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x, y = clouds()
    for _ in range(60):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def result(trained):
    return squeeze(trained)


def same_models(first, second):
    states = first.state_dict(), second.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_every_budget_is_measured_and_met(result):
    assert [point.budget for point in result.frontier] == list(BUDGETS)
    for point in result.frontier:
        assert point.keep <= point.budget
        assert point.certificate.dense.samples == 96
    assert sum(point.chosen for point in result.frontier) == bool(result.ranks)


def test_a_point_is_what_a_solve_of_its_own_gives(trained, result):
    for budget in BUDGETS:
        alone, point = squeeze(trained, objective="budget", keep=budget), result.at(budget)
        assert point.ranks == alone.ranks
        assert same_models(point.model, alone.model)
        assert point.certificate == alone.certificate
        assert (point.params_model, point.flops_layers) == (alone.params_model, alone.flops_layers)
        assert [(layer.name, layer.rank, layer.params_after) for layer in point.layers] == [
            (layer.name, layer.rank, layer.params_after) for layer in alone.layers
        ]


@pytest.mark.parametrize("count", [1, 3])
def test_how_many_are_fitted_at_a_time_does_not_matter(trained, result, count, monkeypatch):
    monkeypatch.setattr(compressed_copies, "copies_at_once", lambda work, layers, **options: count)
    few = squeeze(trained)
    assert few.frontier == result.frontier
    assert all(same_models(few.at(budget).model, result.at(budget).model) for budget in BUDGETS)


def test_every_point_is_timed(trained, monkeypatch):
    scopes = []

    def timed(work, make, ranks, scope):
        scopes.append(scope)
        return measure_speed(work, make, ranks, scope)

    monkeypatch.setattr(joint, "measure_speed", timed)
    found = squeeze(trained, speed="eager", tolerance=10.0, score_tolerance=1.0)
    assert [scope.brief for scope in scopes] == [True, True, True, False]
    assert [scope.batch for scope in scopes] == [None, 16, 16, 16], "as large as of the first"
    assert found.frontier[-1].speed is found.speed, "the chosen model is not timed twice"
    for point in found.frontier:
        assert {timing.batch for timing in point.speed.timings} == {1, 16}
        before, after = point.speed.flops
        assert after < before
        assert found.at(point.keep).speed is point.speed
    sizes = [point.speed.bytes_on_disk[1] for point in found.frontier]
    assert sizes == sorted(set(sizes), reverse=True), "each point has a speed of its own model"
    rows = frontier_rows(found)
    assert rows[0]["speedup_batch_large"] is None
    for row in rows[1:]:
        assert row["speedup_batch_1_lower"] <= row["speedup_batch_1"] <= row["speedup_batch_1_upper"]
        assert 0 < row["flops_model_kept"] < 1
    output = StringIO()
    Console(file=output, width=200).print(budgets_table(found, wide=True))
    assert "x as fast, " in output.getvalue()
    assert f"{rows[-1]['speedup_batch_large']:.2f}" in output.getvalue()


def test_a_budget_of_everything_leaves_no_point(trained):
    found = squeeze(trained, speed="eager", budgets=(1.0,))
    assert found.frontier == []
    assert found.certificate.verdict == "unchanged"


def test_a_point_that_cannot_be_built_for_its_timing_costs_nothing_else(trained, monkeypatch):
    def refuse(self, ranks):
        raise MemoryError("no room")

    monkeypatch.setattr(PointModels, "build", refuse)
    with pytest.warns(UserWarning, match=r"speed was not measured \(MemoryError: no room\)"):
        found = squeeze(trained, speed="eager", budgets=(0.15, 0.13))
    assert [point.speed for point in found.frontier] == [None, None]


def test_little_memory_is_enough(trained):
    """Layer after layer, batch after batch, budget after budget."""
    assert [point.budget for point in squeeze(trained, memory_gib=1e-6).frontier] == list(BUDGETS)


def test_a_point_can_be_saved_and_loaded(trained, result, tmp_path):
    small = result.at(0.3)
    assert small.params_model[1] < result.at(0.6).params_model[1]
    small.save(tmp_path / "small")
    assert same_models(load_compressed(network(), tmp_path / "small"), small.model)
    assert [point.budget for point in small.frontier if point.chosen] == [0.3]
    assert same_models(result.at(0.3).model, small.model), "each time a new model, the same weights"
    assert result.at(0.3).model is not small.model


def test_the_chosen_budget_is_the_smallest_that_ties_and_has_its_own_verdict(trained):
    chosen = squeeze(trained, tolerance=10.0, score_tolerance=1.0)
    assert [point.chosen for point in chosen.frontier] == [False, False, False, True]
    assert chosen.ranks == chosen.frontier[-1].ranks
    assert chosen.certificate == chosen.frontier[-1].certificate
    assert same_models(chosen.model, chosen.at(0.25).model)


def test_without_an_acceptable_budget_the_model_is_unchanged_but_the_points_stay(trained):
    small = squeeze(trained, budgets=(0.15, 0.13))
    assert small.frontier[0].loss_change > 0.01
    assert not small.ranks
    assert small.certificate.verdict == "unchanged"
    assert "No budget kept loss and score" in small.message
    assert same_models(small.model, trained)
    assert small.at(0.15).ranks


def test_budgets_of_multiply_adds(trained):
    found = squeeze(trained, cost="flops", budgets=[0.5])
    (point,) = found.frontier
    assert point.flops_layers <= 0.5 * found.flops_layers[0]


def test_budgets_that_cannot_be_reached_are_named(trained):
    with pytest.warns(UserWarning, match=r"cannot be reached .*left out: 0.002, 0.001"):
        found = squeeze(trained, budgets=(0.5, 0.002, 0.001))
    assert [point.budget for point in found.frontier] == [0.5]
    assert "left out: 0.002, 0.001" in found.message
    with pytest.raises(ValueError, match=r"keep=0\.002 cannot be reached"):
        squeeze(trained, budgets=(0.002, 0.001))


def test_points_that_are_not_there(trained, result):
    with pytest.raises(ValueError, match=r"keep=0.1 is below 0.2\d+, the smallest point; add budgets"):
        result.at(0.1)
    alone = dataclasses.replace(result, point_models=None)
    with pytest.raises(ValueError, match=r"keeps one model; use objective='frontier'"):
        alone.at(0.5)


def test_budgets_with_the_same_ranks_are_one_point(trained):
    found = squeeze(trained, budgets=(0.301, 0.3))
    assert [point.budget for point in found.frontier] == [0.3]


@pytest.mark.parametrize("follows", [False, True])
def test_attention_may_stay_dense_at_a_budget(follows):
    layer = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    model = nn.Sequential(nn.Unflatten(1, (1, 12)), encoder, nn.Flatten(), nn.Linear(12, 24), nn.Linear(24, 4)).eval()
    if follows:
        register_structure_hook(model)  # as the callback does
    result = squeeze(model, include=("3",), budgets=(0.6,))
    point = result.at(0.6)
    assert list(point.ranks) == ["3"]
    x, _ = clouds()
    expected = copy.deepcopy(model)
    expected[3] = point.model[3]
    with torch.no_grad():
        torch.testing.assert_close(point.model.eval()(x), expected(x))
    assert type(point.model[1].layers[0].self_attn) is nn.MultiheadAttention
