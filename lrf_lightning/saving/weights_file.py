"""A state dict and its record as one safetensors file, and back, without pickle.

safetensors holds contiguous tensors that share no memory, and strings. So tensors that are shared under several names
are stored once with a list of aliases, and extra state that is no tensor (``get_extra_state``) is stored as JSON with
the tensors in it stored beside the others. The record stands in the header, hence model and description can never come
from two different saves.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as join_tensors
from torch import Tensor

from lrf_lightning.saving.compression_record import CheckpointError, parse_record, to_json

__all__ = ["hash_tensors", "pack", "read_header", "unpack"]

HEADER_KEY = "lrf_lightning"
LARGEST_HEADER = 100_000_000  # bytes; the limit of safetensors


def pack(state_dict: Mapping[str, Any], record: Mapping[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """The bytes of a safetensors file with the weights and the record.

    Args:
        state_dict: tensors, and extra state made of plain containers, numbers, strings, bytes and tensors.
        record: plain description; the keys ``weights_hash``, ``aliases`` and ``extra_state`` are added.

    Returns:
        The bytes, and the completed record.

    Raises:
        CheckpointError: if an entry cannot be stored without pickle; the message names it.
    """
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    extra: dict[str, Any] = {}
    owners: dict[tuple[Any, ...], str] = {}
    for name, value in state_dict.items():
        if not isinstance(value, Tensor):
            extra[name] = _encode(value, name, stored)
            continue
        identity = _identity(value)
        if identity is not None and identity in owners:
            aliases[name] = owners[identity]
            continue
        stored[name] = _storable(value, name)
        if identity is not None:
            owners[identity] = name
    full = {**record, "weights_hash": hash_tensors(stored), "aliases": aliases, "extra_state": extra}
    header = json.dumps(json.loads(to_json(full)), separators=(",", ":"))
    try:
        return join_tensors(stored, metadata={"format": "pt", HEADER_KEY: header}), full
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"the weights cannot be written as safetensors: {error}") from error


def unpack(content: bytes, source: str) -> tuple[OrderedDict[str, Any], dict[str, Any]]:
    """The state dict and the record of a file's content.

    Args:
        content: what :func:`pack` returned.
        source: name of the file, for messages.

    Raises:
        CheckpointError: if the content is truncated, foreign, of a future version, or its weights have another hash.
    """
    record = read_header(content, source)
    try:
        stored = parse_tensors(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{source} is damaged or truncated: {error}") from error
    found = hash_tensors(stored)
    if found != record["weights_hash"]:
        raise CheckpointError(
            f"the weights in {source} were changed after it was written: their hash is {found[:12]}..., "
            f"the description says {record['weights_hash'][:12]}..."
        )
    try:
        state: OrderedDict[str, Any] = OrderedDict(stored)
        for alias, owner in record.get("aliases", {}).items():
            state[alias] = stored[owner]
        for name, code in record.get("extra_state", {}).items():
            state[name] = _decode(code, state)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{source} is damaged: its aliases or extra state refer to {error}") from error
    return state, record


def is_compressed(content: bytes) -> bool:
    """Whether the content of a safetensors file is that of a compressed model, damaged or not."""
    length = int.from_bytes(content[:8], "little")
    return HEADER_KEY.encode() in content[8 : 8 + min(length, LARGEST_HEADER)]


def read_header(content: bytes, source: str) -> dict[str, Any]:
    """The record in the header of a safetensors file; the tensors need not be there yet.

    Raises:
        CheckpointError: if there is none, or it is of a future version.
    """
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > LARGEST_HEADER or content[8:9] != b"{":
        raise CheckpointError(f"{source} is no safetensors file, or it is truncated")
    if len(content) < 8 + length:
        raise CheckpointError(f"{source} is truncated: its header has {length} bytes, the file {len(content)}")
    try:
        metadata = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{source} is no safetensors file: {error}") from error
    if not isinstance(metadata, dict) or HEADER_KEY not in metadata:
        raise CheckpointError(f"{source} was not written by lrf_lightning: its header has no entry {HEADER_KEY!r}")
    return parse_record(metadata[HEADER_KEY], source)


def hash_tensors(tensors: Mapping[str, Any]) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of the tensors in a mapping, whatever their order."""
    digest = hashlib.sha256()
    for name in sorted(name for name, value in tensors.items() if isinstance(value, Tensor)):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def _identity(tensor: Tensor) -> tuple[Any, ...] | None:
    """Equal for two names of the same memory, read in the same way; None where it cannot be told."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.numel() == 0:
        return None
    return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _storable(tensor: Tensor, name: str) -> Tensor:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise CheckpointError(
            f"the tensor {name!r} cannot be stored: it is {tensor.layout}, {tensor.dtype}, on {tensor.device}; "
            "only dense tensors with data can"
        )
    # a clone, since views of one storage (slices of a flat weight) would be refused; expanded tensors become real
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format).resolve_conj().resolve_neg()


def _encode(value: Any, name: str, stored: dict[str, Tensor]) -> dict[str, Any]:
    """Extra state as JSON that says what is what, tensors moved to ``stored``."""
    kind = type(value)
    if isinstance(value, Tensor):
        key = f"{name}.tensor{len(stored)}"
        stored[key] = _storable(value, name)
        return {"tensor": key}
    if kind in (list, tuple):
        return {kind.__name__: [_encode(item, name, stored) for item in value]}
    if kind in (dict, OrderedDict):
        pairs = [[_encode(key, name, stored), _encode(item, name, stored)] for key, item in value.items()]
        return {kind.__name__: pairs}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is float and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or kind in (bool, int, float, str):
        return {"value": value}
    raise CheckpointError(
        f"{name!r} in the state dict is a {kind.__name__}, which cannot be stored without pickle; allowed are tensors "
        "and plain lists, tuples, dicts, numbers, strings and bytes of them"
    )


def _decode(code: Mapping[str, Any], stored: dict[str, Any]) -> Any:
    [(kind, value)] = code.items()
    if kind == "tensor":
        return stored.pop(value)
    if kind in ("list", "tuple"):
        items = [_decode(item, stored) for item in value]
        return items if kind == "list" else tuple(items)
    if kind in ("dict", "OrderedDict"):
        pairs = [(_decode(key, stored), _decode(item, stored)) for key, item in value]
        return dict(pairs) if kind == "dict" else OrderedDict(pairs)
    if kind == "bytes":
        return bytes.fromhex(value)
    return float(value) if kind == "float" else value
