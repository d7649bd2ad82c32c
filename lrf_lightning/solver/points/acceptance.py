"""The choice among measured points, on the selection split; what is chosen is judged on the verification split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

from lrf_lightning.solver.points.frontier import Frontier
from lrf_lightning.solver.result import FrontierPoint
from lrf_lightning.solver.running.evaluation import Outcome, loss_differences
from lrf_lightning.solver.settings import Settings
from lrf_lightning.solver.verdict.intervals import paired_error

__all__ = ["choose_among", "choose_compact", "choose_lossless"]


def choose_compact(frontier: Frontier, dense_params: int) -> FrontierPoint | None:
    """The smallest point that is not worse than the dense model on the selection split, None if there is none."""

    def accept(point: FrontierPoint) -> bool:
        return _qualifies(frontier, point, dense_params)

    qualified = [point for point in frontier.walk() if accept(point)]
    return frontier.refine(qualified[-1] if qualified else None, accept)


def choose_lossless(frontier: Frontier, dense_params: int) -> FrontierPoint | None:
    """The smallest point that ties with the lowest loss of all, the dense model included; None if there is none.

    This is the one-standard-error rule (Breiman et al. 1984) for paired data.
    """
    points = [point for point in frontier.walk() if math.isfinite(point.loss)]
    best = min(points, key=lambda point: point.loss, default=None)
    dense_wins = best is None or best.loss >= frontier.dense.measurement().loss
    reference = frontier.dense if best is None or dense_wins else frontier.outcome(best)

    def accept(point: FrontierPoint) -> bool:
        return _qualifies(frontier, point, dense_params, reference)

    qualified = [point for point in points if accept(point)]
    return frontier.refine(qualified[-1] if qualified else None, accept)


def choose_among(frontier: Frontier, points: Sequence[FrontierPoint], dense_params: int) -> FrontierPoint | None:
    """The smallest of the points that :func:`choose_compact` would accept, None if there is none."""
    qualified = [point for point in points if _qualifies(frontier, point, dense_params)]
    return min(qualified, key=lambda point: point.keep, default=None)


def _qualifies(frontier: Frontier, point: FrontierPoint, dense_params: int, reference: Outcome | None = None) -> bool:
    """Whether a point is smaller than the dense model and ties with it, or with another reference if one is given.

    The loss may exceed the reference's, and the score may fall below the dense model's, by the tolerance and the noise:
    ``ties`` paired standard errors, but never more than half the margin of the verdict, so that a small selection split
    does not admit a bad model. Without another reference a change for the worse counts as a tie as well if its
    confidence bound is inside half the margin; the other half is for the difference between the splits.
    """
    inside_margin, reference = reference is None, reference or frontier.dense
    settings = frontier.work.settings
    if not point.ranks or point.params_model >= dense_params or not math.isfinite(point.loss_change):
        return False
    outcome, margin = frontier.outcome(point), settings.loss_margin_of(frontier.dense.measurement().loss)
    # the reference was found by looking for the lowest loss: its distance to the dense model is uncertain as well
    doubt = paired_error(*loss_differences(reference, frontier.dense))
    error = max(paired_error(*loss_differences(outcome, reference)), doubt)
    room = _room(settings, error, margin, inside_margin=inside_margin)
    if point.loss - reference.measurement().loss > settings.tolerance + room:
        return False
    if point.score_change is None or point.score_change_error is None:
        return True
    room = _room(settings, point.score_change_error, settings.score_margin, inside_margin=inside_margin)
    return point.score_change >= -settings.score_tolerance - room - 1e-12


def _room(settings: Settings, error: float, margin: float, *, inside_margin: bool) -> float:
    """How far a figure may be off on the wrong side, given its standard error and the margin of the verdict."""
    noise = min(settings.ties * error, margin / 2) if settings.ties else 0.0  # one pair has an infinite error
    certain = margin / 2 - NormalDist().inv_cdf(settings.confidence) * error if inside_margin and settings.ties else 0.0
    return max(noise, certain)
