"""The figures of a result as flat rows of plain values, for CSV files and for tables of a logger.

Every function returns a list of dictionaries with the same keys, which are the column names: ``*_kept`` are shares of
the original between 0 and 1 (``cost_kept`` of what the setting ``cost`` counts), ``params_*`` count parameters,
``flops_*`` multiply-adds per sample, ``latency_*`` are measured seconds per sample, and the losses are in the unit of
the user's loss. What is unknown is None, an empty cell in a CSV file.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lrf_lightning.solver.points.pareto import original_on_front
from lrf_lightning.solver.result import FrontierPoint, LayerCurve, LayerResult
from lrf_lightning.solver.solution import Solution
from lrf_lightning.solver.speed_result import Speed

__all__ = [
    "Row",
    "change_rows",
    "curve_rows",
    "frontier_rows",
    "layer_rows",
    "probe_rows",
    "rank_rows",
    "share",
    "speed_rows",
    "write_csv",
]

Row = dict[str, Any]


def layer_rows(result: Solution) -> list[Row]:
    """One row per layer with a weight matrix, in the model's order; ``reason`` says why a layer was left alone."""
    return [
        {
            "layer": layer.name,
            "kind": layer.kind,
            "shape": "x".join(map(str, layer.shape)),
            "order": layer.order,
            "full_rank": layer.full_rank or None,
            "rank": layer.rank,
            "params_before": layer.params_before,
            "params_after": layer.params_after,
            "flops_before": layer.flops_before or None,
            "flops_after": layer.flops_after or None,
            "latency_before": layer.latency_before,
            "latency_after": layer.latency_after,
            "predicted_change": layer.predicted_change,
            "predicted_error": layer.predicted_error,
            "reason": layer.reason,
        }
        for layer in result.layers
    ]


def frontier_rows(result: Solution) -> list[Row]:
    """The original, and below it one row per measured point from the largest to the smallest.

    Loss and score are those of the selection split; the columns that start with ``verification`` are of the other one.
    Speed-ups are medians of paired ratios of eager PyTorch, dense over compressed, with their 95 % bounds.
    """
    original = FrontierPoint(
        keep=1.0,
        ranks={},
        params_model=result.params_model[0],
        params_layers=result.params_layers[0],
        flops_layers=result.flops_layers[0],
        predicted=0.0,
        predicted_error=0.0,
        loss=result.dense.loss,
        loss_change=0.0,
        loss_change_error=0.0,
        score=result.dense.score,
        score_change=None if result.dense.score is None else 0.0,
        score_change_error=None if result.dense.score is None else 0.0,
        chosen=not result.ranks,
        pareto=original_on_front(result.frontier, result.dense, result.params_model[0]),
    )
    return [_frontier_row(result, point) for point in (original, *result.frontier)]


def _frontier_row(result: Solution, point: FrontierPoint) -> Row:
    certificate = point.certificate
    score = None if certificate is None else certificate.score_change
    flops = None if point.speed is None else point.speed.flops
    return {
        "budget": point.budget,
        "cost_kept": point.keep,
        "params_model": point.params_model,
        "params_model_kept": share(point.params_model, result.params_model[0]),
        "params_layers": point.params_layers,
        "params_layers_kept": share(point.params_layers, result.params_layers[0]),
        "flops_layers": point.flops_layers or None,
        "flops_layers_kept": share(point.flops_layers, result.flops_layers[0]),
        "predicted_change": point.predicted,
        "predicted_error": point.predicted_error,
        "loss": point.loss,
        "loss_change": point.loss_change,
        "loss_change_error": point.loss_change_error,
        "score": point.score,
        "score_change": point.score_change,
        "score_change_error": point.score_change_error,
        "within_range": point.within_range,
        "chosen": point.chosen,
        "pareto": point.pareto,
        "knee": point.knee,
        "verification_loss_change": None if certificate is None else certificate.loss_change.mean,
        "verification_loss_upper": None if certificate is None else certificate.loss_change.upper,
        "verification_score_change": None if score is None else score.mean,
        "verification_score_lower": None if score is None else score.lower,
        "verdict": None if certificate is None else certificate.verdict,
        "flops_model_kept": None if flops is None else share(flops[1], flops[0]),
        **_speedups(point.speed),
    }


def _speedups(speed: Speed | None) -> Row:
    """Times as fast as the original in eager PyTorch, at a single sample and at the largest batch."""
    found: Row = {}
    for size in ("large", "1"):
        timings = [] if speed is None else speed.timings
        fitting = (t for t in timings if t.runtime == "eager" and (t.batch == 1) == (size == "1"))
        timing = next(fitting, None)
        found[f"speedup_batch_{size}"] = None if timing is None else timing.speedup
        found[f"speedup_batch_{size}_lower"] = None if timing is None else timing.lower
        found[f"speedup_batch_{size}_upper"] = None if timing is None else timing.upper
    return found


