"""What the allocation of ranks chooses among: every layer's options, with the change of the loss that each may make."""

from __future__ import annotations

import torch
from torch import Tensor

from lrf_lightning.solver.layers.layer_curve import Curve
from lrf_lightning.solver.ranks.allocation import Option
from lrf_lightning.solver.settings import Settings
from lrf_lightning.solver.workspace import Workspace

__all__ = ["rank_options"]


def rank_options(work: Workspace, *, gains: bool) -> dict[str, list[Option]]:
    """Every layer's choices: dense, and the ranks on the grid of ``rank_multiple`` that are worth it.

    Outside the perturbation range a prediction was seen to be off by more than ``range_factor``, or it is beyond what
    was measured: there it counts as many times, so that such a rank is taken only where it saves as much more than the
    others. Refusing such ranks as long as the budget can be met without them would ruin other layers.

    Args:
        work: the workspace, with curves.
        gains: whether predicted gains of the loss are believed.
    """
    options: dict[str, list[Option]] = {}
    for name, layer in work.layers.items():
        curve, multiple = work.curves[name], work.rank_multiple
        changes = _weighed(curve, work.settings, gains=gains)
        count = len(curve.change)
        grid = range(multiple, count + 1, multiple) if count >= multiple else range(1, count + 1)
        dense = work.cost(layer, None)
        low_rank = [
            Option(rank, work.cost(layer, rank), float(changes[rank - 1]))
            for rank in grid
            if work.is_worthwhile(layer, rank)
        ]
        # lookups in a dense table cost no multiply-adds, so a rank may cost more than the dense layer
        options[name] = [Option(None, dense, 0.0), *(option for option in low_rank if option.cost < dense)]
    return options


def _weighed(curve: Curve, settings: Settings, *, gains: bool) -> Tensor:
    """The predicted changes of all ranks, as much worse as they may be where the prediction does not hold.

    A gain is never believed there.
    """
    first_order = curve.prediction.change(settings.first_order_errors) - curve.prediction.curvature
    without_gains = curve.change - first_order.clamp_max(0.0)
    return torch.where(curve.allowed, curve.change if gains else without_gains, settings.range_factor * without_gains)
