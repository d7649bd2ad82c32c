"""State of a model that is as before after its steps have changed it.

Some steps keep state: the queue of a contrastive loss, a memory bank, moving averages in frozen parameters, counters
and annealed temperatures in attributes, random generators of their own. Two models could not be compared if each were
judged with the state that the other evaluations have left behind.

Trained parameters are left out, since nothing but an optimizer should change them, and so are the weights of lazy
layers, which get their shapes in a first pass.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lrf_lightning.solver.running.own_attributes import Attributes

__all__ = ["restored_state"]

LARGEST = 2**26  # bytes


@contextmanager
def restored_state(model: nn.Module) -> Iterator[None]:
    """Put buffers, frozen parameters and attributes of a model back afterwards: the objects and their values.

    Args:
        model: any model; a copy of its buffers, its frozen parameters and of tensors in attributes of up to 64 MiB,
            beyond which they are rather data, is kept in memory on their device.
    """
    attributes = Attributes(model)
    own = {id(tensor) for tensor in (*model.buffers(), *model.parameters())}
    kept = {id(tensor): tensor for tensor in attributes.found(Tensor) if id(tensor) in own or _is_small(tensor)}
    values = [(tensor, tensor.detach().clone()) for tensor in kept.values() if _is_writable(tensor)]
    rewinds = [rewind for value in attributes.found(object) for rewind in _rewinds(value)]
    try:
        yield
    finally:
        attributes.put_aside()
        for rewind in rewinds:
            rewind()
        with torch.no_grad():
            # compared with nothing: what is written past autograd leaves no sign, and a comparison waits for the device
            for tensor, value in values:
                _write(tensor, value)


def _write(tensor: Tensor, value: Tensor) -> None:
    freed = tensor.layout is torch.strided and tensor.untyped_storage().nbytes() < value.untyped_storage().nbytes()
    if tensor.shape != value.shape or freed:
        tensor.data = value
        return
    if tensor.is_inference():
        tensor.copy_(value)
        return
    # a step whose graph is still needed may have read it, with this very value
    with torch.autograd._unsafe_preserve_version_counter(tensor):  # type: ignore[attr-defined]
        tensor.copy_(value)


def _is_small(tensor: Tensor) -> bool:
    return not tensor.is_nested and tensor.numel() * tensor.element_size() <= LARGEST


def _is_writable(tensor: Tensor) -> bool:
    """Whether steps may write values to a tensor, and these can be restored."""
    if is_lazy(tensor) or tensor.is_meta or tensor.requires_grad or tensor.is_nested:
        return False
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return False
    # elements of an expanded tensor share memory
    return tensor.layout != torch.strided or all(
        stride > 0 or size <= 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def _rewinds(value: Any) -> Iterator[Callable[[], object]]:
    """What gives a random generator its present state back; nothing for other values."""
    if issubclass(type(value), weakref.ProxyTypes):
        return
    if isinstance(value, torch.Generator):
        state = value.get_state()
        yield lambda: value.set_state(state)
    elif isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        words = value.getstate()
        yield lambda: value.setstate(words)
    elif type(value).__module__.startswith("numpy.random"):
        bits = getattr(value, "bit_generator", None) or getattr(value, "_bit_generator", None)
        if bits is not None:
            present = bits.state
            yield lambda: setattr(bits, "state", present)
