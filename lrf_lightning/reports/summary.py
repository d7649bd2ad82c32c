"""The figures of a result under stable names, as one flat dictionary of numbers.

The names are those of W&B's run summary, of ``trainer.callback_metrics`` and of every other logger:

========================================  ==============================================================================
``compress/params_model_before``          parameters of the whole model; ``_after``; ``_kept`` is their ratio
``compress/params_layers_before``         weight entries of the factorizable layers; ``_after``; ``_kept``
``compress/params_factorized_before``     weight entries of the layers that were factorized; ``_after``; ``_kept``
``compress/flops_layers_before``          multiply-adds per sample of the factorizable layers; ``_after``; ``_kept``
``compress/latency_layers_before``        seconds per sample of the factorizable layers with ``cost="latency"``, added
                                          up from measured layers; ``_after``; ``_kept``
``compress/bytes_on_disk_before``         weights and buffers in a file; ``_after``; ``_kept``
``compress/peak_memory_before``           bytes of a pass with weights and buffers; ``_after``; ``_kept``
``compress/flops_model_before``           operations per sample of the whole model; ``_after``; ``_kept``
``compress/speedup/<call>``               time of the original over that of the compressed model, where the call is
                                          ``eager_batch_1`` or ``eager_batch_large``, or ``compile_`` for
                                          ``torch.compile``; ``_lower`` and ``_upper`` are its 95 % bounds
``compress/latency_dense/<call>``         seconds per call; ``compress/latency_compressed/<call>``
``compress/throughput_dense/<call>``      samples per second; ``compress/throughput_compressed/<call>``
``compress/layers_factorized``            number of layers that are factorized, ``layers_dense`` of factorizable layers
                                          that stay dense, ``layers_left_alone`` of layers that cannot be factorized
``compress/loss_dense``                   loss on the verification split; ``loss_compressed``
``compress/loss_change``                  compressed minus dense, in the loss's unit; ``_error`` is its standard error,
                                          ``_lower`` and ``_upper`` its one-sided bounds at ``compress/confidence``
``compress/loss_margin``                  largest increase that counts as not worse
``compress/loss_dense_scaled``            loss of the original at its best ``compress/temperature``, for classifiers;
                                          ``loss_compressed_scaled`` is the compressed model's at its own best one
``compress/score_dense``                  score on the verification split; ``score_compressed``
``compress/score_change``                 as for the loss, larger is better; ``_error``, ``_lower``, ``_upper``
``compress/score_margin``                 largest fall that counts as not worse
``compress/not_worse``                    1 if the verdict is ``better`` or ``not worse``, 0 otherwise
``compress/unchanged``                    1 if nothing was compressed, 0 otherwise
``compress/selection_loss``               loss of the chosen model on the selection split, for sweeps to compare;
                                          ``compress/selection_score``
``compress/knee_params_model_kept``       share of the parameters at the knee of the front
``compress/holds_params_model_kept``      share of the parameters down to which all verdicts hold together
``compress/samples_needed``               samples that would be expected to decide an inconclusive verdict
``compress/samples_verification``         samples of that split; ``samples_selection``, ``samples_calibration``
``compress/solve_seconds``                wall-clock seconds of the whole solve
``compress/seconds/<stage>``              wall-clock seconds of one stage, such as ``compress/seconds/statistics``
``compress/<format>_bytes``               size of an exported file, ``onnx`` or ``pt2``; ``_dense`` that of the same
                                          model with dense layers
``compress/failed``                       1 if the compression failed, 0 otherwise; in ``trainer.callback_metrics`` only
========================================  ==============================================================================

A figure that is not known is missing; one that is not finite stays as it is.
"""

from __future__ import annotations

from lrf_lightning.reports.tables import share
from lrf_lightning.solver.points.pareto import HOLDS, holding
from lrf_lightning.solver.result import Certificate, Interval
from lrf_lightning.solver.solution import Solution
from lrf_lightning.solver.speed_result import Speed

__all__ = ["HOLDS", "PREFIX", "factorized_params", "summary"]

PREFIX = "compress/"


