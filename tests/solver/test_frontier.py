"""Which measured models count as good as the original."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from lrf_lightning import Settings, StepOutput, compress
from lrf_lightning.solver.frontier import Frontier, _room
from lrf_lightning.solver.joint import calibrated


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
    ],
)
def test_room_for_a_change_for_the_worse(error, inside_margin, ties, room):
    assert _room(Settings(ties=ties), error, 0.01, inside_margin=inside_margin) == pytest.approx(room, rel=1e-6)


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


def test_compact_goes_as_far_as_the_margins_allow_and_lossless_does_not():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 4))
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for epoch in range(20):
        for batch in split(10 + epoch):
            optimizer.zero_grad()
            per_sample(model, batch).loss.mean().backward()
            optimizer.step()

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
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 4))
    data = split(1)
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
        return Frontier(work, dense).allocation(0.45)

    assert chosen(1.0, 1.0)["2"] <= last  # the factor of 1 takes the prediction at face value
    ranks = chosen(1.0, 20.0)
    assert ranks["2"] > last
    assert ranks["0"] < chosen(1.0, 1.0)["0"]  # the layer that is inside its range pays
    assert chosen(1e4, 20.0)["2"] <= last  # unless that costs even more
