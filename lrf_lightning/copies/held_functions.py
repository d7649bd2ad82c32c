"""What holds parts of a module and is left as it is by a deep copy: functions and weak references, in lists as well."""

from __future__ import annotations

import functools
import types
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["rebind", "rebound"]

Memo = Mapping[int, Any]
TREE = frozenset({"_parameters", "_buffers", "_modules"})
ATOMIC = frozenset({bool, bytes, complex, float, int, str, type(None)})
CONTAINERS = frozenset({list, dict, tuple, OrderedDict, defaultdict})
MOST_ITEMS = 1000  # of a container that is looked into; longer ones hold data


def rebind(new: nn.Module, memo: Memo) -> None:
    """Let functions that are hooks or attributes of a copied module refer to the copy where they hold the original."""
    shared = {key for key, value in memo.items() if key == id(value)}
    for module in new.modules():
        for name, value in list(module.__dict__.items()):
            if name in TREE or id(value) in shared:
                continue
            if "_hooks" in name and isinstance(value, dict):
                for key, hook in value.items():
                    value[key] = _bound(hook, memo)
            else:
                module.__dict__[name] = rebound(value, memo)


def rebound(value: Any, memo: Memo, depth: int = 4) -> Any:
    """A value in which what the memo knows is replaced, in lists and dictionaries in place; itself if nothing is."""
    kind = type(value)
    if kind in ATOMIC:
        return value
    if id(value) in memo:
        return memo[id(value)]
    if kind in CONTAINERS:
        return _rebound_items(value, memo, depth) if depth and len(value) <= MOST_ITEMS else value
    if kind is weakref.ref:
        target = value()
        return weakref.ref(memo[id(target)]) if id(target) in memo else value
    if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
        return _bound(value, memo)
    return value


def _rebound_items(value: Any, memo: Memo, depth: int) -> Any:
    if isinstance(value, tuple):
        items = [rebound(item, memo, depth - 1) for item in value]
        return tuple(items) if any(new is not old for new, old in zip(items, value, strict=True)) else value
    for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
        new = rebound(item, memo, depth - 1)
        if new is not item:
            value[key] = new
    return value


def _bound(value: Any, memo: Memo, depth: int = 6) -> Any:
    """A function, or what a function holds, with the copies of what was copied; the value itself if nothing was."""
    if isinstance(value, functools.partial):
        function = _bound(value.func, memo, depth)
        return value if function is value.func else functools.partial(function, *value.args, **value.keywords)
    if isinstance(value, types.MethodType):
        owner = _bound(value.__self__, memo, depth)
        return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
    if not isinstance(value, types.FunctionType):
        # memo also holds constants, and containers under the ids of containers
        return memo.get(id(value), value)
    if not depth:
        return value
    cells = [(cell, _content(cell, memo, depth)) for cell in value.__closure__ or ()]
    defaults = [(old, _bound(old, memo, depth - 1)) for old in value.__defaults__ or ()]
    keywords = {name: (old, _bound(old, memo, depth - 1)) for name, old in (value.__kwdefaults__ or {}).items()}
    if all(old is bound for old, bound in (*cells, *defaults, *keywords.values())):
        return value
    new = types.FunctionType(
        value.__code__,
        value.__globals__,
        value.__name__,
        tuple(bound for _, bound in defaults) if value.__defaults__ is not None else None,
        tuple(bound for _, bound in cells) if value.__closure__ is not None else None,
    )
    new.__kwdefaults__ = {name: bound for name, (_, bound) in keywords.items()} or None
    new.__dict__.update(value.__dict__)
    for name in ("__module__", "__qualname__", "__doc__", "__annotations__"):
        setattr(new, name, getattr(value, name))
    return new


def _content(cell: types.CellType, memo: Memo, depth: int) -> types.CellType:
    """A new cell if its content was copied, the cell itself otherwise."""
    try:
        old = cell.cell_contents
    except ValueError:  # not assigned yet
        return cell
    bound = _bound(old, memo, depth - 1)
    return cell if bound is old else types.CellType(bound)
