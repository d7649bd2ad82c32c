"""The record that travels with a compressed model: plain JSON, versioned.

Numbers that JSON does not know are written as the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, which Python's
``float`` understands. Predicted curves are thinned to at most 64 ranks per layer and six digits.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from lrf_lightning import random_state
from lrf_lightning.fingerprint import weights_fingerprint
from lrf_lightning.modules import LowRankModule
from lrf_lightning.solver.result import LayerCurve, LayerResult
from lrf_lightning.solver.solution import Solution

__all__ = [
    "FORMAT_VERSION",
    "CheckpointError",
    "check_record",
    "describe",
    "describe_model",
    "describe_state",
    "parse_record",
    "to_json",
]

FORMAT_VERSION = 3  # 2: the factor of size 1 of a convolution may come first; 3: both may have a part of its kernel
CURVE_POINTS = 64
CURVE_LISTS = ("ranks", "first_order", "standard_error", "curvature", "predicted", "perturbation", "allowed")


class CheckpointError(ValueError):
    """A file of a compressed model cannot be used; the message says which and why."""


def describe(solution: Solution) -> dict[str, Any]:
    """Everything about a solution but its weights, in plain containers.

    Returns:
        ``format_version``, ``library_version``, ``ranks`` of all low-rank layers by name, ``factorized`` (their kind,
        shape of the dense weight, rank, and ``split`` where it has one), ``layers``, ``frontier``, ``dense``
        (on the selection split), ``certificate``, ``judged_weights`` (whether it is about the weights as they are now,
        None if that cannot be told), ``settings``, ``params_model``, ``params_layers``, ``flops_layers``
        and ``latency_layers`` (before and after), ``message``, ``seconds`` and ``samples``. With a warning where the
        weights are not those that were judged.

    Raises:
        CheckpointError: if a low-rank layer could not be loaded again.
    """
    left_out = ("model", "ranks", "layers", "changes", "point_models", "fingerprint")
    plain = {
        field.name: _plain(getattr(solution, field.name))
        for field in dataclasses.fields(solution)
        if field.name not in left_out
    }
    judged = solution.fingerprint == weights_fingerprint(solution.model) if solution.fingerprint else None
    if judged is False:
        warnings.warn(
            "the weights of the compressed model are not those that were judged (it was trained or cast since then): "
            "the description gets judged_weights=false beside the certificate. To save it without one, use "
            "lrf_lightning.save_compressed(result.model, path)",
            stacklevel=3,
        )
    return {
        **describe_model(solution.model),
        **plain,
        "judged_weights": judged,
        "layers": [_layer(layer) for layer in solution.layers],
    }


def describe_model(model: nn.Module) -> dict[str, Any]:
    """What is known about a compressed model itself, with ``certificate`` None: nothing was measured of it.

    Raises:
        CheckpointError: if a low-rank layer could not be loaded again.
    """
    with random_state.preserved():  # dense layers draw weights when they are made
        return _description(_factorized(model))


def describe_state(ranks: Mapping[str, int]) -> dict[str, Any]:
    """The same of weights alone; ``factorized`` is empty, since they do not tell the kinds of the layers.

    Args:
        ranks: rank of every low-rank layer by name.
    """
    return _description({}) | {"ranks": dict(ranks)}


def _description(factorized: dict[str, dict[str, Any]]) -> dict[str, Any]:
    from lrf_lightning import __version__

    return {
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "ranks": {name: layer["rank"] for name, layer in factorized.items()},
        "factorized": factorized,
        "certificate": None,
        "judged_weights": False,
        "message": "These weights have not been judged.",
    }


def to_json(record: Mapping[str, Any]) -> str:
    """Valid JSON of a plain record."""
    return json.dumps(_finite(record), allow_nan=False, indent=1)


def parse_record(text: str, source: str) -> dict[str, Any]:
    """Read a record and check that this version of the library can use it.

    Args:
        text: JSON.
        source: name of the file, for messages.

    Raises:
        CheckpointError: if the text is no record, or one of a future version.
    """
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} holds no readable description of a compressed model: {error}") from error
    return check_record(record, source)


def check_record(record: Any, source: str) -> dict[str, Any]:
    """Check that a record belongs to this library and to a version that it knows.

    Raises:
        CheckpointError: if it does not.
    """
    if not isinstance(record, dict):
        raise CheckpointError(f"{source} was not written by lrf_lightning: its description is no JSON object")
    version = record.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(f"{source} was not written by lrf_lightning: its description has no format_version")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{source} has format version {version}, written by lrf_lightning "
            f"{record.get('library_version', 'of an unknown version')}; this version reads up to {FORMAT_VERSION}. "
            "Update lrf_lightning"
        )
    ranks = record.get("ranks")
    if not isinstance(ranks, dict) or not all(type(rank) is int and rank > 0 for rank in ranks.values()):
        raise CheckpointError(f"{source} is damaged: ranks={ranks!r} is no map from names to whole numbers above 0")
    if not isinstance(record.get("weights_hash"), str) or not isinstance(record.get("factorized"), dict):
        raise CheckpointError(f"{source} is damaged: its description lacks weights_hash or factorized")
    for name, layer in record["factorized"].items():
        if not isinstance(layer, dict) or not isinstance(layer.get("kind"), str) or not _is_shape(layer.get("shape")):
            raise CheckpointError(f"{source} is damaged: it describes the factorized layer {name!r} as {layer!r:.80}")
    return record


def _is_shape(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(type(size) is int and size >= 0 for size in value)


def _factorized(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Every low-rank layer, those of an earlier compression and those that share factors included."""
    found: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LowRankModule):
            computed = [key for key in ("left_factor", "right_factor", "bias") if key not in module._parameters]
            if computed:
                raise CheckpointError(
                    f"{computed[0]} of the layer {name!r} is computed (pruning, a norm or another parametrization) and "
                    "would not load again; make it plain with torch.nn.utils.prune.remove, remove_weight_norm, "
                    "remove_spectral_norm or parametrize.remove_parametrizations"
                )
            dense = module.to_dense()
            shape = [int(size) for size in dense.get_parameter("weight").shape]
            found[name] = {"kind": type(dense).__name__, "shape": shape, "rank": int(module.rank)}
            found[name] |= {} if module.split is None else {"split": module.split}
    return found


