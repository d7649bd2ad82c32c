"""Batches on the device of the work, as a Trainer hands them out in validation, and exactly repeatable.

Random numbers used within samples, transfer hooks and steps are seeded anew for every batch, and what was loaded is
stored in memory while it is small, which also saves decoding it dozens of times.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lrf_lightning.distributed import ALONE, Processes
from lrf_lightning.solver.running.seeded_batches import SeededBatches

__all__ = ["DeviceBatches"]

CACHE_BYTES = 2**29


class DeviceBatches(SeededBatches):
    """Batches on a device, exactly repeatable.

    The hooks ``on_before_batch_transfer``, ``transfer_batch_to_device`` and ``on_after_batch_transfer`` of the
    datamodule, or else of the module, run as they do in validation.

    Args:
        batches: an iterable that can be run through repeatedly.
        trainer: its datamodule's hooks and its precision are used.
        module: the copy of the module whose hooks are used where the datamodule has none; on ``device``.
        device: where the batches go.
        seed: seed of the first batch of all.
        processes: who else has other batches; they are numbered together.
        cache_bytes: batches are stored in memory, before the transfer, while they all fit into this.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        trainer: Trainer,
        module: LightningModule,
        device: torch.device,
        *,
        seed: int = 0,
        processes: Processes = ALONE,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        super().__init__(batches, seed, processes)
        self.trainer, self.module, self.device, self.cache_bytes = trainer, module, device, cache_bytes
        self._stored: list[Any] | None = None

    def _source(self) -> Iterator[Any]:
        if self._stored is not None:
            # a step may change its batch in place
            return (copy.deepcopy(batch) for batch in self._stored)
        return self._storing()

    def _storing(self) -> Iterator[Any]:
        kept: list[Any] | None = []
        room = self.cache_bytes
        for batch in self.batches:
            if kept is not None:
                size = _bytes(batch)
                room -= self.cache_bytes + 1 if size is None else size
                try:
                    kept = [*kept, copy.deepcopy(batch)] if room >= 0 else None
                except Exception:  # a class of the user's that cannot be copied is loaded again
                    kept = None
            yield batch
        self._stored = kept

    def _prepared(self, batch: Any) -> Any:
        before = self.module._trainer
        self.module.trainer = self.trainer
        try:
            batch = self.trainer.precision_plugin.convert_input(batch)
            batch = self._hook("on_before_batch_transfer")(batch, 0)
            batch = self._hook("transfer_batch_to_device")(batch, self.device, 0)
            return self._hook("on_after_batch_transfer")(batch, 0)
        finally:
            self.module.trainer = before

    def _hook(self, name: str) -> Callable[..., Any]:
        datamodule = getattr(self.trainer, "datamodule", None)
        owner = datamodule if datamodule is not None and is_overridden(name, datamodule) else self.module
        hook: Callable[..., Any] = getattr(owner, name)
        return hook


def _bytes(batch: Any) -> int | None:
    """Size of a batch's tensors, None if it holds anything of unknown size."""
    if isinstance(batch, Tensor):
        return batch.numel() * batch.element_size()
    if isinstance(batch, (str, bytes, int, float, bool, type(None))):
        return 64
    items: Iterable[Any]
    if isinstance(batch, Mapping):
        items = batch.values()
    elif dataclasses.is_dataclass(batch):
        items = [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    elif isinstance(batch, (list, tuple)):
        items = batch
    else:
        return None
    sizes = [_bytes(item) for item in items]
    return None if None in sizes else sum(size for size in sizes if size is not None)
