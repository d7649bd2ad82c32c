"""Which of the measured points are worth a look: the Pareto front, its knee, and how far down the verdicts hold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from lrf_lightning.solver.result import FrontierPoint, Measurement

__all__ = ["HOLDS", "holding", "knee", "marked", "original_on_front", "pareto_front"]

HOLDS = ("better", "not worse")


def marked(
    points: Sequence[FrontierPoint], dense: Measurement, dense_params: int, chosen: FrontierPoint | None
) -> list[FrontierPoint]:
    """The points, with the front, its knee and the chosen one marked.

    Args:
        points: measured points.
        dense: the original on the same split.
        dense_params: parameters of the original.
        chosen: one of the points, or None.
    """
    front = pareto_front(points, dense, dense_params)
    bend = knee(front)
    return [
        dataclasses.replace(
            point,
            chosen=point is chosen,
            pareto=any(point is other for other in front),
            knee=point is bend,
        )
        for point in points
    ]


def pareto_front(points: Sequence[FrontierPoint], dense: Measurement, dense_params: int) -> list[FrontierPoint]:
    """The points that no other model, the original included, beats: as good in cost, loss and score, better in one.

    The cost is the one that the budgets are counted in; a model with more parameters than the original is never on
    the front.
    """
    finite = _eligible(points, dense_params)
    models = [(1.0, dense.loss, dense.score), *map(_figures, finite)]
    return [point for point in finite if not any(_beats(other, _figures(point)) for other in models)]


def original_on_front(points: Sequence[FrontierPoint], dense: Measurement, dense_params: int) -> bool:
    """Whether no point that could be on the front beats the original, so that it is the large end of the front."""
    original = (1.0, dense.loss, dense.score)
    return not any(_beats(_figures(point), original) for point in _eligible(points, dense_params))


def knee(front: Sequence[FrontierPoint]) -> FrontierPoint | None:
    """The point of the front that lies farthest below the straight line from the original to the smallest point.

    Cost and loss are scaled to the range from 0 to 1 first (Satopaa et al. 2011, Finding a "kneedle" in a haystack).
    So it depends on how far down the budgets go. None if no point lies below the line.
    """
    points = sorted(front, key=lambda point: -point.keep)
    if len(points) < 2:
        return None
    last = points[-1]
    saved, rise = 1.0 - last.keep, last.loss_change
    if saved <= 0 or rise <= 0:
        return None  # the smallest is the best: nothing bends
    gains = [(1.0 - point.keep) / saved - point.loss_change / rise for point in points]
    best = max(range(len(points)), key=lambda index: gains[index])
    return points[best] if gains[best] > 0 else None


def holding(points: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    """The points, from the largest down, whose verdicts are all favourable up to the first that is not.

    Testing in an order that was fixed beforehand and stopping at the first failure keeps the confidence of one verdict
    for all of them together (Maurer, Hothorn and Lehmacher 1995, fixed-sequence testing).
    """
    found = []
    for point in sorted(points, key=lambda point: -point.keep):
        if point.certificate is None or point.certificate.verdict not in HOLDS:
            break
        found.append(point)
    return found


def _eligible(points: Sequence[FrontierPoint], dense_params: int) -> list[FrontierPoint]:
    return [point for point in points if math.isfinite(point.loss) and point.params_model <= dense_params]


def _figures(point: FrontierPoint) -> tuple[float, float, float | None]:
    return point.keep, point.loss, point.score


def _beats(one: tuple[float, float, float | None], other: tuple[float, float, float | None]) -> bool:
    pairs = [(one[0], other[0]), (one[1], other[1])]
    if one[2] is not None and other[2] is not None:
        pairs.append((-one[2], -other[2]))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)
