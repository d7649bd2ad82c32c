"""Iterables of batches that yield the same samples in the same order on every pass, and what they have in common.

Two models are compared in pairs, so repetition must be exact: the order of a DataLoader with indices is drawn once and
kept as a list. Only torch is needed here; see :mod:`lrf_lightning.data.device_batches` for what a Trainer adds.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from lrf_lightning.distributed import Processes
from lrf_lightning.random_state import seeded

__all__ = [
    "EveryNth",
    "FirstBatches",
    "dealt",
    "fixed_order",
    "has_samples",
    "keeps_batches",
    "overlaps",
    "rebuilt",
    "sample_identities",
]

WHOLE = "_lrf_keeps_batches"  # what a rebuilt loader, whose batches are a list, remembers of the first one
PARTS = 10  # a source without indices is told apart in this many interleaved parts


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


def fixed_order(loader: Iterable[Any], seed: int) -> Iterable[Any]:
    """The same batches in one order for good.

    Args:
        loader: a DataLoader, whose samplers are asked once, with the seed, a DistributedSampler for what it would deal
            out to all processes; an iterator, which is read into a list; or any other iterable, which is returned as
            it is.
        seed: seed of samplers that shuffle; their own generators are left as they were.
    """
    if isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__:
        return rebuilt(loader, _drawn(loader, seed) if has_samples(loader) else None)
    return list(loader) if isinstance(loader, Iterator) else loader


def has_samples(loader: Iterable[Any]) -> TypeGuard[DataLoader[Any]]:
    """Whether a loader yields what its dataset has under some indices, and does nothing else to it."""
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        return False
    return not isinstance(loader.dataset, IterableDataset)


def keeps_batches(loader: DataLoader[Any]) -> bool:
    """Whether a sampler of the user's has chosen which samples make a batch, so that it cannot be cut anew."""
    return getattr(loader, WHOLE, type(loader.batch_sampler) not in (BatchSampler, type(None)))


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
    new: DataLoader[Any] = DataLoader(
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
    setattr(new, WHOLE, keeps_batches(loader))
    return new


def dealt(batches: Iterable[Any], processes: Processes) -> Iterable[Any]:
    """One process's share of batches in a fixed order; all processes must call it.

    A source without indices is run through by every process, which keeps its own batches.

    Raises:
        ValueError: if the datasets of the processes differ in size.
    """
    if processes.size == 1:
        return batches
    order = sizes = None
    if isinstance(batches, DataLoader):
        chosen = batches.sampler if batches.batch_sampler is None else batches.batch_sampler
        order = chosen if isinstance(chosen, list) else None
        sizes = None if order is None else len(batches.dataset)  # type: ignore[arg-type]
    everywhere = processes.gather(sizes)
    if len(set(everywhere)) > 1:
        raise ValueError(
            f"the datasets of the processes differ in size ({everywhere}); let every process hold the whole dataset, "
            "a sampler deals it out"
        )
    if order is None or not isinstance(batches, DataLoader):
        turns = [str(rank) for rank in range(processes.size)]
        return EveryNth(batches, turns, turns[processes.rank])
    # batch sizes, and with them the cut into batches, may differ: the first process's holds
    return rebuilt(batches, processes.of_first(order)[processes.rank :: processes.size])


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


def overlaps(loaders: Mapping[str, Iterable[Any]]) -> list[str]:
    """One sentence for every two splits that share data; the keys are calibration, selection and verification."""
    identities = {role: sample_identities(loader) for role, loader in loaders.items()}
    warnings = []
    for first, second in (("selection", "verification"), ("calibration", "verification"), ("calibration", "selection")):
        shared = len(identities[first] & identities[second])
        if not shared:
            continue
        consequence = (
            "the verdict is not independent of the choice"
            if (first, second) == ("selection", "verification")
            else f"what is measured on {second} is not independent of the data that the factors were fitted to"
        )
        warnings.append(
            f"{first} and {second} share data ({shared} of {len(identities[second])} samples or batches of {second}): "
            f"{consequence}. Give them disjoint data"
        )
    return warnings


def _drawn(loader: DataLoader[Any], seed: int) -> list[Any]:
    source: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if isinstance(source, DistributedSampler):
        source = _undistributed(source)
    elif isinstance(getattr(source, "sampler", None), DistributedSampler):
        source = copy.copy(source)
        source.sampler = _undistributed(source.sampler)
    samplers = (source, getattr(source, "sampler", None))
    generators = {id(g): g for g in (getattr(s, "generator", None) for s in samplers) if g is not None}
    states = {key: generator.get_state() for key, generator in generators.items()}
    try:
        for generator in generators.values():
            generator.manual_seed(seed)
        with seeded(seed):
            return list(source)
    finally:
        for key, generator in generators.items():
            generator.set_state(states[key])


def _undistributed(sampler: DistributedSampler[Any]) -> Iterable[Any]:
    """What a sampler deals out to all processes, without the samples that it repeats to make the shares even."""
    wrapped = getattr(sampler.dataset, "_sampler", None)  # Lightning's wrapper of other samplers
    if wrapped is not None:
        return wrapped  # type: ignore[no-any-return]
    dataset: Any = sampler.dataset
    return RandomSampler(dataset) if sampler.shuffle else SequentialSampler(dataset)


def _source_key(source: Iterable[Any]) -> Hashable:
    return id(source.dataset) if isinstance(source, DataLoader) else id(source)


def _identities(dataset: Dataset[Any], indices: Sequence[Any]) -> frozenset[Hashable]:
    # without automatic batching an index may be a list of them
    indices = [item for index in indices for item in (index if isinstance(index, list) else [index])]
    while isinstance(dataset, Subset):
        indices = [dataset.indices[index] for index in indices]
        dataset = dataset.dataset
    if isinstance(dataset, TensorDataset):  # datasets may be cut from one tensor: compare where the rows lie
        rows = dataset.tensors[0]
        start, step = rows.data_ptr(), rows.stride(0) * rows.element_size()
        return frozenset(("row", start + int(index) * step) for index in indices)
    return frozenset((id(dataset), index) for index in indices)
