"""Fashion-MNIST as normalised tensors in five splits; where the files are is told in :mod:`recipes.fashion`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recipes.fashion import read_images

__all__ = ["Split", "batches", "load", "splits"]

MEAN, DEVIATION = 0.2860, 0.3530


@dataclass(frozen=True)
class Split:
    """Images of shape (n, 1, 28, 28), normalised, and class indices of shape (n,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load(name: str) -> Split:
    """Read ``train`` or ``t10k``; see :func:`recipes.fashion.read_images`."""
    images, labels = read_images(name)
    return Split(images.sub(MEAN).div(DEVIATION), labels)


def splits(seed: int, calibration: int = 1500, selection: int = 2500, verification: int = 2500) -> dict[str, Split]:
    """Five disjoint splits; the three small ones are cut from the training images, ``test`` is the published one."""
    images = load("train")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    parts: dict[str, Split] = {}
    start = 0
    for name, size in (("calibration", calibration), ("selection", selection), ("verification", verification)):
        parts[name] = _take(images, order[start : start + size])
        start += size
    return {"train": _take(images, order[start:]), **parts, "test": load("t10k")}


def batches(split: Split, size: int = 250) -> list[tuple[Tensor, Tensor]]:
    """The split in order, in batches."""
    return list(zip(split.images.split(size), split.labels.split(size), strict=True))


def _take(split: Split, indices: Tensor) -> Split:
    return Split(split.images[indices], split.labels[indices])
