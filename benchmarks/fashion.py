"""Fashion-MNIST as tensors, read from Debian's package ``dataset-fashion-mnist`` or a download folder.

Zalando Research, MIT licence: 60,000 training and 10,000 test images of 28 x 28 pixels in ten classes. The folder of
the environment variable ``FASHION_MNIST`` comes first, then Debian's, then ``data/FashionMNIST/raw`` as torchvision
leaves it.
"""

from __future__ import annotations

import gzip
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["Split", "batches", "load", "splits"]

FOLDERS = (
    os.environ.get("FASHION_MNIST", ""),
    "/usr/share/datasets/fashion-mnist",
    "data/FashionMNIST/raw",
)
MEAN, DEVIATION = 0.2860, 0.3530


@dataclass(frozen=True)
class Split:
    """Images of shape (n, 1, 28, 28), normalised, and class indices of shape (n,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load(name: str) -> Split:
    """Read ``train`` or ``t10k``.

    Raises:
        FileNotFoundError: if no folder holds the four files.
    """
    for folder in filter(None, FOLDERS):
        images, labels = (_find(Path(folder), f"{name}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
        if images and labels:
            pixels = torch.from_numpy(_read(images).copy()).float().div(255).sub(MEAN).div(DEVIATION)
            return Split(pixels[:, None], torch.from_numpy(_read(labels).astype(np.int64)))
    raise FileNotFoundError(
        "Fashion-MNIST was not found; run 'apt-get install dataset-fashion-mnist', or set FASHION_MNIST to the folder "
        "with the four idx files"
    )


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


def _find(folder: Path, stem: str) -> Path | None:
    return next((path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()), None)


def _read(path: Path) -> np.ndarray:
    """Read an IDX file: two zero bytes, the type (8 for bytes), the number of dimensions, their sizes, the data."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        content = file.read()
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", dimensions, 4)
    return np.frombuffer(content, np.uint8, -1, 4 + 4 * dimensions).reshape(shape)
