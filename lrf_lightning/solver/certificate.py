"""The verdict: is the compressed model not worse than the original, on samples that took no part in the choice?

As in non-inferiority trials the question is whether a one-sided confidence bound of the paired difference stays inside
a margin that was fixed beforehand. A small verification set gives ``inconclusive``, not a friendly verdict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor
from torch.nn import functional as F

from lrf_lightning.solver.evaluation import Outcome
from lrf_lightning.solver.intervals import paired_interval
from lrf_lightning.solver.result import Certificate, Interval, Verdict
from lrf_lightning.solver.settings import Settings

__all__ = ["certify", "default_loss_margin", "fit_temperature"]


def certify(
    dense: Outcome,
    compressed: Outcome,
    settings: Settings,
    *,
    temperatures: tuple[float, float] | None = None,
    unchanged: bool = False,
) -> Certificate:
    """Compare two models on the same samples of the verification split.

    Args:
        dense: losses and scores of the original.
        compressed: those of the compressed model on the same samples in the same order.
        settings: margins and confidence.
        temperatures: best temperatures of the two models, fitted on other data, for classifiers.
        unchanged: whether nothing was compressed.

    Raises:
        ValueError: if the two outcomes do not pair up.
    """
    if dense.losses.shape != compressed.losses.shape or not torch.equal(dense.weights, compressed.weights):
        raise ValueError(
            f"verification gave {len(dense.losses)} pairs for the original and {len(compressed.losses)} for the "
            "compressed model; the loader must yield the same samples in the same order at every iteration"
        )
    before, after = dense.measurement(), compressed.measurement()
    loss_margin = default_loss_margin(before.loss) if settings.loss_margin is None else settings.loss_margin
    loss_change = paired_interval(compressed.losses - dense.losses, dense.weights, settings.confidence)
    score_change = None
    if dense.scores is not None and compressed.scores is not None:
        score_change = paired_interval(compressed.scores - dense.scores, dense.weights, settings.confidence)
    verdict = _verdict(loss_change, score_change, loss_margin, settings.score_margin, unchanged)
    needed = None
    if verdict == "inconclusive":
        needed = _samples_needed(loss_change, score_change, loss_margin, settings, before.samples)
    scaled = (
        (None, None)
        if temperatures is None
        else (
            _scaled_loss(dense, temperatures[0]),
            _scaled_loss(compressed, temperatures[1]),
        )
    )
    return Certificate(
        verdict=verdict,
        dense=before,
        compressed=after,
        loss_change=loss_change,
        score_change=score_change,
        loss_margin=loss_margin,
        score_margin=settings.score_margin,
        confidence=settings.confidence,
        samples_needed=needed,
        scaled_dense_loss=scaled[0],
        temperature=None if temperatures is None or scaled[0] is None else temperatures[0],
        scaled_compressed_loss=scaled[1],
    )


def default_loss_margin(dense_loss: float) -> float:
    """The larger of 2 % of the original's loss and 0.005."""
    return max(0.02 * abs(dense_loss), 0.005)


def fit_temperature(outcome: Outcome) -> float | None:
    """The temperature that minimises the cross-entropy of logits / temperature, None without logits.

    Golden-section search over the logarithm, between 1/20 and 20 (Guo et al. 2017, On calibration of modern neural
    networks, for the idea).
    """
    if outcome.logits is None or outcome.target is None:
        return None
    low, high, ratio = math.log(1 / 20), math.log(20), (math.sqrt(5) - 1) / 2
    for _ in range(40):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        if _cross_entropy(outcome.logits, outcome.target, a) < _cross_entropy(outcome.logits, outcome.target, b):
            high = b
        else:
            low = a
    return math.exp((low + high) / 2)


def _cross_entropy(logits: Tensor, target: Tensor, log_temperature: float) -> float:
    return float(F.cross_entropy(logits.double() / math.exp(log_temperature), target))


def _scaled_loss(outcome: Outcome, temperature: float) -> float | None:
    if outcome.logits is None or outcome.target is None:
        return None
    return _cross_entropy(outcome.logits, outcome.target, math.log(temperature))


def _verdict(
    loss: Interval, score: Interval | None, loss_margin: float, score_margin: float, unchanged: bool
) -> Verdict:
    """Loss bounds count upwards, score bounds downwards."""
    if unchanged:
        return "unchanged"
    if not math.isfinite(loss.mean) or loss.lower > loss_margin or (score is not None and score.upper < -score_margin):
        return "worse"
    score_holds = score is None or score.lower > -score_margin
    if loss.upper < 0 and score_holds:
        return "better"
    if loss.upper < loss_margin and score_holds:
        return "not worse"
    return "inconclusive"


def _samples_needed(
    loss: Interval, score: Interval | None, loss_margin: float, settings: Settings, samples: int
) -> int | None:
    """Samples at which the undecided bounds would leave their margins if means and spreads stayed as they are."""
    quantile = NormalDist().inv_cdf(settings.confidence)
    rises: Sequence[tuple[Interval, float, float]] = [(loss, loss.mean, loss_margin)]
    if score is not None:
        rises = [*rises, (score, -score.mean, settings.score_margin)]
    needed = 0.0
    for interval, rise, margin in rises:
        bound = interval.upper if interval is loss else -interval.lower
        if bound < margin:
            continue
        gap = abs(margin - rise)
        # a score interval without any change still has the width of about quantile^2 / n
        deviation = max(interval.standard_error * math.sqrt(interval.pairs), 0.0)
        pairs = max((quantile * deviation / gap) ** 2, quantile**2 / gap) if gap > 0 else math.inf
        needed = max(needed, pairs * samples / interval.pairs)
    return math.ceil(needed) if math.isfinite(needed) and needed > 0 else None
