"""Bounds against SciPy, Monte Carlo and direct numerical references, and their coverage."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import optimize, stats

from lrf_lightning.solver.verdict.intervals import (
    bootstrap_bound,
    largest_share,
    mean_interval,
    paired_error,
    paired_interval,
    student_quantile,
    tango_interval,
)


def ones(count):
    return torch.ones(count, dtype=torch.float64)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 30, 199, 1999, 2000])
@pytest.mark.parametrize("confidence", [0.51, 0.8, 0.95, 0.999])
def test_student_quantile_is_scipys(degrees, confidence):
    assert student_quantile(confidence, degrees) == pytest.approx(stats.t.ppf(confidence, degrees), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("degrees", [2001, 100_000])
def test_student_quantile_of_many_degrees_is_scipys(degrees):
    assert student_quantile(0.95, degrees) == pytest.approx(stats.t.ppf(0.95, degrees), rel=1e-6)


def test_mean_interval_is_at_least_as_wide_as_scipys_student():
    x = torch.randn(400, dtype=torch.float64)
    interval = mean_interval(x, ones(400), 0.95)
    low, high = stats.t.interval(0.9, 399, loc=x.mean().item(), scale=stats.sem(x.numpy()))
    assert interval.mean == pytest.approx(float(x.mean()))
    assert interval.standard_error == pytest.approx(stats.sem(x.numpy()))
    assert interval.lower <= low
    assert interval.upper >= high
    # for normal differences the price of the reserve is small
    assert interval.upper - interval.mean < 1.2 * (high - float(x.mean()))


@pytest.mark.parametrize("confidence", [0.6, 0.95, 0.99])
@pytest.mark.parametrize("size", [5, 100])
def test_bootstrap_bound_is_the_quantile_of_drawn_weights(size, confidence):
    rng = np.random.default_rng(0)
    x = rng.lognormal(0, 1, size=size)
    deviations = x - x.mean()
    effective = np.abs(deviations).sum() ** 2 / (deviations**2).sum()
    extended = np.append(deviations, deviations.max() * (1 + 20 / effective))
    weights = rng.exponential(size=(50_000, size + 1))
    drawn = np.quantile(weights @ extended / weights.sum(1), confidence)
    assert float(bootstrap_bound(torch.from_numpy(deviations), confidence)) == pytest.approx(drawn, rel=0.03)


def test_bootstrap_bounds_of_several_populations_at_once():
    x = torch.randn(3, 4, 30, dtype=torch.float64).exp()
    x[1, 2] = 7.0
    x = x - x.mean(-1, keepdim=True)
    together = bootstrap_bound(x, 0.95)
    assert together.shape == (3, 4)
    assert float(together[1, 2]) == 0.0
    torch.testing.assert_close(together[2, 1], bootstrap_bound(x[2, 1], 0.95))


def test_bounds_follow_the_unit_of_the_differences():
    x = torch.randn(50, dtype=torch.float64).exp()
    plain = mean_interval(x, ones(50), 0.95)
    for scale in (1e-20, 1e20):
        scaled = mean_interval(x * scale, ones(50), 0.95)
        assert scaled.upper == pytest.approx(plain.upper * scale)
        assert scaled.lower == pytest.approx(plain.lower * scale)
    mirrored = mean_interval(-x, ones(50), 0.95)
    assert (mirrored.lower, mirrored.upper) == pytest.approx((-plain.upper, -plain.lower))


def test_weights_count_like_repeated_means():
    # three batches of different size: the mean is that of all samples, the error that of means of so many
    x, weights = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64), torch.tensor([10.0, 10.0, 5.0]).double()
    interval = mean_interval(x, weights, 0.95)
    share = np.array([0.4, 0.4, 0.2])
    mean = float(share @ x.numpy())
    error = math.sqrt(float(share @ (x.numpy() - mean) ** 2) / 2)
    assert interval.mean == pytest.approx(mean)
    assert interval.standard_error == pytest.approx(error)
    assert interval.upper - mean >= stats.t.ppf(0.95, 2) * error - 1e-12
    assert paired_error(x, weights) == pytest.approx(error)
    # where small batches do not differ more than large ones, the ratio estimator's is larger
    weights = torch.tensor([10.0, 10.0, 10.0, 1.0]).double()
    share, x = weights.numpy() / 31, torch.tensor([1.0, 2.0, 4.0, 2.3]).double()
    squares = (x.numpy() - float(share @ x.numpy())) ** 2
    assert float(share**2 @ squares) * 4 / 3 > float(share @ squares) / 3
    assert paired_error(x, weights) == pytest.approx(math.sqrt(float(share**2 @ squares) * 4 / 3))
    equal = mean_interval(x, torch.full((4,), 7.0).double(), 0.95)
    assert equal.standard_error == pytest.approx(stats.sem(x.numpy()))


@pytest.mark.parametrize("sizes", [[64, 64], [64, 4], [256, 3], [128, 128, 2], [500, 1, 1, 1]])
def test_a_small_last_batch_does_not_narrow_the_bound(sizes):
    generator, weights = torch.Generator().manual_seed(0), torch.tensor(sizes, dtype=torch.float64)
    means = torch.randn(4000, len(sizes), generator=generator, dtype=torch.float64) / weights.sqrt()
    quantile = student_quantile(0.95, len(sizes) - 1)
    missed = sum(float((x * weights).sum()) / sum(sizes) + quantile * paired_error(x, weights) < 0 for x in means)
    assert missed / 4000 < 0.06


def test_a_single_pair_says_nothing():
    interval = mean_interval(torch.tensor([0.5], dtype=torch.float64), ones(1), 0.95)
    assert (interval.mean, interval.lower, interval.upper) == (0.5, -math.inf, math.inf)


def test_equal_differences_leave_no_width():
    interval = mean_interval(torch.full((5,), 0.25, dtype=torch.float64), ones(5), 0.95)
    assert (interval.lower, interval.upper) == pytest.approx((0.25, 0.25), rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_differences_that_are_not_finite_bound_nothing(bad):
    interval = mean_interval(torch.tensor([0.0, bad, 1.0], dtype=torch.float64), ones(3), 0.95)
    assert not math.isfinite(interval.mean)
    assert (interval.lower, interval.upper) == (-math.inf, math.inf)


@pytest.mark.parametrize("counts", [(0, 0, 100), (3, 0, 50), (0, 4, 40), (5, 9, 200), (30, 31, 100), (1, 0, 1)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_tango_bounds_solve_the_constrained_score_equation(counts, confidence):
    """At a bound the difference is just rejected: maximise the likelihood under it numerically, then standardise."""
    gained, lost, pairs = counts
    interval = tango_interval(gained, lost, pairs, confidence)
    z = stats.norm.ppf(confidence)
    for bound, (count, others) in ((interval.lower, (lost, gained)), (interval.upper, (gained, lost))):
        if abs(bound) > 1 - 1e-9:  # the end of the range is not rejected
            continue
        exact = stats.beta.ppf(confidence, count + 1, pairs - count)
        if others == 0 and abs(bound) == pytest.approx(exact):
            continue  # the exact bound is wider

        def likelihood(share_lost, bound=bound):
            share_gained = share_lost + bound
            rest = 1 - share_gained - share_lost
            counts = ((gained, share_gained), (lost, share_lost), (pairs - gained - lost, rest))
            return -sum(count * math.log(max(share, 1e-300)) for count, share in counts if count)

        best = optimize.minimize_scalar(
            likelihood, bounds=(max(0.0, -bound), (1 - bound) / 2), method="bounded", options={"xatol": 1e-12}
        ).x
        variance = pairs * (2 * best + bound - bound**2)
        assert abs(gained - lost - pairs * bound) / math.sqrt(variance) == pytest.approx(z, rel=2e-3)
    assert interval.lower <= interval.mean <= interval.upper


def test_tango_keeps_a_width_without_any_change():
    interval = tango_interval(0, 0, 300, 0.95)
    assert interval.upper == pytest.approx(1 - 0.05 ** (1 / 300), rel=1e-6)
    assert interval.lower == pytest.approx(-interval.upper)
    # nor where scores are known by batch only
    by_batch = paired_interval(torch.zeros(3, dtype=torch.float64), torch.tensor([128.0, 128.0, 44.0]), 0.95)
    assert (by_batch.lower, by_batch.upper) == (interval.lower, interval.upper)
    single = paired_interval(torch.zeros(1, dtype=torch.float64), torch.tensor([300.0]), 0.95)
    assert (single.lower, single.upper) == (-math.inf, math.inf), "gains may have cancelled losses"


@pytest.mark.parametrize("confidence", [0.6, 0.8, 0.95, 0.99])
@pytest.mark.parametrize(("count", "pairs"), [(0, 1), (0, 700), (3, 700), (40, 10_000), (699, 700)])
def test_the_largest_share_is_scipys(count, pairs, confidence):
    expected = stats.beta.ppf(confidence, count + 1, pairs - count)
    assert largest_share(count, pairs, confidence) == pytest.approx(expected, rel=1e-9)


def test_the_largest_share_of_fractions():
    assert largest_share(2.3, 100.7, 0.95) == largest_share(3, 100, 0.95)
    assert largest_share(5, 5, 0.95) == 1.0


@pytest.mark.parametrize("confidence", [0.8, 0.9, 0.95, 0.99])
def test_where_answers_can_only_be_lost_the_bound_is_exact(confidence):
    """A fall of exactly the margin passes no more often than it may, at any number of samples."""
    share = 0.005
    for pairs in range(100, 1500, 37):
        holds = itertools.takewhile(lambda k: tango_interval(0, k, pairs, confidence).lower > -share, range(pairs))  # noqa: B023 (used at once)
        assert stats.binom.cdf(len(list(holds)) - 1, pairs, share) <= 1 - confidence + 1e-9


def test_tango_covers_the_true_difference():
    """Exact coverage, by summing over all outcomes: close to 95 % at every difference."""
    pairs, share_lost = 60, 0.06
    for share_gained in (0.02, 0.05, 0.1):
        covered = 0.0
        for gained in range(30):
            for lost in range(30):
                weight = stats.multinomial.pmf(
                    [gained, lost, pairs - gained - lost],
                    pairs,
                    [share_gained, share_lost, 1 - share_gained - share_lost],
                )
                if weight > 1e-5:
                    covered += weight * (tango_interval(gained, lost, pairs, 0.95).upper >= share_gained - share_lost)
        assert 0.93 < covered < 0.985


def test_paired_interval_takes_tangos_for_changed_answers_only():
    answers = torch.tensor([0.0, 1.0, -1.0, 0.0], dtype=torch.float64)
    assert paired_interval(answers, ones(4), 0.95).method == "tango"
    assert paired_interval(answers, torch.full((4,), 2.0), 0.95).method == "mean"
    assert paired_interval(answers * 0.5, ones(4), 0.95).method == "mean"