def summary(result: Solution) -> dict[str, float]:
    """All figures of a result under the names of this module's table."""
    figures: dict[str, float | None] = {}
    pairs: dict[str, tuple[float | None, float | None]] = {
        "params_model": result.params_model,
        "params_layers": result.params_layers,
        "params_factorized": factorized_params(result),
        "latency_layers": result.latency_layers or (None, None),
        "flops_layers": result.flops_layers if result.flops_layers[0] else (None, None),
    }
    pairs |= _size_pairs(result.speed)
    for name, (before, after) in pairs.items():
        figures |= {f"{name}_before": before, f"{name}_after": after}
        figures[f"{name}_kept"] = None if before is None or after is None else share(after, before)
    factorizable = [layer for layer in result.layers if layer.curve is not None]
    figures["layers_factorized"] = len(result.ranks)
    figures["layers_dense"] = sum(layer.rank is None for layer in factorizable)
    figures["layers_left_alone"] = len(result.layers) - len(factorizable)
    figures |= _verdict_figures(result.certificate)
    figures |= _frontier_figures(result)
    figures |= _speed_figures(result.speed)
    figures |= {f"samples_{split}": count for split, count in result.samples.items()}
    figures |= {_stage_name(stage): seconds for stage, seconds in result.seconds.items()}
    return {PREFIX + name: float(value) for name, value in figures.items() if value is not None}


def factorized_params(result: Solution) -> tuple[int, int]:
    """Weight entries of the layers that were factorized, before and after."""
    chosen = [layer for layer in result.layers if layer.rank is not None]
    return sum(layer.params_before for layer in chosen), sum(layer.params_after for layer in chosen)


def _size_pairs(speed: Speed | None) -> dict[str, tuple[float | None, float | None]]:
    if speed is None:
        return {}
    unknown = (None, None)
    return {
        "bytes_on_disk": speed.bytes_on_disk,
        "peak_memory": speed.peak_memory or unknown,
        "flops_model": speed.flops or unknown,
    }


def _speed_figures(speed: Speed | None) -> dict[str, float | None]:
    figures: dict[str, float | None] = {}
    timings = [] if speed is None else speed.timings
    for timing in timings:
        where = f"{timing.runtime}_batch_{'1' if timing.batch == 1 else 'large'}"
        figures |= {
            f"speedup/{where}": timing.speedup,
            f"speedup/{where}_lower": timing.lower,
            f"speedup/{where}_upper": timing.upper,
            f"latency_dense/{where}": timing.seconds[0],
            f"latency_compressed/{where}": timing.seconds[1],
            f"throughput_dense/{where}": timing.throughput[0],
            f"throughput_compressed/{where}": timing.throughput[1],
        }
    return figures


def _stage_name(stage: str) -> str:
    return "solve_seconds" if stage == "total" else f"seconds/{stage.replace(' ', '_')}"


def _frontier_figures(result: Solution) -> dict[str, float | None]:
    chosen = next((point for point in result.frontier if point.chosen), None)
    knee = next((point for point in result.frontier if point.knee), None)
    held = holding(result.frontier)
    before = result.params_model[0]
    return {
        "selection_loss": result.dense.loss if chosen is None else chosen.loss,
        "selection_score": result.dense.score if chosen is None else chosen.score,
        "knee_params_model_kept": None if knee is None else share(knee.params_model, before),
        "holds_params_model_kept": share(held[-1].params_model, before) if held else None,
    }


def _verdict_figures(certificate: Certificate | None) -> dict[str, float | None]:
    if certificate is None:
        return {}
    return {
        "loss_dense": certificate.dense.loss,
        "loss_compressed": certificate.compressed.loss,
        **_interval_figures("loss_change", certificate.loss_change),
        "loss_margin": certificate.loss_margin,
        "loss_dense_scaled": certificate.scaled_dense_loss,
        "loss_compressed_scaled": certificate.scaled_compressed_loss,
        "temperature": certificate.temperature,
        "score_dense": certificate.dense.score,
        "score_compressed": certificate.compressed.score,
        **_interval_figures("score_change", certificate.score_change),
        "score_margin": None if certificate.score_change is None else certificate.score_margin,
        "confidence": certificate.confidence,
        "not_worse": float(certificate.verdict in HOLDS),
        "unchanged": float(certificate.verdict == "unchanged"),
        "samples_needed": certificate.samples_needed,
    }


def _interval_figures(name: str, interval: Interval | None) -> dict[str, float | None]:
    if interval is None:
        return {}
    return {
        name: interval.mean,
        f"{name}_error": interval.standard_error,
        f"{name}_lower": interval.lower,
        f"{name}_upper": interval.upper,
    }
