"""Several half-finished passes through one model, each with the attributes that it has set itself.

Many models keep activations on their modules while they run (``self.skip = x``, ``self.features.append(x)``), or swap
buffers and parameters for a while. A pass that is paused in between must find its own when it goes on, not those of the
pass that ran last. So whenever a pass stops, what it has changed is put aside and the original is put back.

Only what can be seen by identity is covered: attributes, entries of lists, dictionaries, sets and deques in them or in
what a forward hook refers to, and attributes of a user's own objects there that hold tensors. Values that are changed
in place, and other objects, stay common to all passes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from operator import is_, itemgetter
from types import CellType, FunctionType, MethodType, ModuleType, TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

__all__ = ["Attributes", "OwnAttributes"]

T = TypeVar("T")


class _Missing:
    """No attribute of that name."""


MISSING = _Missing()
# values that say something of the tensors beside them
PLAIN = (Tensor, int, float, complex, str, bytes, tuple, torch.dtype, torch.device, type(None), _Missing)

DEPTH = 3
# activations are few: longer ones are vocabularies or data, which would be looked through at every pause
LONGEST = 1000
MOST_ENTRIES = 100_000  # of all containers of a model, but for its buffers and parameters
# what torch gives every module; handles find the hooks by themselves, and replaced modules are not watched
STANDARD = frozenset(nn.Module().__dict__)
COMMON = {name for name in STANDARD if "hook" in name} | {"_modules"}
# parameters that old-style weight and spectral norm and pruning compute a weight of, in every pass
SOURCES = ("_g", "_v", "_orig")
# packages whose objects are no place for activations
LIBRARIES = frozenset(
    {"builtins", "collections", "functools", "lightning", "logging", "numpy", "pytorch_lightning", "threading", "torch"}
)


class Attributes:
    """The attributes of all modules of a model as they are now, and the contents of containers in them."""

    def __init__(self, model: nn.Module) -> None:
        modules = [module for module in model.modules() if _is_watched(module)]
        found = _Containers()
        for module in modules:
            found.add_whole(module.__dict__["_buffers"], module.__dict__["_parameters"])
        for module in modules:
            values = [value for name, value in module.__dict__.items() if name not in COMMON]
            hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
            for value in chain(values, *(_referents(hook) for hook in hooks)):
                found.add(value)
        self._modules = [_OriginalModule(module) for module in modules]
        self._containers = found.originals()
        # views that follow their dictionaries, so that a look at all entries of all containers takes a few calls
        self._views = [view for original in self._containers for view in _views(original.container)]
        self._lengths, self._entries = list(map(len, self._views)), list(chain.from_iterable(self._views))

    def put_aside(self) -> list[tuple[_Original, Any]]:
        """Put everything back, and return what was there instead."""
        changed: list[_Original] = [original for original in self._modules if not original.is_there()]
        if list(map(len, self._views)) != self._lengths or not _same(chain.from_iterable(self._views), self._entries):
            changed += [original for original in self._containers if not original.is_there()]
        return [(original, original.put_back()) for original in changed]

    def found(self, kind: type[T]) -> list[T]:
        """The attributes of modules, and the entries of containers in them, that are of a kind."""
        values = chain(*(module.own_values() for module in self._modules), self._entries)
        return [value for value in values if issubclass(type(value), kind)]  # a dead proxy bears no isinstance


class OwnAttributes:
    """What one pass has changed, there while this context is entered, which may be done again and again.

    Args:
        attributes: those of the model before any pass.
    """

    def __init__(self, attributes: Attributes) -> None:
        self._attributes = attributes
        self._own: list[tuple[_Original, Any]] = []

    def __enter__(self) -> None:
        for original, own in self._own:
            original.put(own)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._own = self._attributes.put_aside()


class _Original:
    """A list, dictionary, set or deque and its contents."""

    def __init__(self, container: Any) -> None:
        self.container, self.contents = container, _contents(container)
        self._entries = [entry for view in _views(container) for entry in view]

    def is_there(self) -> bool:
        """Whether the contents are the original ones."""
        entries = [entry for view in _views(self.container) for entry in view]
        return len(entries) == len(self._entries) and _same(entries, self._entries)

    def put_back(self) -> Any:
        """Restore the contents; returns those that were there."""
        others = _contents(self.container)
        self.put(self.contents)
        return others

    def put(self, contents: Any) -> None:
        """Give the container other contents."""
        self.container.clear()
        (self.container.update if isinstance(contents, (dict, set)) else self.container.extend)(contents)


class _OriginalObject(_Original):
    """The attributes of an object, if it holds tensors: others may be files and connections.

    Flags, numbers and sizes that may speak of the tensors belong to them.
    """

    def is_there(self) -> bool:
        return not self._changed()

    def put_back(self) -> Any:
        changed = self._changed()
        others = {name: self.container.get(name, MISSING) for name in changed}
        self.put({name: self.contents.get(name, MISSING) for name in changed})
        return others

    def put(self, contents: Any) -> None:
        for name, value in contents.items():
            if value is MISSING:
                self.container.pop(name, None)
            else:
                self.container[name] = value

    def _changed(self) -> list[Any]:
        now, before = self.container, self.contents
        if not any(issubclass(type(value), Tensor) for value in chain(now.values(), before.values())):
            return []
        pairs = {name: (now.get(name, MISSING), before.get(name, MISSING)) for name in now.keys() | before.keys()}
        return [name for name, pair in pairs.items() if pair[0] is not pair[1] and all(map(_is_plain, pair))]


class _OriginalModule(_Original):
    """The attributes of a module.

    Weights that every pass computes from parameters are no pass's own: they would take as much memory as the whole
    model for every pass.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module.__dict__)
        computed = {name.removesuffix(end) for name in module._parameters for end in SOURCES if name.endswith(end)}
        self._computed = computed & set(self.contents)
        watched = self.contents.keys() - STANDARD - self._computed
        mode = {"training"} & self.contents.keys()  # a class may have a property of that name
        self._watched = itemgetter("_buffers", "_parameters", *(watched | mode))
        self._values = self._watched(self.contents)

    def own_values(self) -> list[Any]:
        """What is neither torch's nor computed in every pass."""
        return [self.contents[name] for name in self.contents.keys() - STANDARD - self._computed]

    def is_there(self) -> bool:
        attributes = self.container
        try:
            # a new attribute makes them more, unless another one is gone
            return len(attributes) == len(self.contents) and _same(self._watched(attributes), self._values)
        except KeyError:
            return False

    def put_back(self) -> Any:
        others = super().put_back()
        for name in self._computed:
            others.pop(name, None)
        return others

    def put(self, contents: Any) -> None:
        computed = {name: self.container[name] for name in self._computed if name in self.container}
        super().put(contents | computed)


