"""Many budgets from one calibration, each measured on the selection split and tested on the verification split.

The choice looks at the selection split only. Every verdict has its confidence by itself; all of them have it together
as far as :func:`lrf_lightning.solver.points.pareto.holding` goes.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable

from torch import nn

from lrf_lightning.solver.model_size import parameter_count
from lrf_lightning.solver.points.acceptance import choose_among
from lrf_lightning.solver.points.frontier import Frontier
from lrf_lightning.solver.points.pareto import marked
from lrf_lightning.solver.ranks.allocation import RanksKey, ranks_key
from lrf_lightning.solver.result import Certificate, FrontierPoint
from lrf_lightning.solver.running.evaluation import Outcome
from lrf_lightning.solver.verdict.certificate import certify
from lrf_lightning.solver.verdict.temperature import temperatures

__all__ = ["measure_budgets"]


def measure_budgets(
    frontier: Frontier, keep: Callable[[FrontierPoint, nn.Module], None]
) -> tuple[list[FrontierPoint], str]:
    """Measure and test the budgets of the settings.

    Args:
        frontier: for the workspace and the measurements.
        keep: called with every point and its model, which is not kept otherwise.

    Returns:
        The points from the largest to the smallest, marked, with their verdicts; and a note on budgets that were left
        out, empty if there are none.

    Raises:
        ValueError: if no budget can be reached.
    """
    work, certificates = frontier.work, dict[RanksKey, Certificate]()
    wanted = [share for share in work.settings.budgets if share >= frontier.lowest] or work.settings.budgets[:1]
    with work.stage("verification", 0):
        before = work.evaluate(work.model, "verification", keep_logits=True)

    def then(point: FrontierPoint, model: nn.Module) -> None:
        if point.ranks:
            keep(point, model)
            certificates[ranks_key(point.ranks)] = _verdict(frontier, point, model, before)

    found = frontier.measure_shares(wanted, then)
    # of budgets that lead to the same ranks the smallest is named
    budgets = {ranks_key(point.ranks): share for point, share in zip(found, wanted, strict=True)}
    points = [point for point in {ranks_key(point.ranks): point for point in found}.values() if point.ranks]
    dense_params = parameter_count(work.model)
    chosen = choose_among(frontier, points, dense_params)
    points = [
        dataclasses.replace(
            point, budget=budgets[ranks_key(point.ranks)], certificate=certificates[ranks_key(point.ranks)]
        )
        for point in marked(points, frontier.dense.measurement(), dense_params, chosen)
    ]
    return sorted(points, key=lambda point: -point.keep), _note(frontier)


def _verdict(frontier: Frontier, point: FrontierPoint, model: nn.Module, before: Outcome) -> Certificate:
    work = frontier.work
    with work.stage("verification", 0):
        after = work.evaluate(model, "verification", keep_logits=True)
    return certify(before, after, work.settings, temperatures=temperatures(frontier.dense, frontier.outcome(point)))


def _note(frontier: Frontier) -> str:
    settings = frontier.work.settings
    missed = [f"{share:g}" for share in settings.budgets if share < frontier.lowest]
    if not missed:
        return ""
    note = (
        f"Budgets below {frontier.lowest:.4f} of the {settings.cost} cannot be reached by any ranks; "
        f"left out: {', '.join(missed)}."
    )
    warnings.warn(note, stacklevel=2)
    return f" {note}"
