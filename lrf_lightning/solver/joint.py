"""The joint solver, stage by stage; the modules of this package say more of each.

1. The model is copied, prepared and evaluated on the selection split (``running``).
2. Calibration: statistics, components, curves and their range (``layers``, ``factors``, ``predictions``).
3. Measured models for the objective: ranks, compensated factors, choice (``ranks``, ``factors``, ``points``).
4. The verdict on the verification split (``verdict``), and the speed of what was chosen (``speed``).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn

from lrf_lightning.copies.model_copy import copied_model, shareable
from lrf_lightning.distributed import current_processes
from lrf_lightning.solver.agreement import unify
from lrf_lightning.solver.devices import check_one_device, solver_device
from lrf_lightning.solver.layers.latency import measure_layers
from lrf_lightning.solver.model_size import parameter_count
from lrf_lightning.solver.points.layer_results import layer_results
from lrf_lightning.solver.points.objectives import Choice, choose
from lrf_lightning.solver.points.point_models import PointModels
from lrf_lightning.solver.predictions.calibration import calibrate
from lrf_lightning.solver.result import FrontierPoint, LayerResult
from lrf_lightning.solver.running.evaluation import Batches, LossFunction, Outcome
from lrf_lightning.solver.settings import Settings
from lrf_lightning.solver.solution import Solution
from lrf_lightning.solver.speed.comparison import Scope, measure_speed
from lrf_lightning.solver.speed_result import Speed
from lrf_lightning.solver.verdict.certificate import certify
from lrf_lightning.solver.verdict.changes import changed_samples
from lrf_lightning.solver.verdict.temperature import temperatures
from lrf_lightning.solver.workspace import Progress, Workspace
from lrf_lightning.surgery import Candidate, Skipped, find_layers, prepare, settle

__all__ = ["calibrated", "solve"]

CalibrationStep = Callable[[Workspace, list[Candidate], Outcome], None]


def solve(
    model: nn.Module,
    loss: LossFunction,
    calibration: Batches,
    selection: Batches,
    verification: Batches,
    *,
    settings: Settings,
    device: torch.device | None = None,
    progress: Progress | None = None,
    calibration_step: CalibrationStep | None = None,
) -> Solution:
    """Compress a copy of ``model``; see :func:`lrf_lightning.compress` and :func:`calibrated` for the arguments.

    Raises:
        PeerError: if another process failed, or has other settings or weights.
        ValueError: if weights are not finite, a split is empty, the loss is not usable, or the budget cannot be met.
    """
    started = time.perf_counter()
    splits = {"calibration": calibration, "selection": selection, "verification": verification}
    work, dense = calibrated(
        model, loss, splits, settings=settings, device=device, progress=progress, calibration_step=calibration_step
    )
    if work.layers:
        choice = choose(work, dense)
    else:
        reasons = _reasons(work.skipped) or "the model has no layer with a weight matrix"
        choice = Choice(work.model, dense, f"No layer can be factorized: {reasons}.")
    return _solution(work, dense, choice, started)


def calibrated(
    model: nn.Module,
    loss: LossFunction,
    splits: Mapping[str, Batches],
    *,
    settings: Settings,
    device: torch.device | None = None,
    progress: Progress | None = None,
    calibration_step: CalibrationStep | None = None,
) -> tuple[Workspace, Outcome]:
    """A workspace that knows the curves of all layers, and the dense model's losses on the selection split.

    From here any number of budgets can be solved; see :class:`~lrf_lightning.solver.points.frontier.Frontier`.
    ``calibration_step`` takes the place of :func:`~lrf_lightning.solver.predictions.calibration.calibrate`, to remember
    what it finds.
    """
    if settings.objective == "paper":  # the published algorithm knows neither metrics nor compensation
        settings = dataclasses.replace(
            settings,
            metric="euclidean",
            compensation=False,
            probes=False,
            batch_norm=False,
            conv_order="kernel_first",
        )
    device = solver_device(device or next((p.device for p in model.parameters()), torch.device("cpu")))
    processes = current_processes(device)
    with processes.together("the copy of the model"):
        check_one_device(model)
        _check_weights(model)
        working = copied_model(model).to(device)
        prepare(working)
    unify(working, settings, processes)
    work = Workspace(
        working,
        loss,
        splits,
        device,
        settings,
        progress or (lambda *_: None),
        processes,
    )
    dense = _evaluate_dense(work)
    work.shared = shareable(working, model)
    candidates, work.skipped = find_layers(working, **settings.layer_choice)
    if candidates and calibration_step is None:
        calibrate(work, candidates)
    elif candidates and calibration_step is not None:
        calibration_step(work, candidates, dense)
    if settings.cost == "latency":
        with work.stage("timing", len(work.layers)) as advance:
            work.latencies = measure_layers(work.layers, work.device, work.rank_multiple, work.processes, advance)
    return work, dense


def _check_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise ValueError(
                f"the weights of {name!r} hold NaN or infinite values; nothing can be compressed. "
                "Look for a diverged training run or load an earlier checkpoint"
            )


def _evaluate_dense(work: Workspace) -> Outcome:
    with work.stage("evaluation", 0):
        outcome = work.evaluate(work.model, "selection", keep_logits=True)
    if not torch.isfinite(outcome.losses).all():
        raise ValueError(
            f"the loss of the original model on selection is {outcome.measurement().loss}; it must be finite"
        )
    return outcome


def _solution(
    work: Workspace,
    dense: Outcome,
    choice: Choice,
    started: float,
) -> Solution:
    compressed, ranks = choice.model, {} if choice.point is None else dict(choice.point.ranks)
    with work.stage("verification", 0):
        before = work.evaluate(work.model, "verification", keep_logits=True)
        after = work.evaluate(compressed, "verification", keep_logits=True)
    certificate = certify(
        before,
        after,
        work.settings,
        temperatures=temperatures(dense, choice.outcome),
        unchanged=choice.point is None,
    )
    settle(compressed)
    speed, points = _timed(work, choice)
    layers = layer_results(work, ranks)
    work.seconds["total"] = time.perf_counter() - started
    return Solution(
        model=compressed,
        ranks=ranks,
        layers=layers,
        frontier=points,
        dense=dense.measurement(),
        certificate=certificate,
        settings=work.settings,
        params_model=(parameter_count(work.model), parameter_count(compressed)),
        params_layers=(_sum(layers, "params_before"), _sum(layers, "params_after")),
        flops_layers=(_sum(layers, "flops_before"), _sum(layers, "flops_after")),
        message=choice.message,
        seconds=dict(work.seconds),
        samples=dict(work.samples),
        changes=changed_samples(before, after),
        latency_layers=_latencies(work, ranks),
        speed=speed,
        point_models=choice.models,
    )


def _timed(work: Workspace, choice: Choice) -> tuple[Speed | None, list[FrontierPoint]]:
    """The speed of the chosen model, and the points with those of all models that were kept, at the same batches."""
    ranks = {} if choice.point is None else choice.point.ranks
    if choice.models is None or work.settings.speed == "none":
        with work.stage("speed", 0):
            return measure_speed(work, lambda: choice.model, ranks), choice.points
    models, scope = choice.models, Scope(share=1 / max(len(choice.points), 1))
    chosen, points = None, []
    with work.stage("speed", len(choice.points)) as advance:
        for point in choice.points:
            if point.chosen:
                found = chosen = measure_speed(work, lambda: choice.model, ranks, scope)
            else:
                make = partial(_built, models, point.ranks)
                found = measure_speed(work, make, point.ranks, dataclasses.replace(scope, brief=True))
            points.append(dataclasses.replace(point, speed=found))
            if found is not None and found.timings and scope.batch is None:
                scope = dataclasses.replace(scope, batch=max(timing.batch for timing in found.timings))
            advance()
    return chosen, points


def _built(models: PointModels, ranks: Mapping[str, int]) -> nn.Module:
    model = models.build(ranks)
    settle(model)
    return model


def _latencies(work: Workspace, ranks: dict[str, int]) -> tuple[float, float] | None:
    if not work.latencies:
        return None
    before, after = (
        sum(latency.seconds(chosen.get(name)) for name, latency in work.latencies.items())
        for chosen in (dict[str, int](), ranks)
    )
    return before, after


def _reasons(skipped: list[Skipped]) -> str:
    shown = [f"{item.name or 'the model'} ({item.reason})" for item in skipped[:3]]
    return ", ".join(shown) + (f" and {len(skipped) - 3} more" if len(skipped) > 3 else "")


def _sum(layers: list[LayerResult], field: str) -> int:
    return sum(getattr(layer, field) for layer in layers if layer.curve is not None)
