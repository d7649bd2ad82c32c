"""Measured points between the dense model and a tiny one, and the choice among them.

Every point is an allocation for a share of the cost, built with compensation and measured on the selection split. What
is chosen is judged later, on the verification split.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lrf_lightning.solver.allocation import Option, allocate, cheapest
from lrf_lightning.solver.certificate import default_loss_margin
from lrf_lightning.solver.compensation import fit_layers
from lrf_lightning.solver.evaluation import Outcome
from lrf_lightning.solver.result import FrontierPoint
from lrf_lightning.solver.statistics import memory_groups
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
        self._latest: tuple[tuple[tuple[str, int], ...], nn.Module] | None = None
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
            self._latest = key, compressed
            outcome = self.work.evaluate(compressed, "selection", keep_logits=True)
            self.measured[key] = _Measured(self._point(ranks, compressed, outcome), outcome)
        return self.measured[key].point

    def build(self, ranks: Mapping[str, int]) -> nn.Module:
        """A compensated copy of the dense model with the given ranks; the latest one is not made anew."""
        if self._latest is not None and self._latest[0] == _key(ranks):
            return self._latest[1]
        work, settings = self.work, self.work.settings
        compressed = copy.deepcopy(work.model)
        chosen = {name: layer for name, layer in work.layers.items() if name in ranks}
        by_candidate = {id(layer.candidate): name for name, layer in chosen.items()}
        with work.stage("compensation", len(chosen)) as advance:
            for group in memory_groups((layer.candidate for layer in chosen.values()), work.memory):
                layers = {by_candidate[id(candidate)]: chosen[by_candidate[id(candidate)]] for candidate in group}
                if not work.keeps_gradients:
                    layers = work.statistics(group)
                fit_layers(
                    work.model,
                    compressed,
                    layers,
                    ranks,
                    metric=settings.metric,
                    damping=settings.damping,
                    compensation=settings.compensation,
                    loss=work.loss,
                    batches=work.compensation_batches(),
                    device=work.device,
                    sampler=work.sampler,
                    processes=work.processes,
                    owners=work.owners(layers),
                    advance=advance,
                )
        return compressed

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
    """The smallest point that is not distinguishably worse than the dense model, None if there is none."""

    def accept(point: FrontierPoint) -> bool:
        return _qualifies(frontier, point, dense_params, frontier.dense)

    qualified = [point for point in frontier.walk() if accept(point)]
    return frontier.refine(qualified[-1], accept) if qualified else None


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
    return frontier.refine(qualified[-1], accept) if qualified else None


def mark_chosen(points: list[FrontierPoint], chosen: FrontierPoint | None) -> list[FrontierPoint]:
    """The points, with the chosen one marked."""
    return [dataclasses.replace(point, chosen=point is chosen) for point in points]


def _qualifies(frontier: Frontier, point: FrontierPoint, dense_params: int, reference: Outcome) -> bool:
    """Whether a point is smaller than the dense model and ties with a reference, the dense model or the best point.

    The loss may exceed the reference's, and the score may fall below the dense model's, by the tolerance and the noise:
    ``ties`` paired standard errors, but never more than half the margin of the verdict, so that a small selection split
    does not admit a bad model.
    """
    settings = frontier.work.settings
    if not point.ranks or point.params_model >= dense_params or not math.isfinite(point.loss_change):
        return False
    outcome = frontier.outcome(point)
    margin = settings.loss_margin
    if margin is None:
        margin = default_loss_margin(frontier.dense.measurement().loss)
    # the reference was found by looking for the lowest loss: its distance to the dense model is uncertain as well
    doubt = _paired_error(reference.losses - frontier.dense.losses, outcome.weights)
    noise = settings.ties * max(_paired_error(outcome.losses - reference.losses, outcome.weights), doubt)
    if point.loss - reference.measurement().loss > settings.tolerance + min(noise, margin / 2):
        return False
    if point.score_change is None or point.score_change_error is None:
        return True
    noise = settings.ties * point.score_change_error
    return point.score_change >= -settings.score_tolerance - min(noise, settings.score_margin / 2) - 1e-12


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
        curve, multiple = work.curves[name], work.rank_multiple
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
