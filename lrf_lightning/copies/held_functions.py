"""Functions that are hooks or attributes of a module and hold parts of it, which a deep copy leaves as they are."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["rebind"]

Memo = Mapping[int, Any]


def rebind(new: nn.Module, memo: Memo) -> None:
    """Let functions that are hooks or attributes of a copied module refer to the copy where they hold the original."""
    for module in new.modules():
        for name, value in list(module.__dict__.items()):
            if isinstance(value, (types.FunctionType, functools.partial)):
                module.__dict__[name] = _bound(value, memo)
            elif "_hooks" in name and isinstance(value, dict):
                for key, hook in value.items():
                    value[key] = _bound(hook, memo)


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
