"""The pictures of single samples, where batches hold images."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from lrf_lightning.distributed import ALONE, Processes
from lrf_lightning.solver.running.batch_contents import batch_size
from lrf_lightning.solver.running.evaluation import Batches

__all__ = ["find_images"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


def find_images(batches: Batches, wanted: Collection[int], processes: Processes = ALONE) -> dict[int, Tensor]:
    """Look for the images of some samples; all processes must call it, and all get what any of them has found.

    Images are the first tensor in a batch with four dimensions of which the second or the last has 1 or 3 entries.
    What fails on a process is missing from the result, since no picture is worth the result of a solve.

    Args:
        batches: this process's batches of a split, in their order.
        wanted: numbers of samples in the split.
        processes: who else has batches of the split.

    Returns:
        By the number of the sample an image of shape (height, width, 1 or 3), uint8 on the CPU. Values outside of
        [0, 1], as those of normalised images, are stretched over the whole range.
    """
    if not wanted:
        return {}
    reports = processes.gather(_attempt(lambda: [batch_size(batch) for batch in batches]))
    if any(report is None for report in reports):  # the numbers of the samples are not known
        return {}
    sizes = [size for sizes in itertools.zip_longest(*reports) for size in sizes if size is not None]
    starts = [0, *itertools.accumulate(sizes)]
    own = _attempt(lambda: dict(_images(batches, wanted, starts, processes)))
    return {sample: image for part in processes.gather(own or {}) for sample, image in part.items()}


def _attempt(work: Callable[[], T]) -> T | None:
    try:
        return work()
    except Exception:  # user code, and the other processes wait for this one
        logger.debug("Could not look for images", exc_info=True)
        return None


def _images(
    batches: Batches, wanted: Collection[int], starts: list[int], processes: Processes
) -> Iterator[tuple[int, Tensor]]:
    for position, batch in enumerate(batches):
        start, end = starts[processes.index(position) :][:2]
        chosen = [sample for sample in wanted if start <= sample < end]
        images = _image_tensor(batch) if chosen else None
        if images is not None and len(images) == end - start:
            for sample in chosen:
                yield sample, _pixels(images[sample - start])


def _image_tensor(batch: Any) -> Tensor | None:
    """Shape (batch, height, width, colours), None if the batch holds no images."""
    if isinstance(batch, Tensor):
        if batch.dim() != 4 or batch.is_complex():
            return None
        if batch.shape[1] in (1, 3):
            return batch.permute(0, 2, 3, 1)
        return batch if batch.shape[3] in (1, 3) else None
    items = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return next((found for item in items if (found := _image_tensor(item)) is not None), None)


def _pixels(image: Tensor) -> Tensor:
    image = image.detach().cpu()
    if image.dtype == torch.uint8:
        return image.contiguous()
    image = image.float().nan_to_num()
    low, high = float(image.min()), float(image.max())
    if low < 0 or high > 1:
        image = (image - low) / max(high - low, 1e-12)
    return (image * 255).round().to(torch.uint8).contiguous()
