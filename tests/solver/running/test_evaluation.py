"""Losses and scores of every sample, and what happens with unusual loss functions."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from lrf_lightning.solver.running.evaluation import Outcome, StepOutput, evaluate
from lrf_lightning.solver.running.loss_terms import LossTerms

CPU = torch.device("cpu")


def classifier():
    return nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))


def batches(*sizes):
    return [(torch.randn(size, 4), torch.randint(3, (size,))) for size in sizes]


def per_sample(model, batch):
    logits = model(batch[0])
    right = (logits.argmax(1) == batch[1]).float()
    return StepOutput(functional.cross_entropy(logits, batch[1], reduction="none"), right, logits, batch[1])


def mean(model, batch):
    output = per_sample(model, batch)
    return StepOutput(output.loss.mean(), output.score.mean())


def truth(model, data):
    """Loss and accuracy over all samples at once, without dropout."""
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    logits = model[0](x).double()
    return functional.cross_entropy(logits, y).item(), (logits.argmax(1) == y).double().mean().item()


@pytest.mark.parametrize("sizes", [(8, 8), (8, 5), (1, 7, 3), (1,)])
@pytest.mark.parametrize("loss", [per_sample, mean])
def test_means_weigh_every_sample_alike(sizes, loss):
    model, data = classifier(), batches(*sizes)
    outcome = evaluate(model, loss, data, CPU)
    measurement = outcome.measurement()
    assert (measurement.loss, measurement.score) == pytest.approx(truth(model, data), rel=1e-5)
    assert measurement.samples == sum(sizes)


def test_pairs_are_samples_for_vectors_and_batches_for_scalars():
    model, data = classifier(), batches(8, 5)
    vector, scalar = evaluate(model, per_sample, data, CPU), evaluate(model, mean, data, CPU)
    assert vector.losses.shape == vector.scores.shape == vector.weights.shape == (13,)
    assert scalar.losses.shape == scalar.scores.shape == (2,)
    assert scalar.weights.tolist() == [8, 5]
    assert vector.losses.dtype == torch.float64
    torch.testing.assert_close(scalar.losses[1], vector.losses[8:].mean())


def test_a_last_batch_of_one_sample_may_be_a_scalar():
    outcome = evaluate(classifier(), lambda m, b: per_sample(m, b).loss.squeeze(), batches(6, 6, 1), CPU)
    assert outcome.losses.shape == (13,)
    assert outcome.weights.tolist() == [1.0] * 13


def test_scores_that_some_batches_lack_are_dropped():
    def loss(model, batch):
        output = per_sample(model, batch)
        return output if len(batch[1]) == 6 else StepOutput(output.loss)

    outcome = evaluate(classifier(), loss, batches(6, 4), CPU)
    assert outcome.scores is None
    assert outcome.measurement().score is None
    assert outcome.losses.shape == (10,)


def test_logits_are_kept_on_request_only():
    model, data = classifier(), batches(6, 4)
    kept = evaluate(model, per_sample, data, CPU, keep_logits=True)
    torch.testing.assert_close(kept.logits, torch.cat([model[0](x) for x, _ in data]).detach())
    assert torch.equal(kept.target, torch.cat([y for _, y in data]))
    assert evaluate(model, per_sample, data, CPU).logits is None
    assert evaluate(model, mean, data, CPU, keep_logits=True).logits is None


def test_evaluation_leaves_modes_and_gradients_alone():
    model = classifier()
    model[1].eval()
    model.train()
    model[0].eval()
    seen = []

    def loss(m, batch):
        seen.append((m.training, m[1].training, torch.is_grad_enabled()))
        return per_sample(m, batch)

    evaluate(model, loss, batches(3), CPU)
    assert seen == [(False, False, False)]
    assert (model.training, model[0].training, model[1].training) == (True, False, True)
    assert torch.is_grad_enabled()


def test_modes_are_restored_after_an_error():
    model = classifier().train()
    modes = []

    def loss(m, batch):
        modes.append(m[1].training)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        evaluate(model, loss, batches(3), CPU)
    assert modes == [False]
    assert model[1].training


def test_a_nan_shows_in_the_measurement():
    data = batches(4, 4)
    data[1][0][2, 0] = math.nan
    outcome = evaluate(classifier(), per_sample, data, CPU)
    assert outcome.losses.isnan().sum() == 1
    assert math.isnan(outcome.measurement().loss)


def test_an_empty_loader_is_an_error():
    with pytest.raises(ValueError, match="selection holds no batch; give a loader that yields at least one"):
        evaluate(classifier(), per_sample, [], CPU, split="selection")
    exhausted = iter(batches(3))
    evaluate(classifier(), per_sample, exhausted, CPU)
    with pytest.raises(ValueError, match="can be iterated again"):
        evaluate(classifier(), per_sample, exhausted, CPU)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m, b: per_sample(m, b).loss[:2], r"loss has shape \(2,\) for a batch of 5 samples; allowed are \(\)"),
        (lambda m, b: m(b[0]), r"loss has shape \(5, 3\) for a batch of 5 samples"),
        (lambda m, b: StepOutput(m(b[0]).sum(), torch.ones(4)), r"score has shape \(4,\) for a batch of 5 samples"),
        (
            lambda m, b: StepOutput(m(b[0]).mean(1), terms=LossTerms(m(b[0])[:2], 3)),
            r"terms have the shape \(2, 3\) for a batch of 5 samples; allowed is \(5, t\)",
        ),
        (
            lambda m, b: StepOutput(torch.ones(5), terms=LossTerms(torch.ones(5, 3), 3)),
            "terms add up to a mean loss of 3, but it is 1",
        ),
        (lambda m, b: 0.5, r"loss returned float; return a Tensor of shape \(\) or \(5,\), or a StepOutput"),
        (lambda m, b: None, "loss returned NoneType"),
        (lambda m, b: StepOutput(0.5), "loss returned StepOutput"),
    ],
)
def test_unusable_losses_are_errors(loss, message):
    with pytest.raises(ValueError, match=message):
        evaluate(classifier(), loss, batches(5), CPU)


def test_a_step_that_changes_its_batch_sees_the_same_one_every_time():
    def changing(model, batch):
        x, y = batch.pop("x").sub_(0.5), batch.pop("y")
        return per_sample(model, (x, y))

    model, data = classifier(), [{"x": x, "y": y} for x, y in batches(8, 5)]
    first, second = (evaluate(model, changing, data, CPU) for _ in range(2))
    torch.testing.assert_close(first.losses, second.losses, rtol=0, atol=0)


def test_measurement_is_the_weighted_mean():
    outcome = Outcome(torch.tensor([1.0, 4.0]).double(), torch.tensor([3.0, 1.0]).double())
    assert outcome.measurement().loss == pytest.approx(1.75)
    assert outcome.measurement().samples == 4


@pytest.mark.parametrize("scalar", ["loss", "score"])
def test_pairs_of_losses_and_scores_may_differ(scalar):
    def loss(model, batch):
        output = per_sample(model, batch)
        return replace(output, **{scalar: getattr(output, scalar).mean()})

    model, data = classifier(), batches(8, 5)
    outcome, fine = evaluate(model, loss, data, CPU), evaluate(model, per_sample, data, CPU)
    assert fine.score_weights is None
    assert fine.weights_of_scores.tolist() == [1] * 13
    both = {"loss": outcome.weights, "score": outcome.weights_of_scores}
    assert both.pop(scalar).tolist() == [8, 5]
    (other,) = both.values()
    assert other.tolist() == [1] * 13
    for figure in ("loss", "score", "samples"):
        assert getattr(outcome.measurement(), figure) == pytest.approx(getattr(fine.measurement(), figure))


def test_the_outcome_knows_how_many_terms_a_sample_has():
    def loss(model, batch):
        terms = LossTerms.of(model(batch[0]))
        return StepOutput(terms.per_sample, terms=terms)

    assert evaluate(classifier(), loss, batches(5), CPU).terms == 3
    assert evaluate(classifier(), per_sample, batches(5), CPU).terms == 1
