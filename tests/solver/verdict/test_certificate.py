"""The verdict: its rules, and its error rates on synthetic paired losses."""

import dataclasses
import math
from functools import cache

import numpy as np
import pytest
import torch
from outcomes import outcome

from lrf_lightning.solver.running.evaluation import Outcome
from lrf_lightning.solver.settings import Settings, default_loss_margin
from lrf_lightning.solver.verdict.certificate import certify
from lrf_lightning.solver.verdict.intervals import bootstrap_bound, student_quantile, tango_interval

POSITIVE = ("better", "not worse")
TRIALS = 2000


def verdict(change, score_change=None, **settings):
    """Verdict on models whose losses (around 1) and scores differ by these tensors."""
    dense_scores = None if score_change is None else np.where(np.asarray(score_change) < 0, 1.0, 0.0)
    before = outcome(np.ones(len(change)), dense_scores)
    after = outcome(1 + np.asarray(change), None if score_change is None else dense_scores + score_change)
    return certify(before, after, Settings(**settings))


# populations of loss differences, many near 0 and few large, as a truncated network's cross-entropies


def rare_rises(share):
    """Small noise, and exponential rises on a share of the samples."""

    def draw(rng, shape):
        return 0.02 * rng.normal(size=shape) + (rng.random(shape) < share) * rng.exponential(size=shape)

    return draw, share


def cross_entropies(center, spread, noise, shift):
    """softplus(-m') - softplus(-m) for normal margins m, which the compression blurs and shrinks."""

    def difference(m, blur):
        return np.logaddexp(0, -(m + noise * blur * (1 + 0.2 * np.abs(m)) - shift)) - np.logaddexp(0, -m)

    def draw(rng, shape):
        return difference(center + spread * rng.normal(size=shape), rng.normal(size=shape))

    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    weights = weights / weights.sum()
    mean = weights @ difference(center + spread * nodes[:, None], nodes[None, :]) @ weights
    return draw, float(mean)


POPULATIONS = {
    "normal": (lambda rng, shape: 0.2 + rng.normal(size=shape), 0.2),
    "exponential": (lambda rng, shape: rng.exponential(size=shape), 1.0),
    "lognormal": (lambda rng, shape: rng.lognormal(0, 1, size=shape), math.exp(0.5)),
    "heavy lognormal": (lambda rng, shape: rng.lognormal(0, 1.5, size=shape), math.exp(1.125)),
    "10 % rises": rare_rises(0.1),
    "3 % rises": rare_rises(0.03),
    "mild": cross_entropies(4, 3, 0.3, 0.05),
    "strong": cross_entropies(4, 3, 1.0, 0.1),
    "confident": cross_entropies(8, 4, 1.0, 0.1),
    "very confident": cross_entropies(12, 5, 1.0, 0.1),
}


def upper_bounds(changes):
    """The upper bounds of :func:`mean_interval` for many trials at once."""
    pairs = changes.shape[1]
    deviations = torch.from_numpy(changes - changes.mean(1, keepdims=True))
    width = student_quantile(0.95, pairs - 1) * changes.std(1, ddof=1) / math.sqrt(pairs)
    return changes.mean(1) + np.maximum(width, bootstrap_bound(deviations, 0.95).numpy())


