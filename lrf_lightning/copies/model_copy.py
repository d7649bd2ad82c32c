"""Copies of models with whatever users keep in their attributes: locks, open files, data sets, the trainer, closures.

``copy.deepcopy`` raises at what cannot be copied, copies gigabytes of data together with the weights, and leaves
functions as they are, so that a closure of the copy still calls the original. Here

* attributes that cannot be copied are shared;
* so are the trainer and, as long as they do not refer to a part of the model, data sets, loaders, samplers, and
  datamodules, loggers and callbacks of Lightning;
* tensors that hang on a graph are copied without it;
* functions that are hooks or attributes of a module, and whose closure or defaults hold a part of the model, are bound
  to that part of the copy.

Everything else is copied as ``copy.deepcopy`` does it; what refers to a part of the model refers to that of the copy.
"""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from lrf_lightning.copies.constants import OPAQUE, unchanged
from lrf_lightning.copies.held_functions import rebind

__all__ = ["copied_model", "shareable"]

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)
Memo = dict[int, Any]

TRAINERS = frozenset({"Trainer", "Fabric"})
# of Lightning, by name, so that it need not be installed
DATA = frozenset({"Callback", "LightningDataModule", "Logger"})
LIGHTNING = ("lightning.", "lightning_fabric.", "pytorch_lightning.")
ATOMIC = frozenset({bool, bytes, complex, float, int, str, type(None)})
TORCHS_OWN = frozenset(nn.Module().__dict__)
LIGHTNINGS_OWN = frozenset({"_fabric", "_trainer"})


def copied_model(
    model: Model,
    shared: Mapping[int, Any] | None = None,
    *,
    data: bool = True,
    copier: Callable[[Model, Memo], Model] = copy.deepcopy,
) -> Model:
    """A deep copy of a model, see the module.

    Args:
        model: any module; it is not changed.
        shared: what stands in for some objects, by their ``id``, as in :func:`copy.deepcopy`; often the objects
            themselves, as :func:`shareable` finds them.
        data: whether data sets and the like are shared; the trainer always is.
        copier: makes the copy, and enters into the dictionary it is given what it has copied.

    Raises:
        Exception: what the copying raises if it is not about an attribute that cannot be copied.
    """
    given = {**_services(model, shared or {}, data=data), **(shared or {})}
    for child in model.modules():
        for tensor in _graph_tensors(child.__dict__):
            given.setdefault(id(tensor), tensor.detach().clone())
    memo = dict(given)
    try:
        new = copier(model, memo)
    except Exception as error:  # an object's own code may raise anything
        uncopyable = _uncopyable(model, given)
        logger.info("The copy of the module shares attributes that cannot be copied (%s): %s", error, list(uncopyable))
        memo = given | {id(value): value for value in uncopyable.values()}
        new = copier(model, memo)
    rebind(new, memo)
    return new


def shareable(model: nn.Module, original: nn.Module) -> dict[int, Any]:
    """What many copies of a model may share with it, by its ``id``.

    That is all that :func:`copied_model` shares, and constants. Those are large tensors and arrays in attributes. A
    step may write to them, such as to a bank of features; here they must still equal those of ``original`` after the
    model was run and the original was not. Steps that have not run by then may write to them, so models that leave the
    solver must not share them.

    Args:
        model: the model that will be copied.
        original: what it was copied from, before it was run.
    """
    found = _services(model, {}, data=True)
    modules, tree = dict(original.named_modules()), _parts(model)
    for name, module in model.named_modules():
        other = modules.get(name)
        if other is not None and type(other) is type(module):
            constants = unchanged(_own(module), _own(other))
            found |= {id(value): value for value in constants if not _belongs(value, tree)}
    return found | {id(value): value for value in _uncopyable(model, found).values()}


def _services(model: nn.Module, known: Mapping[int, Any], *, data: bool) -> Memo:
    """The trainer, and data that does not refer to a part of the model, wherever they hang in the attributes."""
    attributes = [value for module in model.modules() for value in _own(module).values()]
    reachable = list(_reachable(attributes, known))
    found = {id(value): value for value in reachable if _is_one_of(value, TRAINERS)}
    if data:
        tree = _parts(model)
        for value in filter(_is_data, reachable):
            if not any(id(part) in tree for part in _reachable([value])):
                found[id(value)] = value
    return found


def _own(module: nn.Module) -> dict[str, Any]:
    """The attributes that the user's code has given to a module; Lightning gives no trainer to its copies."""
    return {name: value for name, value in module.__dict__.items() if name not in TORCHS_OWN | LIGHTNINGS_OWN}


def _parts(model: nn.Module) -> set[int]:
    """Modules, parameters and buffers of a model, and the storages of the latter, by their identity."""
    tensors = [*model.parameters(), *model.buffers()]
    return {id(part) for part in (*model.modules(), *tensors)} | {_storage(tensor) for tensor in tensors}


def _belongs(value: Any, tree: set[int]) -> bool:
    """Whether a tensor is a part of the model or a view of one."""
    return id(value) in tree or (isinstance(value, Tensor) and _storage(value) in tree)


def _storage(tensor: Tensor) -> int:
    """The address of a tensor's memory, -1 if it has none."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return (tensor.untyped_storage().data_ptr() if plain else 0) or -1


def _reachable(values: Iterable[Any], known: Mapping[int, Any] | None = None) -> Iterator[Any]:
    """All objects that a deep copy of the values may meet, and maybe more; not beyond modules, tensors and trainers.

    What is ``known`` by its ``id`` is passed over.
    """
    waiting, seen = list(values), dict(known or {})
    while waiting:
        value = waiting.pop()
        kind = type(value)  # isinstance asks the object too, and some build what they stand for when asked
        if kind in ATOMIC or id(value) in seen or issubclass(kind, OPAQUE):
            continue
        seen[id(value)] = value
        yield value
        if not issubclass(kind, (nn.Module, Tensor)) and not _is_one_of(value, TRAINERS):
            waiting += gc.get_referents(value)


def _is_one_of(value: Any, names: frozenset[str]) -> bool:
    """Whether a value is of one of these classes of Lightning."""
    kinds = type(value).__mro__
    return any(kind.__name__ in names and kind.__module__.startswith(LIGHTNING) for kind in kinds)


def _is_data(value: Any) -> bool:
    return issubclass(type(value), (DataLoader, Dataset, Sampler)) or _is_one_of(value, DATA)


def _uncopyable(model: nn.Module, given: Memo) -> dict[str, Any]:
    """Attributes by qualified name, torch's own left out, whose deep copy fails."""
    # what refers back to the modules shall not fail because of their other attributes
    known = given | {id(child): child for child in model.modules()}
    return {
        f"{prefix}.{name}".lstrip("."): value
        for prefix, child in model.named_modules()
        for name, value in _own(child).items()
        if not _can_be_copied(value, known)
    }


def _can_be_copied(value: Any, known: Memo) -> bool:
    try:
        copy.deepcopy(value, dict(known))
    except Exception:  # an object's own code may raise anything
        return False
    return True


def _graph_tensors(value: Any, depth: int = 4) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.grad_fn is not None:
            yield value
    elif depth and isinstance(value, (dict, list, tuple, set)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _graph_tensors(item, depth - 1)
