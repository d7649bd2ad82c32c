"""A call of a model as the user's loss makes it, which can be repeated with fewer samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lrf_lightning.solver.layers.latency import wait
from lrf_lightning.solver.model_size import parameter_count
from lrf_lightning.solver.running.batch_contents import batch_size, to_device
from lrf_lightning.solver.workspace import Workspace

__all__ = ["ModelCall"]

WEIGHTS_SHARE = 0.9  # of all weights that the part holds which is called instead of the whole


@dataclass(frozen=True)
class ModelCall:
    """A call of a model that can be repeated with fewer samples.

    Attributes:
        model: the model.
        what: ``forward`` or ``step``.
        function: what is called.
        arguments: with which positional and keyword arguments.
        size: samples in them.
        autocast: dtype of automatic mixed precision, None without.
        device: of the model.
    """

    model: nn.Module
    what: str
    function: Callable[..., Any]
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    size: int
    autocast: torch.dtype | None
    device: torch.device

    @classmethod
    def seen(cls, model: nn.Module, work: Workspace, batch: Any) -> ModelCall:
        """What the user's loss calls, the model or the child that holds nearly all weights; else the loss itself."""
        batch, kind = to_device(batch, work.device), work.device.type
        found: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any], torch.dtype | None]] = []

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            mixed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            found.append((module, args, kwargs, mixed))

        handles = [part.register_forward_pre_hook(note, with_kwargs=True) for part in _whole_parts(model)]
        try:
            work.loss(model, to_device(batch, work.device))
        finally:
            for handle in handles:
                handle.remove()
        if sum(module is found[0][0] for module, *_ in found) == 1:
            module, args, kwargs, mixed = found[0]
            return cls(model, "forward", module, (args, kwargs), batch_size(batch), mixed, work.device)
        return cls(model, "step", work.loss, ((model, batch), {}), batch_size(batch), None, work.device)

    def resized(self, size: int) -> ModelCall:
        """The same call with the first samples only."""
        if size >= self.size:
            return self

        def cut(value: Any) -> Any:
            batched = isinstance(value, Tensor) and value.dim() > 0 and len(value) == self.size
            return value[:size] if batched else value

        arguments = pytree.tree_map(cut, self.arguments)
        return ModelCall(self.model, self.what, self.function, arguments, size, self.autocast, self.device)

    def compiled(self) -> ModelCall:
        """The same call through ``torch.compile``."""
        function: Callable[..., Any] = torch.compile(self.function)
        return ModelCall(self.model, self.what, function, self.arguments, self.size, self.autocast, self.device)

    def run(self) -> None:
        """Call once, without waiting for the device."""
        args, kwargs = self.arguments
        if self.what == "step":  # it may change its batch, so every call gets one of its own
            args = (args[0], to_device(args[1], self.device))
        self.function(*args, **kwargs)

    @contextmanager
    def precision(self) -> Iterator[None]:
        """The precision that the call was seen at."""
        with torch.autocast(self.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            yield

    def seconds(self, repeats: int = 1) -> float:
        """Seconds of one call, the mean over some repeats."""
        with self.precision():
            wait(self.device)
            started = time.perf_counter()
            for _ in range(repeats):
                self.run()
            wait(self.device)
            return (time.perf_counter() - started) / repeats


def _whole_parts(model: nn.Module) -> list[nn.Module]:
    """The model, and the children that hold nearly all of its weights."""
    total = parameter_count(model)
    children = [m for m in model.children() if parameter_count(m) >= WEIGHTS_SHARE * total]
    return [model, *children]
