"""What is learnt about every layer from the calibration data: moments, components, curves and perturbation range.

Layers are taken in groups whose moments fit into memory together. A group costs two passes over the data, one for the
moments and one for the curves, and a fixed number of probes; then its moments and components are freed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lrf_lightning.solver.factors.compensation import can_be_fitted
from lrf_lightning.solver.factors.decomposition import decompose, stand_in
from lrf_lightning.solver.factors.factorization import Factors
from lrf_lightning.solver.layers.layer_curve import Curve, Prediction, Probe
from lrf_lightning.solver.layers.layer_statistics import LayerStatistics, memory_groups
from lrf_lightning.solver.layers.statistics import UNREACHED, RowSampler
from lrf_lightning.solver.predictions.curves import Tails, component_derivatives, energy_curve, predict
from lrf_lightning.solver.predictions.probes import (
    LEVELS,
    corrected_curve,
    measure_probe,
    predicted_probe,
    probe_groups,
    probe_ranks,
)
from lrf_lightning.solver.running.batch_contents import batch_size, to_device
from lrf_lightning.solver.running.evaluation import Batches, Outcome, evaluate, evaluation_mode
from lrf_lightning.solver.running.hooks import observe_inputs
from lrf_lightning.solver.running.seeded_batches import SeededBatches, split_seed
from lrf_lightning.solver.workspace import Workspace, length
from lrf_lightning.surgery import Candidate, Skipped

__all__ = ["calibrate"]

PROBE_SAMPLES = 256
PROBE_PAIRS = 4  # losses whose spread is known are worth a few batches more
PROBE_GROUPS = 8


def calibrate(work: Workspace, candidates: list[Candidate]) -> None:
    """Fill the workspace's layers, curves and perturbation ranges, one group of layers that fits into memory at a time.

    Raises:
        ValueError: if calibration holds no batch, a loss is not finite, or no gradient of it reaches any layer.
    """
    with work.processes.together("reading the calibration data"):
        first = next(iter(work.calibration), None)
        first_size = 0 if first is None else batch_size(first)
    first_size = work.processes.of_first(first_size)  # of the first of all batches
    if first_size == 0:
        raise ValueError("calibration holds no batch; give a loader that yields at least one and can be iterated again")
    batches = sum(work.processes.gather(length(work.calibration)))
    work.batches = batches
    work.sampler = RowSampler(work.settings.rows_per_feature, batches * first_size, work.settings.seed)
    groups = list(memory_groups(candidates, work.memory))
    if len(groups) > 1:  # a single group learns the order while it is observed
        groups = list(memory_groups(_in_execution_order(work, candidates, first), work.memory))
    work.keeps_gradients = len(groups) == 1
    probing = _Probing.of(work, first_size) if work.settings.probes else None
    found: dict[str, LayerStatistics] = {}
    for group in groups:
        with work.stage("statistics", length(work.calibration)) as advance:
            layers = work.statistics(group, advance)
        found |= layers
        work.samples["calibration"] = next(iter(layers.values())).samples
        usable = {name: layer for name, layer in layers.items() if not layer.problem}
        if usable:
            _draw_curves(work, usable, probing, len(groups))
        for layer in layers.values():
            _forget(work, layer)
    work.layers = {name: layer for name, layer in found.items() if not layer.problem}
    if not work.layers and all(layer.problem in UNREACHED for layer in found.values()):
        raise ValueError(
            f"the loss does not depend differentiably on any of the {len(found)} layers; it must be computed from the "
            "model that it is given, with gradients: no detach(), no item(), no torch.no_grad(), no comparison of "
            "predictions in the place of a loss"
        )
    work.skipped += [
        Skipped(name, layer.candidate.kind, layer.problem) for name, layer in found.items() if layer.problem
    ]


def _in_execution_order(work: Workspace, candidates: list[Candidate], first: Any) -> list[Candidate]:
    """Sort layers by their first call on the first batch; those that do not run there come last, as they stand."""
    seen: list[str] = []
    with work.processes.together("looking for the order of the layers"):
        # its first batch is the first of all, so the first process knows; the others may have none
        if work.processes.rank == 0:
            modules = {candidate.name: candidate.modules_in(work.model) for candidate in candidates}
            with (
                evaluation_mode(work.model),
                torch.no_grad(),
                observe_inputs(modules, lambda name, _: seen.append(name)),
            ):
                work.loss(work.model, to_device(first, work.device))
    order = {name: position for position, name in enumerate(dict.fromkeys(work.processes.of_first(seen)))}
    return sorted(candidates, key=lambda candidate: order.get(candidate.name, len(order)))


def _forget(work: Workspace, layer: LayerStatistics) -> None:
    """Free what the compensation will not ask for."""
    if work.settings.compensation and can_be_fitted(layer):
        layer.inputs.forget()
    if not work.keeps_gradients:
        layer.gradients.forget()
        layer.inputs.forget()


@dataclass(frozen=True)
class _Probing:
    """Part of the calibration data, and the dense model's losses on it."""

    batches: Batches
    dense: Outcome

    @classmethod
    def of(cls, work: Workspace, size: int) -> _Probing:
        """As many batches as have enough samples, or enough losses where a batch has only one."""
        count = max(1, round(PROBE_SAMPLES / max(size, 1)))
        found = cls._with(work, count)
        few = len(found.dense.losses) < PROBE_PAIRS and count < PROBE_PAIRS
        return cls._with(work, PROBE_PAIRS) if few else found

    @classmethod
    def _with(cls, work: Workspace, count: int) -> _Probing:
        with work.processes.together("reading the calibration data"):
            read = list(itertools.islice(work.calibration, work.processes.share(count)))
        batches = SeededBatches(read, split_seed(work.settings.seed, "calibration"), work.processes)
        return cls(batches, evaluate(work.model, work.loss, batches, work.device, processes=work.processes))


