"""Several half-finished passes through one model, each with the attributes that it has set itself.

Many models keep activations on their modules while they run (``self.skip = x``, ``self.features.append(x)``), or swap
buffers and parameters for a while. A pass that is paused in between must find its own when it goes on, not those of the
pass that ran last. So whenever a pass stops, what it has changed is put aside and the original is put back.

Only what can be seen by identity is covered: attributes, and entries of lists, dictionaries, sets and deques in them.
Values that are changed in place, and objects of other types, stay common to all passes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from operator import is_, itemgetter
from types import TracebackType
from typing import Any

from torch import nn

__all__ = ["Attributes", "OwnAttributes"]

DEPTH = 3
# activations are few: longer ones are vocabularies or data, which would be looked through at every pause
LONGEST = 1000
# what torch gives every module; handles find the hooks by themselves, and replaced modules are not watched
STANDARD = frozenset(nn.Module().__dict__)
COMMON = {name for name in STANDARD if "hook" in name} | {"_modules"}
# parameters that old-style weight and spectral norm and pruning compute a weight of, in every pass
SOURCES = ("_g", "_v", "_orig")


class Attributes:
    """The attributes of all modules of a model as they are now, and the contents of containers in them."""

    def __init__(self, model: nn.Module) -> None:
        containers: dict[int, Any] = {}
        for module in model.modules():
            for name, value in module.__dict__.items():
                if name not in COMMON:
                    containers.update((id(container), container) for container in _containers(value, DEPTH))
        self._modules = [_OriginalModule(module) for module in model.modules()]
        self._containers = [_Original(container) for container in containers.values()]
        # views that follow their dictionaries, so that a look at all entries of all containers takes a few calls
        self._views = [view for container in containers.values() for view in _views(container)]
        self._lengths, self._entries = list(map(len, self._views)), list(chain.from_iterable(self._views))

    def put_aside(self) -> list[tuple[_Original, Any]]:
        """Put everything back, and return what was there instead."""
        changed: list[_Original] = [original for original in self._modules if not original.is_there()]
        if list(map(len, self._views)) != self._lengths or not _same(chain.from_iterable(self._views), self._entries):
            changed += [original for original in self._containers if not original.is_there()]
        return [(original, original.put_back()) for original in changed]


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
        self._watched = itemgetter("training", "_buffers", *watched)
        self._values = self._watched(self.contents)

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


def _containers(value: Any, depth: int) -> Iterator[Any]:
    if depth == 0 or not isinstance(value, (list, dict, set, deque)) or len(value) > LONGEST:
        return
    yield value
    if not isinstance(value, set):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _containers(item, depth - 1)


def _views(container: Any) -> tuple[Any, ...]:
    return (container.keys(), container.values()) if isinstance(container, dict) else (container,)


def _contents(container: Any) -> Any:
    if isinstance(container, dict):
        return dict(container.items())
    return set(container) if isinstance(container, set) else list(container)


def _same(entries: Iterable[Any], others: Iterable[Any]) -> bool:
    """Whether entries are the same objects, as far as both go; values need not be comparable."""
    return all(map(is_, entries, others))
