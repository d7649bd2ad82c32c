"""Which allocations are measured, which of them are taken, and which models count as good as the original."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from lrf_lightning import Settings, StepOutput, compress
from lrf_lightning.solver.factors import compressed_copies
from lrf_lightning.solver.joint import calibrated
from lrf_lightning.solver.points import acceptance
from lrf_lightning.solver.points import frontier as frontier_module
from lrf_lightning.solver.points.frontier import Frontier
from lrf_lightning.solver.running.evaluation import Outcome
from lrf_lightning.solver.settings import default_loss_margin


@pytest.mark.parametrize(
    ("error", "inside_margin", "ties", "room"),
    [
        (1e-9, True, 1.0, 0.005),  # the bound is all but the change itself: half the margin
        (0.001, True, 1.0, 0.005 - 1.6448536 * 0.001),
        (0.004, True, 1.0, 0.004),  # uncertain: one standard error is a tie
        (0.004, True, 2.0, 0.005),  # but never more than half the margin
        (float("inf"), True, 1.0, 0.005),  # a single pair
        (1e-9, False, 1.0, 1e-9),  # lossless looks for ties only
        (0.002, True, 0.0, 0.0),  # at face value
        (float("inf"), True, 0.0, 0.0),
    ],
)
def test_room_for_a_change_for_the_worse(error, inside_margin, ties, room):
    assert acceptance._room(Settings(ties=ties), error, 0.01, inside_margin=inside_margin) == pytest.approx(
        room, rel=1e-6
    )


def per_sample(model, batch):
    logits = model(batch[0])
    losses = functional.cross_entropy(logits, batch[1], reduction="none")
    return StepOutput(losses, (logits.argmax(1) == batch[1]).float())


def split(seed, samples=2000):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 12, generator=generator)
    teacher = torch.Generator().manual_seed(0)
    hidden = torch.sin(x @ torch.randn(12, 16, generator=teacher) / 2)
    scores = hidden @ torch.randn(16, 4, generator=teacher)
    y = (scores + 0.5 * torch.randn(samples, 4, generator=generator)).argmax(1)
    return list(zip(x.split(500), y.split(500), strict=True))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 4))


def trained():
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for epoch in range(20):
        for batch in split(10 + epoch):
            optimizer.zero_grad()
            per_sample(model, batch).loss.mean().backward()
            optimizer.step()
    return model


def test_compact_goes_as_far_as_the_margins_allow_and_lossless_does_not():
    model = trained()

    def kept(objective, margin):
        options = {"loss_margin": margin, "score_margin": 1.0, "points": 6, "refinements": 2, "speed": "none"}
        found = compress(model, per_sample, split(1), split(2), split(3), objective=objective, **options)
        if objective == "compact":
            assert found.certificate.verdict in ("better", "not worse")
        return found.params_model[1]

    narrow, wide = kept("compact", 0.004), kept("compact", 0.2)
    assert wide < 0.7 * narrow
    assert kept("lossless", 0.2) > wide


def test_outside_its_perturbation_range_a_prediction_counts_several_times():
    """A rank beyond the range of its layer is taken where the others would lose more, and only there."""
    model, data = network(), split(1)
    parts = {"calibration": data, "selection": data, "verification": data}
    work, dense = calibrated(model, per_sample, parts, settings=Settings(objective="budget"))

    last = 12

    def chosen(price, range_factor):
        """Ranks of layers of which the range of one ends where it becomes small, and another costs more."""
        for name, layer in work.layers.items():
            count = layer.candidate.max_rank
            change = torch.arange(count, 0, -1, dtype=torch.float64).square() * (price if name == "0" else 1.0)
            allowed = torch.ones(count, dtype=torch.bool)
            if name == "2":
                allowed[:last] = False
            work.curves[name] = replace(work.curves[name], change=change, allowed=allowed)
        work.settings = replace(work.settings, range_factor=range_factor)
        return Frontier(work, dense).rivals(0.45)[0]

    assert chosen(1.0, 1.0)["2"] <= last  # the factor of 1 takes the prediction at face value
    ranks = chosen(1.0, 20.0)
    assert ranks["2"] > last
    assert ranks["0"] < chosen(1.0, 1.0)["0"]  # the layer that is inside its range pays
    assert chosen(1e4, 20.0)["2"] <= last  # unless that costs even more


def frontier_with(promises, **settings):
    """The frontier of a trained network whose curves are replaced; a promise is (gain, curvature) at rank 1."""
    model = trained()
    parts = {"calibration": split(1), "selection": split(2), "verification": split(3)}
    work, dense = calibrated(model, per_sample, parts, settings=Settings(objective="budget", **settings))
    for name, layer in work.layers.items():
        gain, curvature = promises.get(name, (0.0, 1.0))
        count = layer.candidate.max_rank
        fall = torch.linspace(1, 0, count + 1, dtype=torch.float64)[:count]
        prediction = replace(
            work.curves[name].prediction,
            first_order=-gain * fall,
            standard_error=torch.zeros(count, dtype=torch.float64),
            curvature=curvature * fall,
        )
        work.curves[name] = replace(
            work.curves[name],
            prediction=prediction,
            change=prediction.first_order + prediction.curvature,
            allowed=torch.ones(count, dtype=torch.bool),
        )
    return Frontier(work, dense)


def test_one_allocation_is_measured_where_no_gain_is_predicted():
    frontier = frontier_with({})
    assert len(frontier.rivals(0.5)) == 1
    frontier.at(0.5)
    assert len(frontier.measured) == len(frontier.points) == 1


def test_a_false_promise_of_a_gain_is_found_out():
    """Layer 0 promises a gain and would ruin the model; layer 2 is the smaller evil."""
    frontier = frontier_with({"0": (5.0, 0.1), "2": (0.0, 0.2)})
    cautious, trusting = frontier.rivals(0.8)
    assert cautious.get("0", 12) > trusting["0"]
    point = frontier.at(0.8)
    assert point.ranks == cautious
    assert [found.ranks for found in frontier.points] == [cautious]
    assert len(frontier.measured) == 2
    losses = {str(found.point.ranks): found.point.loss for found in frontier.measured.values()}
    assert losses[str(cautious)] < losses[str(trusting)]


def test_a_gain_that_the_selection_split_confirms_is_taken():
    """Without its gain layer 2 seems to cost more than layer 0, which in truth ruins the model."""
    frontier = frontier_with({"0": (0.0, 0.01), "2": (10.0, 5.0)})
    cautious, trusting = frontier.rivals(0.8)
    point = frontier.at(0.8)
    assert point.ranks == trusting != cautious
    measured = {str(found.point.ranks): found.point.loss for found in frontier.measured.values()}
    assert point.loss == measured[str(trusting)] < measured[str(cautious)]
    built = frontier.build(point.ranks)
    assert built[2].rank == trusting["2"]


def test_every_best_model_is_told_once_and_no_other():
    frontier = frontier_with({"0": (5.0, 0.1), "2": (0.0, 0.2)})
    told = []
    points = frontier.measure_shares([0.8, 0.6, 0.6], lambda point, model: told.append((point.ranks, model)))
    assert [ranks for ranks, _ in told] == [points[0].ranks, points[1].ranks]
    assert points[1] is points[2]
    assert len(frontier.measured) > len(frontier.points) == 2
    for ranks, model in told:
        assert {name: model.get_submodule(name).rank for name in ranks} == ranks


@pytest.mark.parametrize("objective", ["compact", "lossless"])
def test_a_small_saving_is_found_where_the_first_share_saves_too_much(objective, monkeypatch):
    def saved(accepted):
        monkeypatch.setattr(acceptance, "_qualifies", lambda frontier, point, *others: accepted(point))
        options = {"objective": objective, "points": 2, "speed": "none"}
        found = compress(trained(), per_sample, split(1), split(2), split(3), **options)
        return found, 1 - found.params_layers[1] / found.params_layers[0]

    found, share = saved(lambda point: point.keep > 0.92)
    assert 0.05 < share < 0.08
    assert max(point.keep for point in found.frontier if not point.chosen) < 0.92
    found, share = saved(lambda point: False)
    assert share == 0
    assert found.certificate.verdict == "unchanged"
    assert len(found.frontier) > 2, "it was looked for"


def fit_together(count, monkeypatch):
    for module in (frontier_module, compressed_copies):
        monkeypatch.setattr(module, "copies_at_once", lambda work, layers, **options: count)


def test_the_walk_of_a_large_model_ends_where_the_loss_is_hopeless(monkeypatch):
    def walked(together, **settings):
        frontier = frontier_with({}, **settings)
        fit_together(together, monkeypatch)
        return frontier.walk()

    monkeypatch.setattr(frontier_module, "HOPELESS", 5.0)  # the loss of this network never rises by 10 margins
    every = walked(8)
    assert len(every) == 8, "what is measured together is measured"
    few = walked(2)
    assert few == every[: len(few)]
    margin = default_loss_margin(every[0].loss - every[0].loss_change)
    hopeless = [point.loss_change - 3 * point.loss_change_error > 5 * margin for point in few]
    assert not any(hopeless[:-2])
    assert any(hopeless[-2:])
    assert len(few) < 8
    assert len(walked(1, loss_margin=10.0)) == 8, "with such a margin nothing is"
    assert len(walked(1, tolerance=10.0)) == 8, "nor with such a tolerance"
    assert walked(2, loss_margin=0.0) == few, "no margin is no reason to give up at once"


@pytest.mark.parametrize("together", [8, 3])
def test_the_progress_of_a_walk_counts_all_measurements_once(together, monkeypatch):
    frontier = frontier_with({})
    fit_together(together, monkeypatch)
    shown = []
    frontier.work.progress = lambda *figures: shown.append(figures)
    frontier.walk()
    counts = [(done, total) for stage, done, total in shown if stage == "frontier"]
    total = len(frontier.measured)
    assert total >= 8
    assert counts == [(done, total) for done in range(total + 1)]


@pytest.mark.parametrize(
    ("change", "score", "better"),
    [(-0.1, 0.0, True), (0.1, 0.0, False), (-0.001, 0.0, False), (-0.1, -0.5, False), (-0.1, 0.5, True)],
)
def test_better_is_surely_lower_and_no_less_accurate(change, score, better):
    frontier = frontier_with({})
    noise = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 10
    weights, scores = torch.ones(400, dtype=torch.float64), torch.zeros(400, dtype=torch.float64)
    other = Outcome(torch.zeros(400, dtype=torch.float64), weights, scores)
    assert frontier._is_better(Outcome(noise - noise.mean() + change, weights, scores + score), other) is better
    assert not frontier._is_better(Outcome(noise[:1] - 9, weights[:1]), Outcome(noise[:1], weights[:1])), "one pair"
    # a score for the whole split has no error: it must be inside half the margin
    whole = Outcome(noise - noise.mean() + change, weights, scores[:1] + score, weights[:1] * 400)
    before = Outcome(torch.zeros(400, dtype=torch.float64), weights, scores[:1], weights[:1] * 400)
    assert frontier._is_better(whole, before) is better


def test_a_budget_that_ranks_meet_exactly_is_met():
    model, data = (
        nn.Sequential(nn.Linear(200, 200), nn.Linear(200, 4)),
        [(torch.randn(8, 200), torch.tensor([0, 1] * 4))],
    )
    parts = {"calibration": data, "selection": data, "verification": data}
    settings = Settings(objective="budget", prediction="energy", include=("0",))
    work, dense = calibrated(model, per_sample, parts, settings=settings)
    for keep in (0.57, 0.69, 0.83):  # 0.57 * 40,000 is 22,799.999..., rank 57 costs 22,800
        assert Frontier(work, dense).rivals(keep) == [{"0": round(100 * keep)}]


def test_ranks_that_cost_more_than_the_dense_layer_are_no_choice():
    """As those of a table are that is only looked up, counted in multiply-adds."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 16), nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 4))
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randint(40, (64, 4), generator=generator), torch.randint(4, (64,), generator=generator))]
    parts = {"calibration": data, "selection": data, "verification": data}
    work, dense = calibrated(model, per_sample, parts, settings=Settings(objective="budget", cost="flops"))
    frontier = Frontier(work, dense)
    assert work.cost(work.layers["0"], 1) > work.cost(work.layers["0"], None) == 0
    for keep in (1.0, 0.8, 0.4):
        for ranks in frontier.rivals(keep):
            assert "0" not in ranks
            assert (
                sum(work.cost(layer, ranks.get(name)) for name, layer in work.layers.items()) <= keep * work.dense_cost
            )
