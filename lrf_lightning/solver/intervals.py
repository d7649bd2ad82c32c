r"""One-sided confidence bounds for paired differences.

``student_interval``
    Mean and Student's t, for any real differences.
``tango_interval``
    Score interval for a difference of paired proportions (Tango 1998, Equivalence test and confidence interval for the
    difference in proportions for the paired-sample design). Differences are -1, 0 or 1, as for the accuracy of two
    classifiers. Unlike Student's it keeps a width when no sample changed at all: with n samples and no change the bound
    is about z^2 / (n + z^2).
"""

from __future__ import annotations

import math
from statistics import NormalDist

from torch import Tensor

from lrf_lightning.solver.result import Interval

__all__ = ["paired_interval", "student_interval", "student_quantile", "tango_interval"]


def paired_interval(
    differences: Tensor,  # (pairs,)
    weights: Tensor,  # (pairs,)
    confidence: float,
) -> Interval:
    """The interval that fits the differences: Tango's for -1, 0 and 1 with equal weights, else Student's."""
    ternary = bool(((differences == 0) | (differences.abs() == 1)).all()) and bool((weights == 1).all())
    if ternary:
        return tango_interval(int((differences > 0).sum()), int((differences < 0).sum()), len(differences), confidence)
    return student_interval(differences, weights, confidence)


def student_interval(
    differences: Tensor,  # (pairs,)
    weights: Tensor,  # (pairs,)
    confidence: float,
) -> Interval:
    """Weighted mean with Student's t bounds; infinitely wide for a single pair."""
    pairs = len(differences)
    share = weights / weights.sum()
    mean = float((share * differences).sum())
    if pairs < 2:
        return Interval(mean, math.inf, -math.inf, math.inf, pairs, "student")
    # the ratio estimator's variance; with equal weights that of the mean
    spread = float((share.square() * (differences - mean).square()).sum()) * pairs / (pairs - 1)
    error = math.sqrt(spread)
    width = student_quantile(confidence, pairs - 1) * error
    return Interval(mean, error, mean - width, mean + width, pairs, "student")


def tango_interval(gained: int, lost: int, pairs: int, confidence: float) -> Interval:
    """Tango's score interval for (gained - lost) / pairs.

    Args:
        gained: pairs with difference 1.
        lost: pairs with difference -1.
        pairs: all pairs.
        confidence: one-sided confidence of each bound.
    """
    mean = (gained - lost) / pairs
    error = math.sqrt(max(gained + lost - (gained - lost) ** 2 / pairs, 0.0)) / pairs
    quantile = NormalDist().inv_cdf(confidence)

    def score(delta: float) -> float:
        """Standardised distance of the observed difference from ``delta``, falling in ``delta``."""
        b = -gained - lost + (2 * pairs - gained + lost) * delta
        c = -lost * delta * (1 - delta)
        share = (math.sqrt(max(b * b - 8 * pairs * c, 0.0)) - b) / (4 * pairs)
        variance = pairs * (2 * share + delta * (1 - delta))
        distance = gained - lost - pairs * delta
        if variance <= 0:
            return 0.0 if distance == 0 else math.copysign(math.inf, distance)
        return distance / math.sqrt(variance)

    return Interval(mean, error, _root(score, mean, quantile, -1), _root(score, mean, quantile, 1), pairs, "tango")


def student_quantile(confidence: float, degrees: int) -> float:
    """Quantile of Student's t distribution by bisection of its closed-form distribution function.

    Args:
        confidence: probability in (0.5, 1).
        degrees: whole degrees of freedom, at least 1.
    """
    if degrees > 2000:  # the closed form sums that many terms, and differs from the normal by less than 0.1 %
        z = NormalDist().inv_cdf(confidence)
        return z + (z**3 + z) / (4 * degrees)
    low, high = 0.0, 1.0
    while _student_probability(high, degrees) < confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_probability(middle, degrees) < confidence else (low, middle)
    return (low + high) / 2


def _student_probability(t: float, degrees: int) -> float:
    """P(T <= t) for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = 0.0
    for i in range(1, degrees // 2 + 1):
        total += term
        term *= cosine * cosine * (2 * i / (2 * i + 1) if odd else (2 * i - 1) / (2 * i))
    central = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return 0.5 + central / 2


def _root(score: object, mean: float, quantile: float, side: int) -> float:
    """The difference on one side of ``mean`` whose score is ``quantile`` away, by bisection."""
    assert callable(score)
    near, far = mean, float(side)
    for _ in range(100):
        middle = (near + far) / 2
        near, far = (middle, far) if abs(score(middle)) < quantile else (near, middle)
    return (near + far) / 2
