"""How much memory a call of a model takes."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lrf_lightning.solver.model_size import model_bytes
from lrf_lightning.solver.speed.model_call import ModelCall

__all__ = ["peak_memory"]


def peak_memory(call: ModelCall) -> float:
    """Bytes of the model and of what is alive at once besides it during a call."""
    if call.device.type == "cuda":
        torch.cuda.synchronize(call.device)
        before = torch.cuda.memory_allocated(call.device)
        torch.cuda.reset_peak_memory_stats(call.device)
        call.seconds()
        peak: int = torch.cuda.max_memory_allocated(call.device)
        return float(model_bytes(call.model) + peak - before)
    with _LiveTensors() as live, call.precision():
        call.run()
    return float(model_bytes(call.model) + live.peak)


class _LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that operations make, as long as they live; :attr:`peak` is the most at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak = 0, 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note what it made."""
        result = func(*args, **(kwargs or {}))
        given = {id(value.untyped_storage()) for value in pytree.tree_leaves((args, kwargs)) if _has_storage(value)}
        for value in pytree.tree_leaves(result):
            if not _has_storage(value):
                continue
            storage = value.untyped_storage()
            if id(storage) in given or id(storage) in self._seen:
                continue  # a view, or changed in place
            self._seen[id(storage)] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, id(storage))
        return result

    def _freed(self, storage: int) -> None:
        self.now -= self._seen.pop(storage)


def _has_storage(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided
