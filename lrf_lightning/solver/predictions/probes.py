"""Perturbation range: up to which perturbation of a layer does the quadratic prediction hold?

Layers are truncated, at a few ranks, and the change of the loss is measured on part of the calibration data. To keep
the cost linear in the depth the layers are truncated in a fixed number of groups of neighbours, alone where there are
few. The ratio of measured to predicted curvature corrects the predicted curves of a group (its root, interpolated over
the logarithm of the perturbation: the compensation will undo part of what was measured), and the range ends where the
ratio leaves ``[1 / range_factor, range_factor]`` by more than the noise of the measurement.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lrf_lightning.distributed import ALONE, Processes
from lrf_lightning.modules import LowRankModule
from lrf_lightning.solver.layers.layer_curve import Prediction, Probe, shrink
from lrf_lightning.solver.predictions.curves import Tails, tail_moments
from lrf_lightning.solver.running.evaluation import Batches, LossFunction, Outcome, evaluate, loss_differences
from lrf_lightning.solver.verdict.intervals import paired_change
from lrf_lightning.surgery import replace_module

__all__ = ["corrected_curve", "measure_probe", "predicted_probe", "probe_groups", "probe_ranks"]

LEVELS = 3
# the correction is an estimate from few samples: never let it turn a curve by more than this
LARGEST_CORRECTION = 30.0
TRUST = 0.5


def probe_ranks(perturbation: Tensor, count: int = LEVELS) -> list[int]:
    """Ranks, largest first, whose perturbations are spread evenly between the smallest and the largest one.

    Args:
        perturbation: relative perturbation at ranks 1 to r, falling, shape (r,).
        count: how many; a rank may come up several times.
    """
    largest, smallest = float(perturbation[0]), float(perturbation[-1])
    levels = [smallest + (largest - smallest) * (i + 0.5) / count for i in range(count)]
    return sorted((int((perturbation - level).abs().argmin()) + 1 for level in levels), reverse=True)


def probe_groups(names: Sequence[str], count: int) -> list[list[str]]:
    """Cut the layers into at most ``count`` runs of neighbours of nearly equal length."""
    bounds = [round(i * len(names) / count) for i in range(count + 1)]
    return [list(names[a:b]) for a, b in itertools.pairwise(bounds) if b > a]


def predicted_probe(
    truncations: Sequence[tuple[Tails, int]],
    errors: float,
    processes: Processes = ALONE,
) -> tuple[float, float]:
    """First-order change, shrunk by ``errors`` standard errors, and curvature of a joint truncation.

    Args:
        truncations: derivatives of every layer, and its rank.
        errors: standard errors by which the first-order change is shrunk.
        processes: who else holds other samples.
    """
    loss = torch.stack([tails.loss[:, rank - 1] for tails, rank in truncations]).sum(0)[:, None]
    scattered = torch.stack([tails.scattered[:, rank - 1] for tails, rank in truncations]).sum(0)[:, None]
    mean, square, error = tail_moments(Tails(loss, scattered), processes)
    threshold = error * errors if errors > 0 else torch.zeros_like(error)
    return float(shrink(mean, threshold)), float(square / 2)


def measure_probe(
    model: nn.Module,
    stand_ins: Mapping[str, LowRankModule],
    ranks: Mapping[str, int],
    prediction: tuple[float, float],
    dense: Outcome,
    loss: LossFunction,
    batches: Batches,
    device: torch.device,
    processes: Processes = ALONE,
) -> Probe:
    """Truncate layers of ``model``, measure, and put the dense layers back.

    Args:
        model: dense model on ``device``; as it was on return.
        stand_ins: what takes the place of the layers, by name.
        ranks: their ranks by name.
        prediction: first-order change and curvature, see :func:`predicted_probe`.
        dense: losses of the dense model on the same batches.
        loss: the user's loss.
        batches: part of this process's calibration data.
        device: where batches are moved to.
        processes: who else measures on other batches.
    """
    dense_layers = {name: model.get_submodule(name) for name in stand_ins}
    try:
        for name, stand_in in stand_ins.items():
            replace_module(model, name, stand_in)
        outcome = evaluate(model, loss, batches, device, processes=processes)
    finally:
        for name, layer in dense_layers.items():
            replace_module(model, name, layer)
    return Probe(dict(ranks), *prediction, *paired_change(*loss_differences(outcome, dense)))


def corrected_curve(
    name: str, prediction: Prediction, errors: float, probes: Sequence[Probe], range_factor: float
) -> tuple[Tensor, Tensor]:
    """The predicted change, corrected by the probes, and which ranks lie inside the perturbation range.

    Args:
        name: the layer.
        prediction: of its ranks 1 to r.
        errors: standard errors by which the first-order term is shrunk.
        probes: measurements in which the layer took part.
        range_factor: largest ratio of measured to predicted change that counts as agreement.

    Returns:
        Two tensors of shape (r,), float64 and bool.
    """
    change = prediction.change(errors)
    first_order = change - prediction.curvature
    points: list[tuple[float, float]] = []  # (log perturbation, log correction)
    limit = math.inf
    for probe in sorted(probes, key=lambda probe: -probe.ranks[name]):
        perturbation = float(prediction.perturbation[probe.ranks[name] - 1])
        if perturbation <= 0 or probe.curvature <= 0:
            continue
        rise, noise = probe.measured - probe.first_order, 2 * probe.standard_error
        finite = math.isfinite(rise)
        if not finite or rise - noise > range_factor * probe.curvature or rise + noise < probe.curvature / range_factor:
            limit = min(limit, perturbation)
        if not finite or rise > noise:
            ratio = rise / probe.curvature if finite else LARGEST_CORRECTION
            ratio = min(max(ratio, 1 / LARGEST_CORRECTION), LARGEST_CORRECTION)
            points.append((math.log(perturbation), TRUST * math.log(ratio)))
    inside = prediction.perturbation < limit if math.isfinite(limit) else torch.ones_like(change, dtype=torch.bool)
    return first_order + prediction.curvature * _interpolated(prediction.perturbation, points), inside


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
