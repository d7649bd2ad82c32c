"""What a ``compact`` solve would keep, predicted from a few samples without building or measuring a model.

The curves of all layers are those of the solver, from two passes over the samples. The allocation is the smallest one
on the knapsack's path whose predicted increase of the loss stays inside what the solver would accept as a tie at most:
half the margin of the verdict. No truncation is measured, nothing is compensated and the score is not looked at, so
this is an estimate: it shows how a training goes, and may be off by a factor of two from what a solve then finds.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn

from lrf_lightning.solver.model_size import parameter_count
from lrf_lightning.solver.predictions.calibration import calibrate
from lrf_lightning.solver.ranks.allocation import Option, path
from lrf_lightning.solver.running.evaluation import Batches, LossFunction, evaluate
from lrf_lightning.solver.settings import Settings
from lrf_lightning.solver.workspace import Workspace
from lrf_lightning.surgery import find_layers, prepare

__all__ = ["Forecast", "forecast"]


@dataclass(frozen=True)
class Forecast:
    """A predicted compression.

    Attributes:
        params: weight entries that every factorizable layer would keep, by name.
        params_model: parameters of the whole model, before and after.
        loss_change: predicted change of the loss.
    """

    params: dict[str, int]
    params_model: tuple[int, int]
    loss_change: float


def forecast(
    model: nn.Module, loss: LossFunction, batches: Batches, device: torch.device, settings: Settings
) -> Forecast:
    """Predict what a ``compact`` solve of the model would keep; this process works alone.

    Args:
        model: the dense model on ``device``; attention layers in it are split as for a solve.
        loss: the user's loss.
        batches: a few batches that take no part in the training.
        device: where they are moved to.
        settings: of the solve.

    Raises:
        ValueError: if there is no batch, or a loss is not finite.
    """
    settings = dataclasses.replace(settings, objective="compact", probes=False)
    prepare(model)
    candidates, _ = find_layers(model, **settings.layer_choice)
    before = parameter_count(model)
    if not candidates:
        return Forecast({}, (before, before), 0.0)
    work = Workspace(model, loss, {"calibration": batches}, device, settings, lambda *_: None)
    dense = evaluate(model, loss, batches, device, split="calibration").measurement()
    calibrate(work, candidates)
    limit = settings.tolerance + settings.loss_margin_of(dense.loss) / 2
    options = {name: _options(work, name) for name in work.layers}
    fitting = [allocation for allocation in path(options) if allocation.change <= limit]
    smallest = min(fitting, key=lambda allocation: allocation.cost)
    params = {
        name: layer.candidate.low_rank_params(smallest.ranks[name])
        if name in smallest.ranks
        else layer.candidate.dense_params
        for name, layer in work.layers.items()
    }
    saved = sum(layer.candidate.dense_params for layer in work.layers.values()) - sum(params.values())
    return Forecast(params, (before, before - saved), smallest.change)


def _options(work: Workspace, name: str) -> list[Option]:
    candidate, multiple = work.layers[name].candidate, work.rank_multiple
    changes = work.curves[name].change.tolist()
    grid = range(multiple, len(changes) + 1, multiple) if len(changes) >= multiple else range(1, len(changes) + 1)
    low_rank = [Option(rank, candidate.low_rank_params(rank), changes[rank - 1]) for rank in grid]
    return [Option(None, candidate.dense_params, 0.0), *low_rank]
