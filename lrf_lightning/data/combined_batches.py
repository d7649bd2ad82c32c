"""Batches of several loaders at a time, as Lightning's CombinedLoader puts them together, without their indices."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from lightning.pytorch.utilities.combined_loader import CombinedLoader

from lrf_lightning.data.batches import fixed_order

__all__ = ["CombinedBatches"]


class CombinedBatches:
    """What a CombinedLoader yields that takes a batch from every one of its loaders at a time.

    Args:
        loader: the model for it; its own loaders and its state stay as they are.
        seed: see :func:`~lrf_lightning.data.batches.fixed_order`.
    """

    def __init__(self, loader: CombinedLoader, seed: int) -> None:
        self._loader = copy.copy(loader)
        self._loader.flattened = [fixed_order(item, seed) for item in loader.flattened]

    def __iter__(self) -> Iterator[Any]:
        combined = copy.copy(self._loader)  # it holds the state of its latest pass
        for batch, _, _ in combined:
            yield batch
