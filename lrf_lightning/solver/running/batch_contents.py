"""What a batch of any type holds: how many samples, which tensors, and a copy of it on a device."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections import UserDict
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral, Number
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["batch_size", "own_copy", "picked", "tensors", "to_device"]

logger = logging.getLogger(__name__)

SIZES = ("num_graphs", "batch_size")  # names under which a user's object may say how many samples it holds


def batch_size(batch: Any) -> int:
    """Number of samples in a batch.

    A batch, or a part of it, may say it itself, as those of PyTorch Geometric do (``num_graphs``, ``batch_size``).
    Where it consists of lists with an entry for every sample, as those of torchvision's detectors do, or of such a list
    beside tensors with a row for every one, it is their length. Otherwise it is the first dimension of the first tensor
    found in the batch.

    Raises:
        ValueError: if it is none of these, since the batch holds no tensor with at least one dimension, or no sample.
    """
    size = _said_size(batch) or _listed_samples(batch) or next(_sizes(batch), None)
    if size is None and callable(getattr(batch, "to_dict", None)):  # a single graph does not say that it is one of many
        try:
            size = next(_sizes(batch.to_dict()), None)
        except Exception:  # the user's types
            logger.debug("%s.to_dict() failed", type(batch).__name__, exc_info=True)
    if size is None:
        raise ValueError(
            f"a batch of type {type(batch).__name__} holds no tensor with a batch dimension, "
            "so its samples cannot be counted; let the loader yield tensors whose first dimension is the batch, "
            "or an object with a number batch_size"
        )
    if size == 0:
        raise ValueError(
            f"a batch of type {type(batch).__name__} holds no sample, since its first tensor has none; let the loader "
            "leave empty batches out"
        )
    return size


def _said_size(part: Any) -> int | None:
    """What an object of the user's says about the number of its samples, None if it says nothing."""
    if isinstance(part, Tensor):
        return None
    for name in SIZES:
        try:
            size = getattr(part, name, None)
        except Exception:  # the user's property
            continue
        if isinstance(size, Tensor) and size.dim() == 0 and not size.is_floating_point():
            size = int(size)
        if isinstance(size, Integral) and not isinstance(size, bool) and int(size) > 0:
            return int(size)
    return None


def _sizes(batch: Any) -> Iterator[int]:
    """What the parts of a nested batch tell about the number of samples, in their order."""
    size = _said_size(batch)
    if size is not None:
        yield size
    elif isinstance(batch, Tensor):
        if batch.dim() > 0:
            yield int(batch.shape[0])
    else:
        for part in _members(batch):
            yield from _sizes(part)


def _listed_samples(batch: Any) -> int | None:
    """The common length of the lists and tensors that a batch consists of, None if they are not about samples.

    There are at least two of them, and one is a list. They are about samples if each list holds tensors of one rank, or
    dictionaries, or other values, and if either there are such others or tensors of a list differ in their first
    dimension. Lists of inputs that all have a row for every sample do not.
    """
    parts = list(batch.values()) if isinstance(batch, Mapping) else batch
    if not isinstance(parts, (list, tuple)) or len(parts) < 2:
        return None
    lists = [part for part in parts if isinstance(part, (list, tuple))]
    rows = [part for part in parts if isinstance(part, Tensor) and part.dim() > 0]
    if not lists or len(lists) + len(rows) < len(parts) or len({len(part) for part in parts}) > 1 or not lists[0]:
        return None
    told = False
    for entries in lists:
        shapes = {item.shape for item in entries if isinstance(item, Tensor)}
        if not shapes:
            told = told or not any(isinstance(item, (list, tuple)) for item in entries)
        elif all(isinstance(item, Tensor) for item in entries) and len({len(shape) for shape in shapes}) == 1:
            told = told or len({shape[:1] for shape in shapes}) > 1
        else:
            return None
    return len(lists[0]) if told else None


def to_device(batch: Any, device: torch.device) -> Any:
    """A copy of a nested batch on a device, which a step may change without harm to those that get the batch later.

    Containers and tensors are copied also where they are on the device already: a list of batches is run through dozens
    of times, and the passes of several models share a batch. Beside the pass itself a copy costs next to nothing.
    Values of other types pass unchanged, except that what has a method ``to`` is copied and moved by it.
    """
    return _moved(batch, device, {})


