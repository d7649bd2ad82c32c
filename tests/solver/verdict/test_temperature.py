"""The best temperature against SciPy, and the losses at it."""

import dataclasses
import math

import pytest
import torch
from outcomes import outcome
from scipy import optimize
from torch.nn import functional

from lrf_lightning.solver.settings import Settings
from lrf_lightning.solver.verdict.certificate import certify
from lrf_lightning.solver.verdict.temperature import fit_temperature


def classifier(scale, samples=300, seed=0):
    torch.manual_seed(seed)
    logits = torch.randn(samples, 5)
    target = torch.distributions.Categorical(logits=logits).sample()
    logits = scale * logits
    losses = functional.cross_entropy(logits, target, reduction="none").double()
    return outcome(losses, logits=logits, target=target)


@pytest.mark.parametrize("scale", [0.2, 1.0, 4.0])
def test_temperature_is_scipys_minimum(scale):
    data = classifier(scale)

    def loss(log_temperature):
        return float(functional.cross_entropy(data.logits.double() / math.exp(log_temperature), data.target))

    best = optimize.minimize_scalar(loss, bounds=(math.log(1 / 20), math.log(20)), method="bounded")
    assert fit_temperature(data) == pytest.approx(math.exp(best.x), rel=1e-4)


def test_a_perfect_classifier_has_no_best_temperature():
    """All answers are right on the split where it is fitted, so that any other split would be punished for an error."""
    target = torch.arange(4)
    perfect = outcome([0.0] * 4, logits=torch.eye(4) * 5, target=target)
    hopeless = dataclasses.replace(perfect, logits=-torch.eye(4))
    assert (fit_temperature(perfect), fit_temperature(hopeless)) == (0.0, math.inf)
    dense = classifier(1.0)
    for found, reason in (
        ((0.0, 1.5), "on the selection split the loss of the original falls with ever more confidence"),
        ((1.5, math.inf), "on the selection split the loss of the compressed model falls with ever less confidence"),
    ):
        certificate = certify(dense, dense, Settings(), temperatures=found)
        assert certificate.no_temperature == reason
        scaled = (certificate.temperature, certificate.scaled_dense_loss, certificate.scaled_compressed_loss)
        assert scaled == (None, None, None)


def test_rows_without_a_target_do_not_count_for_the_temperature():
    data = classifier(3.0)
    logits = torch.cat([data.logits, torch.randn(50, 5) * 100])
    target = torch.cat([data.target, torch.full((50,), -100)])
    padded = dataclasses.replace(data, logits=logits, target=target)
    assert fit_temperature(padded) == pytest.approx(fit_temperature(data))
    assert fit_temperature(dataclasses.replace(data, logits=None)) is None
    assert fit_temperature(dataclasses.replace(data, target=torch.full((300,), -100))) is None


def test_classes_that_are_ruled_out_do_not_hide_the_temperature():
    data = classifier(3.0)
    logits = torch.cat([data.logits, torch.full((len(data.logits), 2), -math.inf)], 1)
    assert fit_temperature(dataclasses.replace(data, logits=logits)) == pytest.approx(fit_temperature(data))
    logits[0, data.target[0]] = -math.inf
    assert fit_temperature(dataclasses.replace(data, logits=logits)) is None, "a right answer is ruled out"
    assert fit_temperature(dataclasses.replace(data, logits=data.logits * math.nan)) is None


def test_scaled_losses_are_reported_for_classifiers():
    dense, compressed = classifier(3.0), classifier(2.0, seed=1)
    certificate = certify(dense, compressed, Settings(), temperatures=(3.0, 2.5))
    expected = [
        float(functional.cross_entropy(data.logits.double() / t, data.target))
        for data, t in ((dense, 3.0), (compressed, 2.5))
    ]
    assert certificate.temperature == 3.0
    assert certificate.scaled_dense_loss == pytest.approx(expected[0])
    assert certificate.scaled_compressed_loss == pytest.approx(expected[1])
    assert certificate.dense.loss > expected[0]
    plain = certify(dense, compressed, Settings())
    assert (plain.temperature, plain.scaled_dense_loss, plain.scaled_compressed_loss) == (None, None, None)
    assert certificate.no_temperature == plain.no_temperature == ""
    for without in (dataclasses.replace(dense, logits=None), dataclasses.replace(dense, target=dense.target * 0 - 100)):
        assert certify(without, compressed, Settings(), temperatures=(3.0, 2.5)).temperature is None