class _Containers:
    """Containers that are found in values, each once, and whether they are the attributes of an object."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[Any, bool]] = {}
        self._entries = 0

    def add_whole(self, *containers: Any) -> None:
        """Add containers of any length, whose entries are not opened."""
        self._found.update((id(container), (container, False)) for container in containers)

    def add(self, value: Any, depth: int = DEPTH) -> None:
        """Add what there is in a value, down to a depth."""
        if issubclass(type(value), (list, dict, set, deque)):
            self._add(value, depth, of_object=False)
        attributes = _attributes_of_users(value)
        if attributes is not None:
            self._add(attributes, depth, of_object=True)

    def originals(self) -> list[_Original]:
        """All of them as they are now."""
        return [(_OriginalObject if of_object else _Original)(each) for each, of_object in self._found.values()]

    def _add(self, container: Any, depth: int, *, of_object: bool) -> None:
        if depth == 0 or id(container) in self._found or len(container) > LONGEST or self._entries > MOST_ENTRIES:
            return
        self._entries += len(container)
        self._found[id(container)] = container, of_object
        if not isinstance(container, set):
            for item in list(container.values() if isinstance(container, dict) else container):
                self.add(item, depth - 1)


def _attributes_of_users(value: Any) -> dict[str, Any] | None:
    """The attributes of an object of the user's own, None for other values."""
    kind = type(value)  # a proxy may claim another one, or none any more
    libraries = (nn.Module, Tensor, type, ModuleType, FunctionType, MethodType)
    if issubclass(kind, libraries) or kind.__module__.partition(".")[0] in LIBRARIES:
        return None
    try:
        attributes = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return attributes if isinstance(attributes, dict) else None


def _referents(function: Any, depth: int = 2) -> Iterator[Any]:
    """What a hook may write to: the object that it is a method of, what it is bound to, its closure and globals."""
    if isinstance(function, partial):
        yield from (*function.args, *function.keywords.values())
        function = function.func
    if isinstance(function, MethodType):
        yield function.__self__
        function = function.__func__
    if not isinstance(function, FunctionType):
        yield function
        return
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    names = [function.__globals__.get(name) for name in function.__code__.co_names]
    for value in (*cells, *(value for value in names if isinstance(value, (list, dict, set, deque)))):
        if isinstance(value, (FunctionType, MethodType, partial)):
            if depth:
                yield from _referents(value, depth - 1)
        else:
            yield value


def _is_plain(value: Any) -> bool:
    return issubclass(type(value), PLAIN)


def _is_filled(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:  # of a variable that has no value yet
        return False
    return True


def _is_watched(module: nn.Module) -> bool:
    """Whether the attributes of a module are its own: the first pass makes another layer of one that is still lazy."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    return not (isinstance(module, LazyModuleMixin) and module.has_uninitialized_params())


def _views(container: Any) -> tuple[Any, ...]:
    return (container.keys(), container.values()) if isinstance(container, dict) else (container,)


def _contents(container: Any) -> Any:
    if isinstance(container, dict):
        return dict(container.items())
    return set(container) if isinstance(container, set) else list(container)


def _same(entries: Iterable[Any], others: Iterable[Any]) -> bool:
    """Whether entries are the same objects, as far as both go; values need not be comparable."""
    return all(map(is_, entries, others))
