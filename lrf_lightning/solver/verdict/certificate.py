"""The verdict: is the compressed model not worse than the original, on samples that took no part in the choice?

As in non-inferiority trials the question is whether a one-sided confidence bound of the paired difference stays inside
a margin that was fixed beforehand. A small verification set gives ``inconclusive``, not a friendly verdict.
"""

from __future__ import annotations

import dataclasses
import math

from lrf_lightning.solver.result import Certificate, Interval, Verdict
from lrf_lightning.solver.running.evaluation import Outcome, loss_differences, score_differences
from lrf_lightning.solver.settings import Settings
from lrf_lightning.solver.verdict.intervals import mean_interval, paired_interval, tango_interval
from lrf_lightning.solver.verdict.temperature import scaled_losses

__all__ = ["certify"]


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
        ValueError: if the two outcomes do not pair up, or the original's loss is not finite.
    """
    losses, scores = loss_differences(compressed, dense), score_differences(compressed, dense)
    before, after = dense.measurement(), compressed.measurement()
    if not math.isfinite(before.loss):
        raise ValueError(f"the loss of the original model on verification is {before.loss}; it must be finite")
    loss_margin = settings.loss_margin_of(before.loss)
    loss_change = mean_interval(*losses, settings.confidence)
    score_change = None if scores is None else paired_interval(*scores, settings.confidence)
    verdict = _verdict(loss_change, score_change, loss_margin, settings.score_margin, unchanged)
    needed = None
    if verdict == "inconclusive":
        needed = _samples_needed(loss_change, score_change, loss_margin, settings, before.samples)
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
        **({} if temperatures is None else scaled_losses(dense, compressed, temperatures)),
    )


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
    """Samples at which the verdict would be reached if means and spreads stayed as they are, None if none would do."""
    rises = [(loss, loss_margin)]
    if score is not None:
        rises.append((_negated(score), settings.score_margin))
    harmful = [(rise, margin) for rise, margin in rises if rise.mean > margin]
    # one quantity beyond its margin settles the matter, otherwise all must be inside theirs
    needed = [
        _pairs_needed(rise, margin, settings.confidence) * samples / rise.pairs for rise, margin in harmful or rises
    ]
    found = min(needed) if harmful else max(needed)
    return math.ceil(found) if math.isfinite(found) else None


def _pairs_needed(rise: Interval, margin: float, confidence: float) -> float:
    """Pairs at which the bound of a rise leaves the margin on the side where its mean is."""
    gap = abs(margin - rise.mean)
    inside = rise.mean < margin
    width = rise.upper - rise.mean if inside else rise.mean - rise.lower
    if gap == 0 or not math.isfinite(width):
        return math.inf
    few, many = 0.0, max(rise.pairs * (width / gap) ** 2, 2.0)
    if rise.method != "tango":
        return many
    # with few changes Tango's width falls faster than with the root of the pairs
    total = rise.standard_error**2 * rise.pairs + rise.mean**2  # share of the pairs that changed
    up, down = max(total + rise.mean, 0.0) / 2, max(total - rise.mean, 0.0) / 2
    for _ in range(30):
        pairs = (few + many) / 2
        trial = tango_interval(up * pairs, down * pairs, pairs, confidence)
        outside = (trial.upper - trial.mean if inside else trial.mean - trial.lower) >= gap
        few, many = (pairs, many) if outside else (few, pairs)
    return many


def _negated(interval: Interval) -> Interval:
    return dataclasses.replace(interval, mean=-interval.mean, lower=-interval.upper, upper=-interval.lower)
