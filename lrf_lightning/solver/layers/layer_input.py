"""What a layer was given when it ran, so that it can be timed on the like of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LayerInput"]


@dataclass(frozen=True)
class LayerInput:
    """The input of one call of a layer.

    Attributes:
        shape: its shape.
        dtype: its dtype, such as ``"float32"``.
        channels_last: whether the channels lie innermost in memory.
        autocast: dtype of the automatic mixed precision that the layer ran under, empty without.
        samples: samples of the batch.
        rows: rows (tokens, positions) of all samples.
    """

    shape: tuple[int, ...]
    dtype: str
    channels_last: bool
    autocast: str
    samples: int
    rows: float

    @classmethod
    def of(cls, x: Tensor, samples: int, rows: float) -> LayerInput | None:
        """Describe a tensor that a layer was called with; nothing can be timed on an empty one."""
        if not x.numel():
            return None
        kind = x.device.type
        mixed = _name(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else ""
        layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
        innermost = layout is not None and not x.is_contiguous() and x.is_contiguous(memory_format=layout)
        return cls(tuple(x.shape), _name(x.dtype), innermost, mixed, samples, rows)

    def cut(self, samples: int) -> LayerInput:
        """The input of a smaller batch; the same where the first dimension does not hold the samples."""
        per_sample, rest = divmod(self.shape[0] if self.shape else 1, self.samples)
        if rest or samples >= self.samples:
            return self
        shape = (per_sample * samples, *self.shape[1:])
        return replace(self, shape=shape, samples=samples, rows=self.rows * samples / self.samples)

    def example(self, module: nn.Module, device: torch.device) -> Tensor:
        """Random numbers like the input; indices into the table for an embedding."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        if not dtype.is_floating_point:
            return torch.randint(0, int(getattr(module, "num_embeddings", 2)), self.shape, dtype=dtype, device=device)
        x = torch.randn(self.shape, device=device).to(dtype)
        if not self.channels_last:
            return x
        return x.to(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)

    @contextlib.contextmanager
    def precision(self, device: torch.device) -> Iterator[None]:
        """The precision that the layer ran at; weights are cast at every call, as they are once per pass."""
        options: dict[str, Any] = {"dtype": getattr(torch, self.autocast)} if self.autocast else {}
        with torch.autocast(device.type, enabled=bool(self.autocast), cache_enabled=False, **options):
            yield


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