def _draw_curves(
    work: Workspace, layers: Mapping[str, LayerStatistics], probing: _Probing | None, memory_group_count: int
) -> None:
    """Fill ``work.curves`` for some layers."""
    settings = work.settings
    with work.stage("factorization", len(layers)) as advance:
        factors = decompose(work, layers, advance)
    if settings.prediction == "energy":
        for name in layers:
            work.curves[name] = energy_curve(factors[name], layers[name].candidate.max_rank)
        return
    with work.stage("curves", length(work.calibration)) as advance:
        derivatives = component_derivatives(
            work.model,
            layers,
            factors,
            work.loss,
            work.calibration,
            work.device,
            seed=settings.seed,
            processes=work.processes,
            advance=advance,
        )
    tails = {name: derivatives[name].tails(factors[name].gains) for name in layers}
    predictions = {name: predict(tails[name], factors[name].relative_tail(), work.processes) for name in layers}
    probes: dict[str, list[Probe]] = {name: [] for name in layers}
    if probing is not None:
        count = max(1, PROBE_GROUPS // memory_group_count)
        probes |= _measure_probes(work, layers, factors, predictions, tails, probing, count)
    for name, prediction in predictions.items():
        change, allowed = corrected_curve(
            name, prediction, settings.first_order_errors, probes[name], settings.range_factor
        )
        if settings.objective == "paper":
            change = prediction.first_order
        work.curves[name] = Curve(prediction, change, allowed, probes[name], factors[name].spectrum())


def _measure_probes(
    work: Workspace,
    layers: Mapping[str, LayerStatistics],
    factors: Mapping[str, Factors],
    predictions: Mapping[str, Prediction],
    tails: Mapping[str, Tails],
    probing: _Probing,
    group_count: int,
) -> dict[str, list[Probe]]:
    ranks = {name: probe_ranks(prediction.perturbation) for name, prediction in predictions.items()}
    groups = probe_groups(list(layers), group_count)
    probes: dict[str, list[Probe]] = {}
    with work.stage("perturbation range", len(groups)) as advance:
        for group in groups:
            levels = dict.fromkeys(tuple(ranks[name][level] for name in group) for level in range(LEVELS))
            measured = []
            for level in levels:
                chosen = dict(zip(group, level, strict=True))
                joint = predicted_probe(
                    [(tails[name], rank) for name, rank in chosen.items()],
                    work.settings.first_order_errors,
                    work.processes,
                )
                measured.append(
                    measure_probe(
                        work.model,
                        {name: stand_in(work, layers[name], factors[name], rank) for name, rank in chosen.items()},
                        chosen,
                        joint,
                        probing.dense,
                        work.loss,
                        probing.batches,
                        work.device,
                        work.processes,
                    )
                )
            probes |= dict.fromkeys(group, measured)
            advance()
    return probes
