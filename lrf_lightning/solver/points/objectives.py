"""Which model every objective picks."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from lrf_lightning.copies.model_copy import copied_model
from lrf_lightning.solver.layers.layer_statistics import LayerStatistics
from lrf_lightning.solver.model_size import parameter_count
from lrf_lightning.solver.points.acceptance import choose_compact, choose_lossless
from lrf_lightning.solver.points.budgets import measure_budgets
from lrf_lightning.solver.points.frontier import Frontier
from lrf_lightning.solver.points.layer_results import layer_results
from lrf_lightning.solver.points.pareto import marked
from lrf_lightning.solver.points.point_models import PointModels
from lrf_lightning.solver.ranks.paper import greedy_rank
from lrf_lightning.solver.result import FrontierPoint
from lrf_lightning.solver.running.evaluation import Outcome
from lrf_lightning.solver.workspace import Workspace

__all__ = ["Choice", "choose"]


@dataclass(frozen=True)
class Choice:
    """The compressed model, its losses on the selection split, a sentence, and the points if any were measured."""

    model: nn.Module
    outcome: Outcome
    message: str
    point: FrontierPoint | None = None
    points: list[FrontierPoint] = field(default_factory=list)
    models: PointModels | None = None


def choose(work: Workspace, dense: Outcome) -> Choice:
    """Measure what the objective asks for and choose among it.

    Args:
        work: knows the curves of all layers.
        dense: losses of the original on the selection split.
    """
    settings, frontier = work.settings, Frontier(work, dense)
    dense_params = parameter_count(work.model)
    chosen: FrontierPoint | None
    if settings.cost == "latency" and settings.objective != "paper" and frontier.lowest >= 1:
        message = f"At no rank is any layer measurably faster than the dense one on {work.device}."
        return Choice(copied_model(work.model), dense, message)
    if settings.objective == "frontier":
        return _choose_budgets(frontier)
    if settings.objective == "paper":
        chosen, message = _choose_paper(frontier)
    elif settings.objective == "budget":
        chosen = frontier.at(settings.keep)
        message = f"Best allocation with {settings.keep:g} of the factorizable layers' {settings.cost}."
    elif settings.objective == "compact":
        chosen = choose_compact(frontier, dense_params)
        message = "Smallest measured model whose loss and score are as good as the original's on the selection split."
    else:
        chosen = choose_lossless(frontier, dense_params)
        message = "Smallest measured model whose loss ties with the lowest one on the selection split."
    if chosen is not None and not chosen.ranks:
        chosen, message = None, "Every layer is best left dense within this budget."
    elif chosen is None and settings.objective != "paper":
        message = (
            "No smaller model kept its loss and score within the noise and the tolerances on the selection split "
            f"(tolerance={settings.tolerance:g}, score_tolerance={settings.score_tolerance:g})."
        )
    points = marked(frontier.points, dense.measurement(), dense_params, chosen)
    if chosen is None:
        return Choice(copied_model(work.model), dense, message, None, points)
    point = next(point for point in points if point.chosen)
    message += frontier.note(chosen)
    model = copied_model(frontier.build(chosen.ranks))  # shares nothing with the dense model that a step may write to
    return Choice(model, frontier.outcome(chosen), message, point, points)


def _choose_budgets(frontier: Frontier) -> Choice:
    """All budgets, of which the smallest that is as good as the original is chosen."""
    work, models = frontier.work, PointModels(frontier.work.model)

    def keep(point: FrontierPoint, model: nn.Module) -> None:
        models.keep(point.ranks, model, layer_results(work, point.ranks))

    points, note = measure_budgets(frontier, keep)
    chosen = next((point for point in points if point.chosen), None)
    if chosen is None:
        message = f"No budget kept loss and score within the noise on the selection split.{note}"
        return Choice(copied_model(work.model), frontier.dense, message, None, points, models)
    message = f"Smallest budget whose loss and score are as good as the original's on the selection split.{note}"
    message += frontier.note(chosen)
    return Choice(models.build(chosen.ranks), frontier.outcome(chosen), message, chosen, points, models)


def _choose_paper(frontier: Frontier) -> tuple[FrontierPoint | None, str]:
    settings = frontier.work.settings
    ranks: dict[str, int] = {}
    for name, curve in frontier.work.curves.items():
        gamma = settings.gamma
        if settings.gamma_kind == "mean_square":
            gamma /= _mean_square(frontier.work.layers[name])
        rank = greedy_rank(curve.prediction.first_order, curve.prediction.perturbation, gamma, settings.variant)
        if rank is not None:
            ranks[name] = rank
    if not ranks:
        return None, f"No layer has a rank with a falling first-order loss within gamma={settings.gamma:g}."
    return frontier.with_ranks(ranks), f"Ranks of the published greedy algorithm ({settings.variant})."


def _mean_square(layer: LayerStatistics) -> float:
    """Mean squared entry of the weight, 1 for a zero weight."""
    return float(layer.candidate.module.get_parameter("weight").detach().double().square().mean()) or 1.0
