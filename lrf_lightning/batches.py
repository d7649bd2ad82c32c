"""Iterables of batches that yield the same samples in the same order on every pass, on the right device.

Two models are compared in pairs, so repetition must be exact. The order of a DataLoader with indices is drawn once and
kept as a list; random numbers used within samples, transfer hooks and steps are seeded anew for every batch; and what
was loaded is stored in memory while it is small, which also saves decoding it dozens of times.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from lrf_lightning.random_state import preserved, seed_all, seeded

__all__ = ["DeviceBatches", "EveryNth", "FirstBatches", "fixed_order", "rebuilt", "sample_identities"]

CACHE_BYTES = 2**29
PARTS = 10  # a source without indices is told apart in this many interleaved parts
_END = object()


class FirstBatches:
    """The first ``count`` batches of an iterable."""

    def __init__(self, batches: Iterable[Any], count: int) -> None:
        self.batches, self.count = batches, count

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.batches, self.count)

    def __len__(self) -> int:
        return min(self.count, len(self.batches))  # type: ignore[arg-type]  # TypeError says: unknown


class EveryNth:
    """Every batch of an iterable whose turn it is: batch i belongs to ``pattern[i % len(pattern)]``."""

    def __init__(self, batches: Iterable[Any], pattern: Sequence[str], part: str) -> None:
        self.batches, self.turns = batches, [i for i, owner in enumerate(pattern) if owner == part]
        self.period = len(pattern)

    def __iter__(self) -> Iterator[Any]:
        return (batch for i, batch in enumerate(self.batches) if i % self.period in self.turns)

    def __len__(self) -> int:
        whole, rest = divmod(len(self.batches), self.period)  # type: ignore[arg-type]  # TypeError says: unknown
        return whole * len(self.turns) + sum(turn < rest for turn in self.turns)


class DeviceBatches:
    """Batches on a device, exactly repeatable.

    The hooks ``on_before_batch_transfer``, ``transfer_batch_to_device`` and ``on_after_batch_transfer`` of the
    datamodule, or else of the module, run as they do in validation. Before a batch is loaded, and again before it is
    handed out, the global generators are seeded with the batch's number; they are restored at the end of the pass.

    Args:
        batches: an iterable that can be run through repeatedly.
        trainer: its datamodule's hooks and its precision are used.
        module: the copy of the module whose hooks are used where the datamodule has none; on ``device``.
        device: where the batches go.
        seed: seed of the first batch.
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
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.batches, self.trainer, self.module, self.device = batches, trainer, module, device
        self.seed, self.cache_bytes = seed, cache_bytes
        self._stored: list[Any] | None = None

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]  # TypeError says: unknown

    def __iter__(self) -> Iterator[Any]:
        with preserved():
            source: Iterator[Any] | None = None
            for index in itertools.count():
                seed_all(self.seed + index)
                source = source or self._source()
                batch = next(source, _END)
                if batch is _END:
                    return
                batch = self._moved(batch)
                # a stored batch takes no random numbers, a loaded one may: let both leave the same state behind
                seed_all(self.seed + index)
                yield batch

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
                kept = [*kept, copy.deepcopy(batch)] if room >= 0 else None
            yield batch
        self._stored = kept

    def _moved(self, batch: Any) -> Any:
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


def fixed_order(loader: Iterable[Any], seed: int) -> Iterable[Any]:
    """The same batches in one order for good.

    Args:
        loader: a DataLoader, whose samplers are asked once, with the seed; an iterator, which is read into a list; or
            any other iterable, which is returned as it is.
        seed: seed of samplers that shuffle; their own generators are left as they were.
    """
    if isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__:
        return rebuilt(loader, None if isinstance(loader.dataset, IterableDataset) else _drawn(loader, seed))
    return list(loader) if isinstance(loader, Iterator) else loader


def rebuilt(loader: DataLoader[Any], order: list[Any] | None) -> DataLoader[Any]:
    """A DataLoader over the same dataset with the same collation and workers, in a given order.

    Args:
        loader: the model for it.
        order: lists of indices, one per batch; indices, if the loader does not batch; None for iterable datasets.
    """
    options: dict[str, Any] = {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
    if order is not None:
        options = {"batch_size": None, "sampler": order} if loader.batch_sampler is None else {"batch_sampler": order}
    # workers that outlive a pass would carry their random state into the next one, so they are not persistent
    return DataLoader(
        loader.dataset,
        **options,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
    )


def sample_identities(loader: Iterable[Any]) -> frozenset[Hashable]:
    """What two loaders have in common if they share data: samples, batches or parts of the same source."""
    if isinstance(loader, FirstBatches):
        return sample_identities(loader.batches)
    if isinstance(loader, EveryNth):
        return frozenset((_source_key(loader.batches), turn) for turn in loader.turns)
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        sampler = loader.sampler if loader.batch_sampler is None else None
        if isinstance(sampler, list):
            return _identities(loader.dataset, sampler)
        if isinstance(loader.batch_sampler, list):
            return _identities(loader.dataset, list(itertools.chain.from_iterable(loader.batch_sampler)))
    if isinstance(loader, (list, tuple)):
        return frozenset(("batch", id(batch)) for batch in loader)
    return frozenset((_source_key(loader), turn) for turn in range(PARTS))


def _drawn(loader: DataLoader[Any], seed: int) -> list[Any]:
    samplers = (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
    generators = {id(g): g for g in (getattr(s, "generator", None) for s in samplers) if g is not None}
    states = {key: generator.get_state() for key, generator in generators.items()}
    try:
        for generator in generators.values():
            generator.manual_seed(seed)
        with seeded(seed):
            return list(loader.sampler if loader.batch_sampler is None else loader.batch_sampler)
    finally:
        for key, generator in generators.items():
            generator.set_state(states[key])


def _source_key(source: Iterable[Any]) -> Hashable:
    return id(source.dataset) if isinstance(source, DataLoader) else id(source)


def _identities(dataset: Dataset[Any], indices: Sequence[Any]) -> frozenset[Hashable]:
    while isinstance(dataset, Subset):
        indices = [dataset.indices[index] for index in indices]
        dataset = dataset.dataset
    if isinstance(dataset, TensorDataset):  # datasets may be cut from one tensor: compare where the rows lie
        rows = dataset.tensors[0]
        start, step = rows.data_ptr(), rows.stride(0) * rows.element_size()
        return frozenset(("row", start + int(index) * step) for index in indices)
    return frozenset((id(dataset), index) for index in indices)


def _bytes(batch: Any) -> int | None:
    """Size of a batch's tensors, None if it holds anything of unknown size."""
    if isinstance(batch, Tensor):
        return batch.numel() * batch.element_size()
    if isinstance(batch, (str, bytes, int, float, bool, type(None))):
        return 64
    if not isinstance(batch, (Mapping, list, tuple)):
        return None
    total = 0
    for item in batch.values() if isinstance(batch, Mapping) else batch:
        size = _bytes(item)
        if size is None:
            return None
        total += size
    return total
