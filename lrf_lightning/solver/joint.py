"""The joint solver: statistics, factorization, curves, allocation, compensation, frontier, choice, verdict.

See the modules of this package for the mathematics of each stage; this one only puts them in order.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import time
from typing import Any

import torch
from torch import Tensor, nn

from lrf_lightning.solver.certificate import certify, fit_temperature
from lrf_lightning.solver.curves import component_derivatives, predict
from lrf_lightning.solver.evaluation import Batches, LossFunction, Outcome, batch_size, evaluate
from lrf_lightning.solver.factorization import Factors, factorize
from lrf_lightning.solver.frontier import Frontier, choose_compact, choose_lossless, mark_chosen
from lrf_lightning.solver.paper import greedy_rank
from lrf_lightning.solver.probes import corrected_curve, measure_probes, probe_ranks
from lrf_lightning.solver.result import FrontierPoint, LayerCurve, LayerResult, Solution
from lrf_lightning.solver.settings import Settings
from lrf_lightning.solver.statistics import LayerStatistics, RowSampler, collect_statistics
from lrf_lightning.solver.workspace import Curve, Progress, Workspace, length
from lrf_lightning.surgery import Skipped, find_layers, prepare, settle

__all__ = ["solve"]

PROBE_SAMPLES = 256


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
) -> Solution:
    """Compress a copy of ``model``; see :func:`lrf_lightning.compress` for the arguments.

    Raises:
        ValueError: if weights are not finite, a split is empty, the loss is not usable, or the budget cannot be met.
    """
    started = time.perf_counter()
    _check_weights(model)
    if settings.objective == "paper":  # the published algorithm knows neither metrics nor compensation
        settings = dataclasses.replace(settings, metric="euclidean", compensation=False)
    device = device or next((p.device for p in model.parameters()), torch.device("cpu"))
    working = copy.deepcopy(model).to(device)
    prepare(working)
    work = Workspace(
        working, loss, calibration, selection, verification, device, settings, progress or (lambda *_: None)
    )
    dense = _evaluate_dense(work)
    candidates, work.skipped = find_layers(working, **settings.layer_choice)
    if candidates:
        _collect(work, candidates)
    if work.layers:
        _draw_curves(work)
        compressed, points, chosen, message = _choose(work, dense)
    else:
        compressed, points, chosen = working, [], None
        reasons = _reasons(work.skipped) or "the model has no layer with a weight matrix"
        message = f"No layer can be factorized: {reasons}."
    return _solution(work, dense, compressed, points, chosen, message, started)


def _check_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise ValueError(
                f"the weights of {name!r} hold NaN or infinite values; nothing can be compressed. "
                "Look for a diverged training run or load an earlier checkpoint"
            )


def _evaluate_dense(work: Workspace) -> Outcome:
    with work.stage("evaluation", 0):
        outcome = evaluate(work.model, work.loss, work.selection, work.device, split="selection", keep_logits=True)
    if not torch.isfinite(outcome.losses).all():
        raise ValueError(
            f"the loss of the original model on selection is {outcome.measurement().loss}; it must be finite"
        )
    work.samples["selection"] = outcome.measurement().samples
    return outcome


def _collect(work: Workspace, candidates: list[Any]) -> None:
    """Fill ``work.layers`` with the usable layers, in execution order."""
    batches = length(work.calibration)
    first = next(iter(work.calibration), None)
    guess = batches * batch_size(first) if first is not None else 0
    work.sampler = RowSampler(work.settings.rows_per_feature, guess, work.settings.seed)
    with work.stage("statistics", batches) as advance:
        layers = collect_statistics(
            work.model, candidates, work.loss, work.calibration, work.device, sampler=work.sampler, advance=advance
        )
    work.samples["calibration"] = work.sampler.samples
    work.layers = {name: layer for name, layer in layers.items() if not layer.problem}
    work.skipped += [
        Skipped(name, layer.candidate.kind, layer.problem) for name, layer in layers.items() if layer.problem
    ]


def _draw_curves(work: Workspace) -> None:
    """Fill ``work.factors`` and ``work.curves``."""
    settings = work.settings
    with work.stage("factorization", len(work.layers)) as advance:
        for name, layer in work.layers.items():
            work.factors[name] = _components(layer, settings)
            advance()
    with work.stage("curves", length(work.calibration)) as advance:
        derivatives = component_derivatives(
            work.model, work.layers, work.factors, work.loss, work.calibration, work.device, advance=advance
        )
    # so far only known as batches times the size of the first one
    work.samples["calibration"] = len(next(iter(derivatives.values()))[1])
    probing = settings.objective != "paper"
    batches = _some_batches(work.calibration, PROBE_SAMPLES) if probing else []
    dense = evaluate(work.model, work.loss, batches, work.device) if probing else None
    with work.stage("perturbation range", len(work.layers) if probing else 0) as advance:
        for name, layer in work.layers.items():
            work.curves[name] = _curve(work, layer, derivatives[name], dense, batches)
            advance()


def _components(layer: LayerStatistics, settings: Settings) -> Factors:
    candidate = layer.candidate
    return factorize(
        candidate.matrices(),
        None if settings.metric == "euclidean" else layer.inputs.mean,
        layer.gradients.mean if settings.metric == "fisher" else None,
        damping=settings.damping,
        max_rank=candidate.max_rank,
    )


def _curve(
    work: Workspace,
    layer: LayerStatistics,
    derivatives: tuple[Tensor, Tensor],
    dense: Outcome | None,
    batches: list[Any],
) -> Curve:
    settings, factors = work.settings, work.factors[layer.candidate.name]
    prediction = predict(*derivatives, factors.relative_tail())
    if dense is None:
        everything = torch.ones_like(prediction.first_order, dtype=torch.bool)
        return Curve(prediction, prediction.first_order, everything, [])
    change = prediction.change(settings.first_order_errors)
    ranks = probe_ranks(prediction.perturbation)
    probes = measure_probes(work.model, layer, factors, change, ranks, dense, work.loss, batches, work.device)
    corrected, allowed = corrected_curve(prediction, settings.first_order_errors, probes, settings.range_factor)
    return Curve(prediction, corrected, allowed, probes)


def _choose(work: Workspace, dense: Outcome) -> tuple[nn.Module, list[FrontierPoint], FrontierPoint | None, str]:
    """The compressed model, the measured points, the chosen one, and a sentence on the choice."""
    settings, frontier = work.settings, Frontier(work, dense)
    dense_params = sum(parameter.numel() for parameter in work.model.parameters())
    chosen: FrontierPoint | None
    if settings.objective == "paper":
        chosen, message = _choose_paper(frontier)
    elif settings.objective == "budget":
        chosen = frontier.at(settings.keep)
        message = f"Best allocation with {settings.keep:g} of the factorizable layers' {settings.cost}."
    elif settings.objective == "compact":
        chosen = choose_compact(frontier, dense_params)
        message = "Smallest measured model whose loss and score tie with the original's on the selection split."
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
    compressed = copy.deepcopy(work.model) if chosen is None else frontier.build(chosen.ranks)
    points = mark_chosen(frontier.points, chosen)
    return compressed, points, next((point for point in points if point.chosen), None), message


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
    compressed: nn.Module,
    points: list[FrontierPoint],
    chosen: FrontierPoint | None,
    message: str,
    started: float,
) -> Solution:
    ranks = {} if chosen is None else dict(chosen.ranks)
    with work.stage("verification", 0):
        before = evaluate(work.model, work.loss, work.verification, work.device, split="verification", keep_logits=True)
        after = evaluate(compressed, work.loss, work.verification, work.device, split="verification", keep_logits=True)
        fitted = evaluate(compressed, work.loss, work.selection, work.device, keep_logits=True)
    temperatures = (fit_temperature(dense), fit_temperature(fitted))
    certificate = certify(
        before,
        after,
        work.settings,
        temperatures=None if None in temperatures else temperatures,  # type: ignore[arg-type]
        unchanged=chosen is None,
    )
    work.samples["verification"] = certificate.dense.samples
    settle(compressed)
    layers = [_layer_result(work, layer, ranks) for layer in work.layers.values()]
    layers += [_skipped_result(work.model, skipped) for skipped in work.skipped]
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
        message=message,
        seconds=dict(work.seconds),
        samples=dict(work.samples),
    )


def _layer_result(work: Workspace, layer: LayerStatistics, ranks: dict[str, int]) -> LayerResult:
    candidate, curve = layer.candidate, work.curves[layer.candidate.name]
    rank = ranks.get(candidate.name)
    prediction = curve.prediction
    weight = candidate.module._parameters["weight"]
    assert weight is not None
    return LayerResult(
        name=candidate.name,
        kind=candidate.kind,
        shape=tuple(weight.shape),
        full_rank=candidate.full_rank,
        rank=rank,
        params_before=candidate.dense_params,
        params_after=candidate.dense_params if rank is None else candidate.low_rank_params(rank),
        flops_before=layer.flops(None),
        flops_after=layer.flops(rank),
        predicted_change=None if rank is None else float(curve.change[rank - 1]),
        predicted_error=None if rank is None else float(prediction.standard_error[rank - 1]),
        curve=LayerCurve(
            ranks=list(range(1, len(curve.change) + 1)),
            first_order=prediction.first_order.tolist(),
            standard_error=prediction.standard_error.tolist(),
            curvature=prediction.curvature.tolist(),
            predicted=curve.change.tolist(),
            perturbation=prediction.perturbation.tolist(),
            allowed=curve.allowed.tolist(),
            singular_values=work.factors[candidate.name].singular_values.square().mean(0).sqrt().tolist(),
            probes=[(p.rank, p.predicted, p.measured, p.standard_error) for p in curve.probes],
        ),
    )


def _skipped_result(model: nn.Module, skipped: Skipped) -> LayerResult:
    module = model.get_submodule(skipped.name)
    weight = module._parameters.get("weight")
    # lazy and packed weights have no size yet, or none that counts
    shape = () if weight is None or isinstance(weight, nn.parameter.UninitializedParameter) else tuple(weight.shape)
    count = 0 if not shape or weight is None else weight.numel()
    return LayerResult(skipped.name, skipped.kind, shape, 0, None, count, count, reason=skipped.reason)


def _some_batches(batches: Batches, samples: int) -> list[Any]:
    taken: list[Any] = []
    for batch in itertools.islice(batches, samples):
        taken.append(batch)
        if sum(batch_size(b) for b in taken) >= samples:
            break
    return taken


def _reasons(skipped: list[Skipped]) -> str:
    shown = [f"{item.name or 'the model'} ({item.reason})" for item in skipped[:3]]
    return ", ".join(shown) + (f" and {len(skipped) - 3} more" if len(skipped) > 3 else "")


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _sum(layers: list[LayerResult], field: str) -> int:
    return sum(getattr(layer, field) for layer in layers if layer.curve is not None)