def rank_rows(result: Solution) -> list[Row]:
    """One row per measured point and factorizable layer: the rank it has there, None where it stays dense."""
    layers = [layer for layer in result.layers if layer.curve is not None]
    return [
        {
            "params_model_kept": share(point.params_model, result.params_model[0]),
            "layer": layer.name,
            "rank": point.ranks.get(layer.name),
            "full_rank": layer.full_rank,
            "chosen": point.chosen,
        }
        for point in result.frontier
        for layer in layers
    ]


def curve_rows(result: Solution, *, most: int | None = None) -> list[Row]:
    """One row per layer and rank: singular value, predicted change of the loss and its parts.

    Args:
        result: the result.
        most: ranks per layer at most, spread evenly on a logarithmic scale; None for all of them.
    """
    rows: list[Row] = []
    for layer in result.layers:
        if layer.curve is not None:
            indices = _spread(_entries(layer.curve), most)
            rows += [_curve_row(layer, layer.curve, index) for index in indices]
    return rows


def _entries(curve: LayerCurve) -> int:
    return max(len(curve.ranks), len(curve.singular_values))


def _curve_row(layer: LayerResult, curve: LayerCurve, index: int) -> Row:
    """Singular values may run up to the full rank, predictions only as far as parameters are saved."""

    def at(values: Sequence[Any]) -> Any:
        return values[index] if index < len(values) else None

    return {
        "layer": layer.name,
        "rank": index + 1,
        "full_rank": layer.full_rank,
        "singular_value": at(curve.singular_values),
        "predicted_change": at(curve.predicted),
        "first_order": at(curve.first_order),
        "first_order_error": at(curve.standard_error),
        "curvature": at(curve.curvature),
        "perturbation": at(curve.perturbation),
        "within_range": at(curve.allowed),
        "chosen": layer.rank == index + 1,
    }


def probe_rows(result: Solution) -> list[Row]:
    """One row per measured truncation of one layer or of several at once: predicted against measured change."""
    curves = {layer.name: layer.curve for layer in result.layers if layer.curve is not None}
    rows: list[Row] = []
    for position, (name, curve) in enumerate(curves.items()):
        if set(curve.probed_with) & set(list(curves)[:position]):
            continue  # its measurements are those of an earlier layer
        together = [name, *curve.probed_with]
        for index, (_, predicted, measured, error) in enumerate(curve.probes):
            ranks = [str(curves[other].probes[index][0]) for other in together]
            rows.append(
                {
                    "layers": " + ".join(together),
                    "ranks": " + ".join(ranks),
                    "predicted_change": predicted,
                    "measured_change": measured,
                    "error": error,
                }
            )
    return rows


def change_rows(result: Solution) -> list[Row]:
    """One row per verification sample on which the models disagree, the largest change of the loss first."""
    return [
        {
            "sample": change.sample,
            "target": change.target,
            "predicted_before": change.predicted_before,
            "predicted_after": change.predicted_after,
            "score_before": change.score_before,
            "score_after": change.score_after,
            "loss_before": change.loss_before,
            "loss_after": change.loss_after,
        }
        for change in result.changes
    ]


def speed_rows(result: Solution) -> list[Row]:
    """One row per figure of speed and size, empty if they were not measured.

    ``ratio`` is compressed over dense, but for a latency the median of the paired ratios of dense over compressed, with
    its 95 % bounds ``lower`` and ``upper``.
    """
    speed = result.speed
    if speed is None:
        return []
    pairs: list[tuple[str, str, tuple[float, float] | None]] = [
        ("size on disk", "bytes", speed.bytes_on_disk),
        ("operations", "FLOP/sample", speed.flops),
        ("peak memory", "bytes", speed.peak_memory),
    ]
    rows = [_speed_row(figure, unit, pair) for figure, unit, pair in pairs if pair is not None]
    for timing in speed.timings:
        where = {"batch": timing.batch, "runtime": timing.runtime}
        bounds = {"ratio": timing.speedup, "lower": timing.lower, "upper": timing.upper}
        rows.append(_speed_row("latency", "s", timing.seconds) | where | bounds)
        rows.append(_speed_row("throughput", "samples/s", timing.throughput) | where)
    return rows


def _speed_row(figure: str, unit: str, pair: tuple[float, float]) -> Row:
    dense, compressed = pair
    known = {
        "figure": figure,
        "unit": unit,
        "dense": dense,
        "compressed": compressed,
        "ratio": share(compressed, dense),
    }
    return {**known, "lower": None, "upper": None, "batch": None, "runtime": None}


def share(part: float, whole: float) -> float | None:
    """The part over the whole, None where the whole is 0 or unknown."""
    return part / whole if whole else None


def _spread(count: int, most: int | None) -> list[int]:
    """Indices below ``count``, all of them or ``most`` that are spread evenly over the logarithm of index + 1."""
    if most is None or count <= most:
        return list(range(count))
    step = math.log(count) / (most - 1)
    return sorted({min(round(math.exp(step * i)), count) - 1 for i in range(most)})


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with a heading; if there are none, no file of an earlier result is left either.

    Raises:
        OSError: if the file cannot be written.
    """
    if not rows:
        path.unlink(missing_ok=True)
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
