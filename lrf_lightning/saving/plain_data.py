"""Turn what a checkpoint holds beside its weights into what ``torch.load(weights_only=True)`` accepts."""

from __future__ import annotations

from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor

__all__ = ["plain"]

_NOTHING = object()


def plain(value: Any, name: str, dropped: list[str]) -> Any:
    """Plain containers, numbers, strings and tensors that say the same as ``value``, as far as that is possible.

    Configurations of omegaconf become dicts and lists, numbers and arrays of NumPy become numbers and lists, members of
    enumerations that are strings or numbers become these, paths become strings, sets become lists.

    Args:
        value: anything, such as the hyper-parameters of a module.
        name: what it is called, for the list.
        dropped: receives the name of every part that was left out because it has no plain form, such as a function.

    Returns:
        The plain value, None where nothing of it could be kept.
    """
    result = _convert(value, name, dropped)
    return None if result is _NOTHING else result


def _convert(value: Any, name: str, dropped: list[str]) -> Any:
    value = _unwrapped(value)
    if isinstance(value, Mapping):
        return _mapping(value, name, dropped)
    if isinstance(value, (list, tuple, set, frozenset)):
        return _sequence(value, name, dropped)
    result = _single(value)
    if result is _NOTHING:
        dropped.append(name)
    return result


def _unwrapped(value: Any) -> Any:
    """Containers and numbers of other libraries as Python's own."""
    home = type(value).__module__.partition(".")[0]
    if home == "omegaconf":
        return _from_omegaconf(value)
    if home == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    return vars(value) if isinstance(value, Namespace) else value


def _single(value: Any) -> Any:
    if value is None or isinstance(value, (bool, torch.dtype, torch.device, torch.Size)):
        return value
    if isinstance(value, Tensor):
        return value.detach()
    # subclasses, such as enumerations, would be pickled by the name of their class
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (int, float)):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, bytes):
        return bytes(value)
    return str(value) if isinstance(value, PurePath) else _NOTHING


def _mapping(value: Mapping[Any, Any], name: str, dropped: list[str]) -> dict[Any, Any]:
    result: dict[Any, Any] = OrderedDict() if type(value) is OrderedDict else {}
    for key, item in value.items():
        label = f"{name}.{key}"
        plain_key = _single(key) if not isinstance(key, tuple) else _sequence(key, label, dropped)
        plain_item = _convert(item, label, dropped)
        if plain_key is _NOTHING:
            dropped.append(label)
        elif plain_item is not _NOTHING:
            result[plain_key] = plain_item
    return result


def _sequence(value: Iterable[Any], name: str, dropped: list[str]) -> Any:
    items = [_convert(item, f"{name}[{i}]", dropped) for i, item in enumerate(value)]
    if any(item is _NOTHING for item in items):
        return _NOTHING  # a shorter sequence would say something else
    return tuple(items) if type(value) is tuple else items


def _from_omegaconf(value: Any) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not OmegaConf.is_config(value):
        return value
    try:
        return OmegaConf.to_container(value, resolve=True)
    except OmegaConfBaseException:  # an interpolation that means nothing here stays as its text
        return OmegaConf.to_container(value, resolve=False)
