"""Measured points between the dense model and a tiny one, and the choice among them.

Every point is an allocation for a share of the cost, built with compensation and measured on the selection split. What
is chosen is judged later, on the verification split.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lrf_lightning.solver.allocation import Option, allocate, cheapest
from lrf_lightning.solver.compensation import build
from lrf_lightning.solver.evaluation import Outcome, evaluate
from lrf_lightning.solver.result import FrontierPoint
from lrf_lightning.solver.workspace import Workspace

__all__ = ["Frontier", "choose_compact", "choose_lossless"]

LARGEST_SHARE, SMALLEST_SHARE = 0.9, 0.1


@dataclass(frozen=True)
class _Measured:
    point: FrontierPoint
    outcome: Outcome


class Frontier:
    """Measures allocations on request and remembers them.

    Args:
        work: the workspace, with curves.
        dense: losses of the dense model on the selection split.
    """

    def __init__(self, work: Workspace, dense: Outcome) -> None:
        self.work, self.dense = work, dense
        self.measured: dict[tuple[tuple[str, int], ...], _Measured] = {}
        self._allowed = _options(work, only_allowed=True)
        self._all = _options(work, only_allowed=False)

    @property
    def points(self) -> list[FrontierPoint]:
        """All measured points, from the largest to the smallest."""
        return sorted((m.point for m in self.measured.values()), key=lambda point: -point.keep)

    def outcome(self, point: FrontierPoint) -> Outcome:
        """Losses of a measured point on the selection split."""
        return self.measured[_key(point.ranks)].outcome

    def at(self, keep: float) -> FrontierPoint:
        """The measured point of the best allocation for a share of the dense cost.

        Ranks outside the perturbation range are taken only if the budget cannot be met inside it.

        Raises:
            ValueError: if even rank 1 everywhere costs more.
        """
        budget = keep * self.work.dense_cost
        within = cheapest(self._allowed) <= budget
        lowest = cheapest(self._all) / self.work.dense_cost
        if not within and cheapest(self._all) > budget:
            raise ValueError(
                f"keep={keep:g} cannot be reached: rank 1 in every layer keeps {lowest:.4f} of the "
                f"{self.work.settings.cost} of the {len(self.work.layers)} factorizable layers; "
                f"use keep >= {math.ceil(lowest * 1e4) / 1e4:g}"
            )
        return self.with_ranks(allocate(self._allowed if within else self._all, budget).ranks)

    def with_ranks(self, ranks: Mapping[str, int]) -> FrontierPoint:
        """The measured point with the given ranks."""
        key = _key(ranks)
        if key not in self.measured:
            compressed = self.build(ranks)
            outcome = evaluate(
                compressed, self.work.loss, self.work.selection, self.work.device, split="selection", keep_logits=True
            )
            self.measured[key] = _Measured(self._point(ranks, compressed, outcome), outcome)
        return self.measured[key].point

    def build(self, ranks: Mapping[str, int]) -> nn.Module:
        """A compensated copy of the dense model with the given ranks."""
        work, settings = self.work, self.work.settings
        with work.stage("compensation", 0) as advance:
            return build(
                work.model,
                work.layers,
                ranks,
                metric=settings.metric,
                damping=settings.damping,
                passes=settings.compensation_passes,
                loss=work.loss,
                batches=work.calibration,
                device=work.device,
                sampler=work.sampler,
                advance=advance,
            )

    def walk(self) -> list[FrontierPoint]:
        """Measure ``settings.points`` shares from 0.9 to 0.1 of the cost, equally spaced on a logarithmic scale."""
        work = self.work
        lowest = cheapest(self._all) / work.dense_cost
        last = max(SMALLEST_SHARE, min(lowest * 1.01, LARGEST_SHARE))
        count = work.settings.points
        with work.stage("frontier", count) as advance:
            for i in range(count):
                self.at(LARGEST_SHARE * (last / LARGEST_SHARE) ** (i / (count - 1)))
                advance()
        return self.points

    def refine(self, chosen: FrontierPoint, accept: Callable[[FrontierPoint], bool]) -> FrontierPoint:
        """Bisect between a point and the next smaller one for a smaller point that is accepted."""
        smaller = [point.keep for point in self.points if point.keep < chosen.keep]
        low = max(smaller, default=None)
        for _ in range(self.work.settings.refinements if low is not None else 0):
            assert low is not None
            trial = self.at(math.sqrt(low * chosen.keep))
            if not low < trial.keep < chosen.keep:
                break
            if accept(trial):
                chosen = trial
            else:
                low = trial.keep
        return chosen

    def _point(self, ranks: Mapping[str, int], compressed: nn.Module, outcome: Outcome) -> FrontierPoint:
        work = self.work
        layers = work.layers.items()
        measured, dense = outcome.measurement(), self.dense.measurement()
        loss_error = _paired_error(outcome.losses - self.dense.losses, outcome.weights)
        score_change, score_error = None, None
        if outcome.scores is not None and self.dense.scores is not None:
            score_change = float(((outcome.scores - self.dense.scores) * outcome.weights).sum() / outcome.weights.sum())
            score_error = _paired_error(outcome.scores - self.dense.scores, outcome.weights)
        predictions = [(work.curves[name], rank - 1) for name, rank in ranks.items()]
        return FrontierPoint(
            keep=sum(work.cost(layer, ranks.get(name)) for name, layer in layers) / work.dense_cost,
            ranks=dict(ranks),
            params_model=sum(parameter.numel() for parameter in compressed.parameters()),
            params_layers=sum(
                layer.candidate.low_rank_params(ranks[name]) if name in ranks else layer.candidate.dense_params
                for name, layer in layers
            ),
            flops_layers=sum(layer.flops(ranks.get(name)) for name, layer in layers),
            predicted=sum(float(curve.change[i]) for curve, i in predictions),
            predicted_error=math.sqrt(sum(float(curve.prediction.standard_error[i]) ** 2 for curve, i in predictions)),
            loss=measured.loss,
            loss_change=measured.loss - dense.loss,
            loss_change_error=loss_error,
            score=measured.score,
            score_change=score_change,
            score_change_error=score_error,
            within_range=all(bool(curve.allowed[i]) for curve, i in predictions),
        )


def choose_compact(frontier: Frontier, dense_params: int) -> FrontierPoint | None:
    """The smallest point whose loss and score are within the tolerances, None if there is none."""

    def accept(point: FrontierPoint) -> bool:
        return _qualifies(frontier, point, dense_params)

    qualified = [point for point in frontier.walk() if accept(point)]
    return frontier.refine(qualified[-1], accept) if qualified else None


def choose_lossless(frontier: Frontier, dense_params: int) -> FrontierPoint | None:
    """The point with the lowest loss among those within the tolerances; among ties the smallest.

    A tie is a point whose loss is not above the lowest by more than ``ties`` paired standard errors, the
    one-standard-error rule (Breiman et al. 1984) for paired data.
    """
    qualified = [point for point in frontier.walk() if _qualifies(frontier, point, dense_params)]
    if not qualified:
        return None
    best = min(qualified, key=lambda point: point.loss)

    def accept(point: FrontierPoint) -> bool:
        return _qualifies(frontier, point, dense_params) and _ties(frontier, point, best)

    return frontier.refine([point for point in qualified if accept(point)][-1], accept)


def mark_chosen(points: list[FrontierPoint], chosen: FrontierPoint | None) -> list[FrontierPoint]:
    """The points, with the chosen one marked."""
    return [dataclasses.replace(point, chosen=point is chosen) for point in points]


def _qualifies(frontier: Frontier, point: FrontierPoint, dense_params: int) -> bool:
    settings = frontier.work.settings
    score_holds = point.score_change is None or point.score_change >= -settings.score_tolerance - 1e-12
    return (
        bool(point.ranks)
        and point.params_model < dense_params
        and math.isfinite(point.loss_change)
        and point.loss_change <= settings.tolerance + 1e-12
        and score_holds
    )


def _ties(frontier: Frontier, point: FrontierPoint, best: FrontierPoint) -> bool:
    a, b = frontier.outcome(point), frontier.outcome(best)
    error = _paired_error(a.losses - b.losses, a.weights)
    return point.loss - best.loss <= frontier.work.settings.ties * error


def _paired_error(differences: Tensor, weights: Tensor) -> float:
    """Standard error of the weighted mean of paired differences, infinite for a single pair."""
    pairs = len(differences)
    if pairs < 2:
        return math.inf
    share = weights / weights.sum()
    mean = (share * differences).sum()
    return math.sqrt(float((share.square() * (differences - mean).square()).sum()) * pairs / (pairs - 1))


def _options(work: Workspace, *, only_allowed: bool) -> dict[str, list[Option]]:
    """Every layer's choices: dense, and the ranks on the grid of ``rank_multiple``."""
    options: dict[str, list[Option]] = {}
    for name, layer in work.layers.items():
        curve, multiple = work.curves[name], work.settings.rank_multiple
        count = len(curve.change)
        grid = range(multiple, count + 1, multiple) if count >= multiple else range(1, count + 1)
        choices = [Option(None, work.cost(layer, None), 0.0)]
        choices += [
            Option(rank, work.cost(layer, rank), float(curve.change[rank - 1]))
            for rank in grid
            if not only_allowed or bool(curve.allowed[rank - 1])
        ]
        options[name] = choices
    return options


def _key(ranks: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(ranks.items()))