def _layer(layer: LayerResult) -> dict[str, Any]:
    fields = {f.name: getattr(layer, f.name) for f in dataclasses.fields(layer) if f.name != "curve"}
    plain: dict[str, Any] = _plain(fields)
    plain["curve"] = None if layer.curve is None else _thinned(layer.curve)
    return plain


def _thinned(curve: LayerCurve) -> dict[str, Any]:
    """The curve at evenly spaced ranks, the last one included; singular value i is that of component ranks[i]."""
    count = len(curve.ranks)
    step = max(1, math.ceil(count / CURVE_POINTS))
    kept = sorted({*range(0, count, step), *([count - 1] if count else [])})
    thinned = {name: [_rounded(getattr(curve, name)[i]) for i in kept] for name in CURVE_LISTS}
    values = curve.singular_values
    thinned["singular_values"] = [_rounded(values[curve.ranks[i] - 1]) for i in kept if curve.ranks[i] <= len(values)]
    thinned["probes"] = _plain(curve.probes)
    thinned["probed_with"] = _plain(curve.probed_with)
    return thinned


def _rounded(value: Any) -> Any:
    value = _plain(value)
    return float(f"{value:.6g}") if isinstance(value, float) and math.isfinite(value) else value


def _plain(value: Any) -> Any:
    """Records, numbers of NumPy and torch and nested containers as what JSON has, but for non-finite floats."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if hasattr(value, "item"):
        return _plain(value.item())
    if callable(value):  # the predicate on layers is recorded by its name
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    raise TypeError(f"{value!r} of type {type(value).__name__} cannot be written as JSON")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
