"""The joint solver: calibration, allocation, compensation, frontier, choice, verdict.

See the modules of this package for the mathematics of each stage; this one only puts them in order.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from lrf_lightning.copies.model_copy import copied_model, shareable
from lrf_lightning.distributed import Processes, current_processes
from lrf_lightning.solver.budgets import measure_budgets
from lrf_lightning.solver.calibration import calibrate
from lrf_lightning.solver.certificate import certify
from lrf_lightning.solver.changes import changed_samples
from lrf_lightning.solver.choice import choose_compact, choose_lossless
from lrf_lightning.solver.devices import check_one_device, solver_device
from lrf_lightning.solver.evaluation import Batches, LossFunction, Outcome
from lrf_lightning.solver.frontier import Frontier
from lrf_lightning.solver.latency import measure_layers
from lrf_lightning.solver.layer_results import layer_results
from lrf_lightning.solver.layer_statistics import LayerStatistics
from lrf_lightning.solver.paper import greedy_rank
from lrf_lightning.solver.pareto import marked
from lrf_lightning.solver.point_models import PointModels
from lrf_lightning.solver.result import FrontierPoint, LayerResult, Solution
from lrf_lightning.solver.settings import Settings
from lrf_lightning.solver.speed import Scope, measure_speed
from lrf_lightning.solver.speed_result import Speed
from lrf_lightning.solver.temperature import temperatures
from lrf_lightning.solver.workspace import Progress, Workspace
from lrf_lightning.surgery import Candidate, Skipped, find_layers, prepare, settle

__all__ = ["calibrated", "solve"]

CalibrationStep = Callable[[Workspace, list[Candidate], Outcome], None]
DISAGREEMENT = (
    "All processes must solve the same task. Sweeps whose sampler has no seed start every process with other "
    "arguments; give the sampler a seed"
)


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
        choice = _choose(work, dense)
    else:
        reasons = _reasons(work.skipped) or "the model has no layer with a weight matrix"
        choice = _Choice(work.model, dense, f"No layer can be factorized: {reasons}.")
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

    From here any number of budgets can be solved; see :class:`~lrf_lightning.solver.frontier.Frontier`.
    ``calibration_step`` takes the place of :func:`~lrf_lightning.solver.calibration.calibrate`, to remember what it
    finds.
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
    _unify(working, settings, processes)
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


def _unify(model: nn.Module, settings: Settings, processes: Processes) -> None:
    """Check that all processes have the same settings and weights, and give them the buffers of the first one.

    Running statistics are not kept in step while training: every process has those of its own batches.
    """
    if processes.size == 1:
        return
    values = {
        f"the setting {field.name!r}": repr(getattr(settings, field.name))
        for field in dataclasses.fields(settings)
        if not callable(getattr(settings, field.name))  # shown with an address
    }
    values |= {f"the sum of the bytes of the weight {name!r}": _byte_sum(p) for name, p in model.named_parameters()}
    processes.agree(values, DISAGREEMENT)
    buffers = dict(model.named_buffers())
    kinds = {name: (str(buffer.dtype), tuple(buffer.shape)) for name, buffer in buffers.items() if not buffer.is_meta}
    everywhere = set.intersection(*(set(other.items()) for other in processes.gather(kinds)))
    for name, kind in kinds.items():
        if (name, kind) in everywhere and buffers[name].numel():
            # bytes travel, since backends do not know every dtype
            content = buffers[name].detach().clone(memory_format=torch.contiguous_format).reshape(-1)
            processes.broadcast_([content.view(torch.uint8)], 0)
            with torch.no_grad():
                buffers[name].copy_(content.reshape(buffers[name].shape))


def _byte_sum(weight: nn.Parameter) -> str:
    if weight.is_meta or isinstance(weight, nn.parameter.UninitializedParameter):
        return "unknown"
    return f"{int(weight.detach().flatten().view(torch.uint8).sum())} of shape {tuple(weight.shape)}"


def _evaluate_dense(work: Workspace) -> Outcome:
    with work.stage("evaluation", 0):
        outcome = work.evaluate(work.model, "selection", keep_logits=True)
    if not torch.isfinite(outcome.losses).all():
        raise ValueError(
            f"the loss of the original model on selection is {outcome.measurement().loss}; it must be finite"
        )
    return outcome


@dataclass(frozen=True)
class _Choice:
    """The compressed model, its losses on the selection split, a sentence, and the points if any were measured."""

    model: nn.Module
    outcome: Outcome
    message: str
    point: FrontierPoint | None = None
    points: list[FrontierPoint] = field(default_factory=list)
    models: PointModels | None = None


def _choose(work: Workspace, dense: Outcome) -> _Choice:
    settings, frontier = work.settings, Frontier(work, dense)
    dense_params = _count(work.model)
    chosen: FrontierPoint | None
    if settings.cost == "latency" and settings.objective != "paper" and frontier.lowest >= 1:
        message = f"At no rank is any layer measurably faster than the dense one on {work.device}."
        return _Choice(copied_model(work.model), dense, message)
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
        return _Choice(copied_model(work.model), dense, message, None, points)
    point = next(point for point in points if point.chosen)
    message += frontier.note(chosen)
    model = copied_model(frontier.build(chosen.ranks))  # shares nothing with the dense model that a step may write to
    return _Choice(model, frontier.outcome(chosen), message, point, points)


def _choose_budgets(frontier: Frontier) -> _Choice:
    """All budgets, of which the smallest that is as good as the original is chosen."""
    work, models = frontier.work, PointModels(frontier.work.model)

    def keep(point: FrontierPoint, model: nn.Module) -> None:
        models.keep(point.ranks, model, layer_results(work, point.ranks))

    points, note = measure_budgets(frontier, keep)
    chosen = next((point for point in points if point.chosen), None)
    if chosen is None:
        message = f"No budget kept loss and score within the noise on the selection split.{note}"
        return _Choice(copied_model(work.model), frontier.dense, message, None, points, models)
    message = f"Smallest budget whose loss and score are as good as the original's on the selection split.{note}"
    message += frontier.note(chosen)
    return _Choice(models.build(chosen.ranks), frontier.outcome(chosen), message, chosen, points, models)


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


def _solution(
    work: Workspace,
    dense: Outcome,
    choice: _Choice,
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
        params_model=(_count(work.model), _count(compressed)),
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


def _timed(work: Workspace, choice: _Choice) -> tuple[Speed | None, list[FrontierPoint]]:
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


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _sum(layers: list[LayerResult], field: str) -> int:
    return sum(getattr(layer, field) for layer in layers if layer.curve is not None)