def false_claims(population, pairs, trials):
    """How often a loss that rose by exactly the margin passes."""
    draw, mean = population
    rng = np.random.default_rng(pairs)
    uppers = np.concatenate([upper_bounds(draw(rng, (100, pairs))) for _ in range(trials // 100)])
    return (uppers < mean).mean()


def noise(trials):
    """Two standard deviations of an error rate of 5 %."""
    return 2 * math.sqrt(0.05 * 0.95 / trials)


@cache
def score_holds(gained, lost, pairs, margin):
    return tango_interval(gained, lost, pairs, 0.95).lower > -margin


def scores_hold(scores, margin):
    counts = zip((scores > 0).sum(1).tolist(), (scores < 0).sum(1).tolist(), strict=True)
    return np.array([score_holds(gained, lost, scores.shape[1], margin) for gained, lost in counts])


def changed_scores(rng, shape, fell=0.035, rose=0.015):
    """Accuracy falls by 2 points; a sample in twenty changes its answer."""
    drawn = rng.random(shape)
    return np.where(drawn < fell, -1.0, np.where(drawn < fell + rose, 1.0, 0.0))


def test_trials_at_once_are_decided_as_one_by_one():
    draw, mean = POPULATIONS["10 % rises"]
    rng = np.random.default_rng(0)
    # a small true rise, so that some trials pass and others do not
    changes, scores = draw(rng, (40, 300)) - 0.85 * mean, changed_scores(rng, (40, 300), fell=0.02)
    passed = (upper_bounds(changes) < mean / 2) & scores_hold(scores, 0.02)
    singly = [
        verdict(change, score, loss_margin=mean / 2, score_margin=0.02).verdict in POSITIVE
        for change, score in zip(changes, scores, strict=True)
    ]
    assert 0 < sum(singly) < 40
    assert passed.tolist() == singly


@pytest.mark.parametrize("name", POPULATIONS)
def test_a_loss_at_its_margin_seldom_passes(name):
    assert false_claims(POPULATIONS[name], 200, TRIALS) <= 0.05 + noise(TRIALS)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("pairs", [500, 2000])
@pytest.mark.parametrize("name", POPULATIONS)
def test_a_loss_at_its_margin_seldom_passes_with_more_pairs(name, pairs):
    assert false_claims(POPULATIONS[name], pairs, TRIALS) <= 0.05 + noise(TRIALS)


def test_harm_that_the_split_hardly_holds_is_missed():
    """The limit that the intervals' documentation states: two expected rises among 200 pairs, twenty among 2000."""
    population = rare_rises(0.01)
    assert 0.15 < false_claims(population, 200, TRIALS) < 0.3
    assert false_claims(population, 2000, 400) <= 0.05 + noise(400)
    # the guard: with a score and its default margin 200 pairs never suffice, even if no answer changed
    assert not score_holds(0, 0, 200, 0.005)


def test_students_t_alone_would_pass_too_often():
    """Why the interval is wider than Student's: the same trials, decided by the textbook bound."""
    draw, mean = POPULATIONS["3 % rises"]
    changes = draw(np.random.default_rng(200), (TRIALS, 200))
    upper = changes.mean(1) + 1.653 * changes.std(1, ddof=1) / math.sqrt(200)
    assert (upper < mean).mean() > 0.12


@pytest.mark.parametrize("pairs", [200, 500, 2000])
def test_a_score_at_its_margin_seldom_passes(pairs):
    scores = changed_scores(np.random.default_rng(0), (TRIALS, pairs))
    assert scores_hold(scores, 0.02).mean() <= 0.05 + noise(TRIALS)


def test_a_model_at_one_margin_or_both_seldom_passes():
    draw, mean = POPULATIONS["confident"]
    rng = np.random.default_rng(1)
    scores, changes = changed_scores(rng, (TRIALS, 200)), draw(rng, (TRIALS, 200))
    loss_passes, score_passes = upper_bounds(changes) < mean, scores_hold(scores, 0.02)
    assert (loss_passes & score_passes).mean() <= 0.05
    # with a loss that is clearly better only the score can stop the model
    better = upper_bounds(changes - 10 * changes.std()) < 0
    assert better.all()
    assert (better & score_passes).mean() <= 0.05 + noise(TRIALS)


def test_better_is_seldom_said_of_an_equal_model():
    draw, mean = POPULATIONS["strong"]
    changes = draw(np.random.default_rng(2), (TRIALS, 200)) - mean
    assert (upper_bounds(changes) < 0).mean() <= 0.05 + noise(TRIALS)


def test_a_truly_equal_model_is_recognised():
    """Power: with enough samples the claim is made nearly always."""
    rng = np.random.default_rng(3)
    draw, mean = POPULATIONS["strong"]
    spread = draw(rng, 100_000).std()
    margin = 4 * spread / math.sqrt(2000)
    claims = upper_bounds(draw(rng, (200, 2000)) - mean) < margin
    assert claims.mean() >= 0.9


@pytest.mark.parametrize(
    ("mean", "spread", "expected"),
    [(-0.1, 0.1, "better"), (0.0, 0.1, "not worse"), (0.5, 0.1, "worse"), (0.0, 5.0, "inconclusive")],
)
def test_rules_for_the_loss(mean, spread, expected):
    x = np.random.default_rng(0).normal(size=400)
    x = (x - x.mean()) / x.std()
    assert verdict(mean + spread * x, loss_margin=0.05).verdict == expected


@pytest.mark.parametrize(
    ("rose", "fell", "expected"), [(30, 10, "better"), (10, 10, "better"), (0, 60, "worse"), (10, 20, "inconclusive")]
)
def test_a_better_loss_needs_a_score_that_holds(rose, fell, expected):
    score = np.zeros(1000)
    score[:rose], score[rose : rose + fell] = 1, -1
    certificate = verdict(np.random.default_rng(0).normal(-1, 0.1, size=1000), score, score_margin=0.015)
    assert certificate.verdict == expected
    assert certificate.score_change.method == "tango"
    assert certificate.score_change.mean == pytest.approx((rose - fell) / 1000)


def test_few_samples_are_inconclusive():
    change = np.random.default_rng(0).normal(0, 0.01, size=400)
    score = np.zeros(400)
    # without a single changed answer 400 samples still allow a fall by 0.75 points
    certificate = verdict(change, score)
    assert certificate.verdict == "inconclusive"
    assert certificate.samples_needed == pytest.approx(math.log(0.05) / math.log(1 - 0.005), abs=2)
    assert verdict(change[:1]).verdict == "inconclusive"
    assert verdict(change[:1]).samples_needed is None


def test_the_needed_samples_count_pairs_of_scores_as_what_they_are():
    """Four hundred samples with a loss each, and scores of their forty batches."""
    noise = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    change, batches = 0.02 * (noise - noise.mean()), torch.full((40,), 10.0, dtype=torch.float64)
    zeros = torch.zeros(400, dtype=torch.float64)
    certificate = certify(
        outcome(zeros + 1.0, zeros[:40], score_weights=batches),
        outcome(zeros + 1.0, change, score_weights=batches),
        Settings(score_margin=0.001),
    )
    assert certificate.verdict == "inconclusive"
    assert (certificate.loss_change.pairs, certificate.score_change.pairs) == (400, 40)
    width = certificate.score_change.mean - certificate.score_change.lower
    assert certificate.samples_needed == pytest.approx(400 * (width / 0.001) ** 2, rel=0.01)


@pytest.mark.parametrize("changed", [(0, 0), (4, 6), (2, 12)])
def test_the_needed_samples_decide_the_verdict(changed):
    rng = np.random.default_rng(0)
    rose, fell = changed

    def sample(copies):
        score = np.zeros(200 * copies)
        score[: rose * copies], score[rose * copies : (rose + fell) * copies] = 1, -1
        return np.tile(base, copies), score

    base = rng.normal(0, 0.2, size=200)
    base -= base.mean()
    first = verdict(*sample(1), loss_margin=0.01, score_margin=0.03)
    assert first.verdict == "inconclusive"
    enough = math.ceil(first.samples_needed / 200)
    assert verdict(*sample(enough), loss_margin=0.01, score_margin=0.03).verdict in (*POSITIVE, "worse")
    if enough > 2:
        assert verdict(*sample(enough // 2), loss_margin=0.01, score_margin=0.03).verdict == "inconclusive"


def test_one_harmful_quantity_settles_the_matter():
    """The loss is far from decided, but the score is nearly shown to have fallen too far: few samples suffice."""
    loss = np.random.default_rng(0).normal(0, 5, size=400)
    score = np.zeros(400)
    score[:16] = -1
    certificate = verdict(loss - loss.mean(), score, loss_margin=0.01, score_margin=0.03)
    assert certificate.verdict == "inconclusive"
    assert 400 < certificate.samples_needed < 4000


def test_margins_default_to_the_larger_of_two_percent_and_5_thousandths():
    assert default_loss_margin(1.0) == pytest.approx(0.02)
    assert default_loss_margin(0.1) == 0.005
    assert default_loss_margin(-1.0) == pytest.approx(0.02)
    assert verdict(np.zeros(10)).loss_margin == pytest.approx(0.02)
    assert verdict(np.zeros(10), loss_margin=0.3).loss_margin == 0.3


def test_nothing_compressed_is_unchanged():
    same = outcome([1.0, 2.0])
    assert certify(same, same, Settings(), unchanged=True).verdict == "unchanged"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_compressed_model_is_worse(bad):
    certificate = certify(outcome([1.0, 2.0]), outcome([1.0, bad]), Settings())
    assert certificate.verdict == "worse"
    assert certificate.samples_needed is None


def test_a_broken_original_is_an_error():
    with pytest.raises(ValueError, match="loss of the original model on verification is nan; it must be finite"):
        certify(outcome([1.0, math.nan]), outcome([1.0, 2.0]), Settings())


def test_figures_of_samples_are_compared_with_those_of_batches():
    """A macro accuracy may be the mean of the samples' answers for one of the models only."""
    sizes = torch.tensor([3.0, 1.0]).double()
    fine, coarse = (
        outcome([1.0, 2.0, 3.0, 4.0], [1, 0, 1, 1]),
        outcome([1.0, 2.0, 3.0, 4.0], [1.0, 0.5], score_weights=sizes),
    )
    for dense, compressed, sign in ((fine, coarse, 1), (coarse, fine, -1)):
        certificate = certify(dense, compressed, Settings())
        assert certificate.score_change.pairs == 2
        assert certificate.score_change.mean == pytest.approx(sign * (3 * (1 - 2 / 3) + (0.5 - 1)) / 4)
        assert certificate.loss_change.pairs == 4
    losses = Outcome(torch.tensor([2.0, 4.5]).double(), sizes)
    assert certify(fine, losses, Settings()).loss_change.mean == pytest.approx(0.5 / 4)
    with pytest.raises(ValueError, match="cannot be compared"):
        certify(fine, outcome([1.0] * 4, [0.5, 0.5], score_weights=sizes + 1), Settings())


def test_outcomes_must_pair_up():
    with pytest.raises(ValueError, match="figures for 3 pairs of samples or batches, the other for 2"):
        certify(outcome([1.0, 2.0]), outcome([1.0, 2.0, 3.0]), Settings())
    batches = dataclasses.replace(outcome([1.0, 2.0]), weights=torch.tensor([4.0, 2.0]).double())
    with pytest.raises(ValueError, match="same samples in the same order"):
        certify(outcome([1.0, 2.0]), batches, Settings())
