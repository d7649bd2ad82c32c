"""Buffers of a model that are as before after its steps have written to them.

Some steps keep state in buffers: the queue of a contrastive loss, a memory bank, counters. Two models could not be
compared if each were judged with the buffers that the other evaluations have left behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["restored_buffers"]


@contextmanager
def restored_buffers(model: nn.Module) -> Iterator[None]:
    """Put all buffers of a model back afterwards: the objects and their values.

    A module whose buffers got other names or shapes gets its other attributes back too, since they may speak of them:
    ``self.longest = 2048`` beside a table of positions that was made for that length.

    Args:
        model: any model; a copy of its buffers is kept in memory on their device.
    """
    values = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if _is_writable(buffer)]
    restorers = [_restorer(module) for module in model.modules() if isinstance(module.__dict__.get("_buffers"), dict)]
    try:
        yield
    finally:
        for restore in restorers:
            restore()
        with torch.no_grad():
            # compared with nothing: what is written past autograd leaves no sign, and a comparison waits for the device
            for buffer, value in values:
                if buffer.shape == value.shape:
                    buffer.copy_(value)
                else:
                    buffer.data = value


def _is_writable(buffer: Tensor) -> bool:
    """Whether values can be written to a buffer, and so be restored."""
    if is_lazy(buffer) or buffer.is_meta:
        return False
    if buffer.is_inference() and not torch.is_inference_mode_enabled():
        return False
    # elements of an expanded tensor share memory
    return buffer.layout != torch.strided or all(
        stride > 0 or size <= 1 for stride, size in zip(buffer.stride(), buffer.shape, strict=True)
    )


def _restorer(module: nn.Module) -> Callable[[], None]:
    """What gives a module its present buffers back, as objects."""
    attributes, buffers = dict(module.__dict__), dict(module._buffers)
    shapes, transient = _shapes(module), set(module._non_persistent_buffers_set)

    def restore() -> None:
        if list(module._buffers) == list(buffers) and all(module._buffers[name] is buffers[name] for name in buffers):
            return
        if _shapes(module) != shapes:
            module.__dict__.clear()
            module.__dict__.update(attributes)
        module._buffers.clear()
        module._buffers.update(buffers)
        module._non_persistent_buffers_set.clear()
        module._non_persistent_buffers_set.update(transient)

    return restore


def _shapes(module: nn.Module) -> dict[str, object]:
    return {
        name: None if buffer is None else "lazy" if is_lazy(buffer) else buffer.shape
        for name, buffer in module._buffers.items()
    }
