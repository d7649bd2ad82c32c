"""Perturbation range: up to which perturbation of a layer does the quadratic prediction hold?

Every layer is truncated alone, at a few ranks, and the change of the loss is measured on part of the calibration data.
The ratio of measured to predicted curvature corrects the predicted curve (interpolated over the logarithm of the
perturbation), and the range ends where the ratio leaves ``[1 / range_factor, range_factor]`` by more than the noise of
the measurement.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrf_lightning.solver.curves import Prediction
from lrf_lightning.solver.evaluation import LossFunction, Outcome, evaluate
from lrf_lightning.solver.factorization import Factors
from lrf_lightning.solver.statistics import LayerStatistics
from lrf_lightning.surgery import factorized, replace_module

__all__ = ["Probe", "corrected_curve", "measure_probes", "probe_ranks"]

# the correction is an estimate from few samples: never let it turn a curve by more than this
LARGEST_CORRECTION = 30.0


@dataclass(frozen=True)
class Probe:
    """One measured truncation of one layer.

    Attributes:
        rank: the rank that was tried.
        predicted: predicted change of the loss.
        measured: measured change of the loss.
        standard_error: standard error of the measured paired change.
    """

    rank: int
    predicted: float
    measured: float
    standard_error: float


def probe_ranks(perturbation: Tensor, count: int = 3) -> list[int]:
    """Ranks, largest first, whose perturbations are spread evenly between the smallest and the largest one.

    Args:
        perturbation: relative perturbation at ranks 1 to r, falling, shape (r,).
        count: how many, fewer if the layer has fewer ranks.
    """
    largest, smallest = float(perturbation[0]), float(perturbation[-1])
    levels = [smallest + (largest - smallest) * (i + 0.5) / count for i in range(count)]
    ranks = {int((perturbation - level).abs().argmin()) + 1 for level in levels}
    return sorted(ranks, reverse=True)


def measure_probes(
    model: nn.Module,
    layer: LayerStatistics,
    factors: Factors,
    change: Tensor,  # (r,)
    ranks: Sequence[int],
    dense: Outcome,
    loss: LossFunction,
    batches: Sequence[Any],
    device: torch.device,
    advance: Callable[[], None] = lambda: None,
) -> list[Probe]:
    """Truncate one layer of ``model`` to each rank in turn, measure, and put the dense layer back.

    Args:
        model: dense model on ``device``; as it was on return.
        layer: the layer.
        factors: its components.
        change: predicted change of the loss at the ranks 1 to r.
        ranks: ranks to try.
        dense: losses of the dense model on the same batches.
        loss: the user's loss.
        batches: part of the calibration data.
        device: where batches are moved to.
        advance: called after every measured rank.
    """
    probes: list[Probe] = []
    dense_module = layer.candidate.module
    current: nn.Module = dense_module
    try:
        for rank in ranks:
            new = factorized(dense_module, *factors.truncated(rank))
            replace_module(model, layer.candidate.name, new)
            current = new
            outcome = evaluate(model, loss, batches, device)
            probes.append(_probe(rank, float(change[rank - 1]), outcome, dense))
            advance()
    finally:
        if current is not dense_module:
            replace_module(model, layer.candidate.name, dense_module)
    return probes


def corrected_curve(
    prediction: Prediction, errors: float, probes: Sequence[Probe], range_factor: float
) -> tuple[Tensor, Tensor]:
    """The predicted change, corrected by the probes, and which ranks lie inside the perturbation range.

    Args:
        prediction: of ranks 1 to r.
        errors: standard errors by which the first-order term is shrunk.
        probes: measured points.
        range_factor: largest ratio of measured to predicted change that counts as agreement.

    Returns:
        Two tensors of shape (r,), float64 and bool.
    """
    change = prediction.change(errors)
    first_order = change - prediction.curvature
    points: list[tuple[float, float]] = []  # (log perturbation, log ratio)
    limit = math.inf
    for probe in sorted(probes, key=lambda probe: -probe.rank):
        perturbation = float(prediction.perturbation[probe.rank - 1])
        curvature = float(prediction.curvature[probe.rank - 1])
        if perturbation <= 0 or curvature <= 0:
            continue
        rise = probe.measured - float(first_order[probe.rank - 1])
        noise = 2 * probe.standard_error
        finite = math.isfinite(rise)
        if not finite or rise - noise > range_factor * curvature or rise + noise < curvature / range_factor:
            limit = min(limit, perturbation)
        if not finite or rise > noise:
            ratio = rise / curvature if finite else LARGEST_CORRECTION
            ratio = min(max(ratio, 1 / LARGEST_CORRECTION), LARGEST_CORRECTION)
            points.append((math.log(perturbation), math.log(ratio)))
    inside = prediction.perturbation < limit if math.isfinite(limit) else torch.ones_like(change, dtype=torch.bool)
    return first_order + prediction.curvature * _interpolated(prediction.perturbation, points), inside


def _probe(rank: int, predicted: float, outcome: Outcome, dense: Outcome) -> Probe:
    differences = outcome.losses - dense.losses
    share = dense.weights / dense.weights.sum()
    mean = float((share * differences).sum())
    error = float((share.square() * (differences - mean).square()).sum().sqrt())
    return Probe(rank, predicted, mean, error)


def _interpolated(perturbation: Tensor, points: Sequence[tuple[float, float]]) -> Tensor:
    """Exponential of the piecewise linear function through the points over log perturbation, constant beyond."""
    if not points:
        return torch.ones_like(perturbation)
    ordered = sorted(points)
    x = perturbation.clamp_min(1e-300).log()
    result = torch.full_like(x, ordered[0][1])
    for (x0, y0), (x1, y1) in itertools.pairwise(ordered):
        slope = (y1 - y0) / max(x1 - x0, 1e-12)
        result = torch.where(x >= x0, y0 + slope * (x - x0).clamp_max(x1 - x0), result)
    return result.exp()