def own_copy(batch: Any) -> Any:
    """A deep copy for somebody who may change it; the batch itself if it cannot be copied."""
    try:
        return copy.deepcopy(batch)
    except Exception:  # the user's types; tensors inside a graph
        return batch


def _moved(batch: Any, device: torch.device, known: dict[int, Tensor]) -> Any:
    """Like :func:`to_device`; a tensor that is ``known`` by its id stays one tensor, such as an input as target."""
    if isinstance(batch, Tensor):
        if id(batch) not in known:
            own = batch.detach().to(device, copy=True)
            known[id(batch)] = own.requires_grad_() if batch.requires_grad else own
        return known[id(batch)]
    if not isinstance(batch, (dict, UserDict, nn.Module)) and hasattr(batch, "to"):
        return own_copy(batch).to(device)
    if _is_container(batch):
        return _rebuilt(batch, [_moved(value, device, known) for value in _members(batch)])
    return own_copy(batch)


def _rebuilt(container: Any, values: Sequence[Any]) -> Any:
    """A container with other members, in the order of :func:`_members`."""
    if isinstance(container, Mapping):
        return _filled(container, dict(zip(container, values, strict=True)))
    if isinstance(container, tuple) and hasattr(container, "_fields"):
        return type(container)(*values)
    if isinstance(container, (list, tuple)):
        return type(container)(values)
    changed = copy.copy(container)
    for item, value in zip(dataclasses.fields(container), values, strict=True):
        object.__setattr__(changed, item.name, value)  # the way around __init__ and frozen
    return changed


def _filled(mapping: Any, values: dict[Any, Any]) -> Any:
    """A copy of a mapping with other values; a plain dictionary if its type allows neither that nor making one."""
    try:
        filled = copy.copy(mapping)
        for key, value in values.items():
            filled[key] = value
        return filled
    except Exception:  # the user's types
        logger.debug("A %s cannot be copied", type(mapping).__name__, exc_info=True)
    try:
        return type(mapping)(values)
    except Exception:
        return values


def picked(batch: Any, index: Sequence[int], *, whole: bool = True) -> tuple[Any, bool]:
    """A nested batch with other of its samples, and whether all that is in it was that of samples.

    Args:
        batch: a batch, or a part of it.
        index: for every place the number of the sample that comes there, as many as the batch has samples.
        whole: whether it is the batch itself, whose parts are not samples.
    """
    if isinstance(batch, Tensor):
        if batch.dim() == 0:
            return batch, True
        if batch.layout is not torch.strided or len(batch) != len(index):
            return batch, False
        return batch.detach()[list(index)], True
    if batch is None or isinstance(batch, (str, bytes, Number)):
        return batch, True
    if not _is_container(batch):
        return _picked_attributes(batch, index)
    members = list(_members(batch))
    listed = isinstance(batch, (list, tuple)) and not whole and len(members) == len(index)
    if listed and not any(isinstance(part, Tensor) and part.shape[:1] == (len(index),) for part in members):
        return _rebuilt(batch, [members[i] for i in index]), True
    parts = [picked(part, index, whole=False) for part in members]
    return _rebuilt(batch, [part for part, _ in parts]), all(complete for _, complete in parts)


def _picked_attributes(batch: Any, index: Sequence[int]) -> tuple[Any, bool]:
    attributes = getattr(batch, "__dict__", None)
    if not isinstance(attributes, dict) or not attributes:
        return batch, False
    parts = {name: picked(value, index, whole=False) for name, value in attributes.items()}
    changed = copy.copy(batch)
    changed.__dict__.update({name: value for name, (value, _) in parts.items()})
    return changed, all(complete for _, complete in parts.values())


def tensors(batch: Any) -> Iterator[Tensor]:
    """All tensors of a nested batch, in the order in which they stand there; the user's own objects are not opened."""
    if isinstance(batch, Tensor):
        yield batch
    else:
        for part in _members(batch):
            yield from tensors(part)


def _is_container(value: Any) -> bool:
    of_fields = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return isinstance(value, (Mapping, list, tuple)) or of_fields


def _members(batch: Any) -> Iterator[Any]:
    """What a container holds, nothing for other values."""
    if isinstance(batch, Mapping):
        yield from batch.values()
    elif isinstance(batch, (list, tuple)):
        yield from batch
    elif _is_container(batch):
        for item in dataclasses.fields(batch):
            yield getattr(batch, item.name)
