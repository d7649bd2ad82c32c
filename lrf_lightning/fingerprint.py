"""A digest of content: tensors by their bytes, containers by what they hold. Equal content gives equal digests."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["UnknownContentError", "fingerprint", "weights_fingerprint"]

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, PurePath, enum.Enum)


class UnknownContentError(TypeError):
    """There is no digest for an object, since it is not known what belongs to its content."""


def fingerprint(*values: Any) -> str:
    """A digest of 16 hexadecimal digits.

    Args:
        values: tensors, arrays, modules (structure and state), plain values, and nested containers of these.
            An iterable that is no container is run through, such as a DataLoader.

    Raises:
        UnknownContentError: for any other object.
    """
    digest = hashlib.sha256()
    for value in values:
        _add(digest, value)
    return digest.hexdigest()[:16]


def weights_fingerprint(model: nn.Module) -> str:
    """A digest of the state dict of a model, the same on every device; empty if it has content that is not read."""
    try:
        return fingerprint(dict(model.state_dict()))
    except (UnknownContentError, RuntimeError):  # torch refuses the bytes of some kinds of tensors
        return ""


def _add(digest: Any, value: Any) -> None:
    _mark(digest, type(value).__name__)
    if isinstance(value, PLAIN):
        _mark(digest, repr(value))
    elif isinstance(value, Tensor):
        _add_tensor(digest, value)
    elif type(value).__module__ == "numpy":
        _add_tensor(digest, torch.as_tensor(value))
    elif isinstance(value, nn.Module):
        _mark(digest, repr(value))
        _add(digest, dict(value.state_dict()))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        _add_all(digest, ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value)))
    elif isinstance(value, Mapping):
        _add_all(digest, value.items())
    elif isinstance(value, (set, frozenset)):
        _add_all(digest, sorted(value, key=repr))
    elif isinstance(value, Iterable):
        _add_all(digest, value)
    else:
        raise UnknownContentError(f"the content of a {type(value).__name__} cannot be told")


def _add_all(digest: Any, values: Iterable[Any]) -> None:
    for value in values:
        _add(digest, value)
    _mark(digest, "end")


def _add_tensor(digest: Any, tensor: Tensor) -> None:
    if tensor.is_sparse or tensor.is_quantized or tensor.is_meta:
        raise UnknownContentError(f"the content of a tensor of layout {tensor.layout} on {tensor.device} is not read")
    _mark(digest, f"{tensor.dtype} {tuple(tensor.shape)}")
    # bytes, since NumPy has no bfloat16
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())


def _mark(digest: Any, text: str) -> None:
    digest.update(f"{len(text)}:{text};".encode())
