"""Batches that come with the same random numbers on every pass, so that models are compared under the same noise."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from lrf_lightning.distributed import ALONE, Processes
from lrf_lightning.random_state import preserved, seed_all

__all__ = ["SeededBatches", "split_seed"]

SPLITS = ("calibration", "selection", "verification")
_END = object()


def split_seed(seed: int, split: str) -> int:
    """The seed of the first batch of a split; other splits draw other numbers, since a verdict must be independent."""
    return seed + SPLITS.index(split) * 2**20


class SeededBatches:
    """An iterable of batches with seeded random numbers.

    Before a batch is loaded, and again before it is handed out, the global generators are seeded with the batch's
    number; they are restored at the end of the pass. So a loss that draws numbers, such as that of a diffusion model or
    a variational autoencoder, draws the same ones for every model.

    Args:
        batches: an iterable that can be run through repeatedly.
        seed: seed of the first batch of all.
        processes: who else has other batches; they are numbered together.
    """

    def __init__(self, batches: Iterable[Any], seed: int = 0, processes: Processes = ALONE) -> None:
        self.batches, self.seed, self.processes = batches, seed, processes

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]  # TypeError says: unknown

    def __iter__(self) -> Iterator[Any]:
        with preserved():
            source: Iterator[Any] | None = None
            for index in map(self.processes.index, itertools.count()):
                seed_all(self.seed + index)
                source = self._source() if source is None else source  # its truth may be its length
                batch = next(source, _END)
                if batch is _END:
                    return
                batch = self._prepared(batch)
                # a stored batch takes no random numbers, a loaded one may: let both leave the same state behind
                seed_all(self.seed + index)
                yield batch

    def _source(self) -> Iterator[Any]:
        return iter(self.batches)

    def _prepared(self, batch: Any) -> Any:
        """The batch as it is handed out."""
        return batch
