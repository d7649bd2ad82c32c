"""What the report says about every layer: sizes, costs, predictions and the curve over all ranks."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lrf_lightning.solver.layers.layer_statistics import LayerStatistics
from lrf_lightning.solver.result import LayerCurve, LayerResult
from lrf_lightning.solver.workspace import Workspace
from lrf_lightning.surgery import Skipped, is_matrix

__all__ = ["layer_results"]


def layer_results(work: Workspace, ranks: Mapping[str, int]) -> list[LayerResult]:
    """One record for every layer, those that were left alone last.

    Args:
        work: the workspace, with curves.
        ranks: ranks by name; other layers stay dense.
    """
    layers = [_layer_result(work, layer, ranks) for layer in work.layers.values()]
    return layers + [_skipped_result(work.model, skipped) for skipped in work.skipped]


def _layer_result(work: Workspace, layer: LayerStatistics, ranks: Mapping[str, int]) -> LayerResult:
    candidate, curve = layer.candidate, work.curves[layer.candidate.name]
    rank = ranks.get(candidate.name)
    prediction, latency = curve.prediction, work.latencies.get(candidate.name)
    weight = candidate.module._parameters["weight"]
    assert weight is not None
    return LayerResult(
        name=candidate.name,
        kind=candidate.kind,
        shape=tuple(weight.shape),
        full_rank=candidate.full_rank,
        order=candidate.order,
        rank=rank,
        params_before=candidate.dense_params,
        params_after=candidate.dense_params if rank is None else candidate.low_rank_params(rank),
        flops_before=layer.flops(None),
        flops_after=layer.flops(rank),
        latency_before=None if latency is None else latency.seconds(None),
        latency_after=None if latency is None else latency.seconds(rank),
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
            singular_values=curve.spectrum.tolist(),
            probes=[(p.ranks[candidate.name], p.predicted, p.measured, p.standard_error) for p in curve.probes],
            probed_with=[name for probe in curve.probes[:1] for name in probe.ranks if name != candidate.name],
        ),
    )


def _skipped_result(model: nn.Module, skipped: Skipped) -> LayerResult:
    module = model.get_submodule(skipped.name)
    # lazy and packed weights have no size yet, or none that counts
    matrices = {
        name: parameter
        for name, parameter in module._parameters.items()
        if is_matrix(parameter) and not isinstance(parameter, nn.parameter.UninitializedParameter)
    }
    weight = matrices.get("weight")
    shape = () if weight is None else tuple(weight.shape)
    count = sum(parameter.numel() for parameter in matrices.values() if parameter is not None)
    return LayerResult(skipped.name, skipped.kind, shape, 0, None, count, count, reason=skipped.reason)
