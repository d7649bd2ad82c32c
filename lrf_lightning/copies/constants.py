"""What copies of a model may share: what Python never copies, and large tensors that nobody has written to."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["OPAQUE", "unchanged"]

# deepcopy takes these for constants, and what is behind them is no part of a model
OPAQUE = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType, types.FrameType, types.CodeType)
LARGE = 2**20  # bytes; what is smaller is not worth a comparison


def unchanged(value: Any, other: Any, depth: int = 6) -> Iterator[Any]:
    """Large tensors and arrays of a value that equal those in the same place of another one."""
    if type(value) is not type(other) or value is other or not depth or isinstance(value, nn.Module):
        return
    if isinstance(value, Tensor) or _is_array(value):
        if _is_large(value) and _equal(value, other):
            yield value
    elif isinstance(value, dict):
        for key in value.keys() & other.keys():
            yield from unchanged(value[key], other[key], depth - 1)
    elif isinstance(value, (list, tuple)):
        for one, two in zip(value, other, strict=False):
            yield from unchanged(one, two, depth - 1)
    elif isinstance(getattr(value, "__dict__", None), dict) and not issubclass(type(value), OPAQUE):
        yield from unchanged(value.__dict__, other.__dict__, depth - 1)


def _is_large(value: Any) -> bool:
    if isinstance(value, Tensor):
        plain = type(value) is Tensor and value.layout is torch.strided and not value.is_meta
        return plain and not value.requires_grad and value.numel() * value.element_size() >= LARGE
    return value.nbytes >= LARGE and not value.dtype.hasobject


def _is_array(value: Any) -> bool:
    """Whether a value is an array of NumPy, which need not be installed."""
    kind = type(value)
    return kind.__module__ == "numpy" and kind.__name__ in ("ndarray", "memmap")


def _equal(value: Any, other: Any) -> bool:
    """Whether two tensors or arrays hold the same; one that holds NaN does not."""
    if isinstance(value, Tensor):
        return value.shape == other.shape and value.dtype == other.dtype and torch.equal(value, other.to(value.device))
    return value.shape == other.shape and value.dtype == other.dtype and bool((value == other).all())
