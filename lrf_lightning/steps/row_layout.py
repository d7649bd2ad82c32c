"""How the rows of a step's losses belong to the samples of its batch, found by giving the batch other samples.

A loss of shape (k * batch, ...) may have the k rows of a sample together, as flattened tokens, or block by block, as
the outputs of several time steps or two augmented views. Shapes do not tell, and targets only if they are the batch's
own. So the step is run once more with some of the batch's samples in the places of the others: every row must then be
that of the sample that has come there. Rows of no such layout depend on other samples too, as in contrastive losses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lrf_lightning.solver.running.batch_contents import picked

__all__ = ["Layout", "block_count", "row_layouts"]

logger = logging.getLogger(__name__)

# samples: (batch * k, ...); blocks: (k * batch, ...); second: (k, batch, ...); mixed: they depend on other samples
Layout = Literal["samples", "blocks", "second", "mixed", "unknown"]


def row_layouts(
    rows_of: Callable[[Any], Sequence[Tensor | None]], batch: Any, size: int, rounding: float
) -> tuple[Layout, ...]:
    """The layout of the rows of every loss function that a step calls; empty if the step cannot be tried.

    Args:
        rows_of: runs the step on a batch and returns the rows of all calls, None for those that are not known.
        batch: a batch of the step.
        size: its samples.
        rounding: relative rounding of what the rows are computed in.
    """
    if size < 2:
        return ()
    # only half of the samples, so that those that are left meet others than before
    index = [size - 1 - i % ((size + 1) // 2) for i in range(size)]
    try:
        changed, complete = picked(batch, index)
        before, after = rows_of(batch), rows_of(changed)
        found = [_layout(rows, others, index, rounding) for rows, others in zip(before, after, strict=True)]
        # noise differs from run to run, and what is in the batch beside its samples belonged to the others
        again = rows_of(batch) if "mixed" in found and complete else [None] * len(found)
        repeats = [_close(rows, others, rounding) for rows, others in zip(before, again, strict=True)]
    except Exception:  # the user's step may bear no other batch than those of its loader
        logger.debug("The step cannot be run with other samples", exc_info=True)
        return ()
    return tuple("unknown" if layout == "mixed" and not r else layout for layout, r in zip(found, repeats, strict=True))


def _arranged(rows: Tensor, layout: Layout, size: int) -> Tensor | None:
    """Rows as (batch, k * ...), None if they have no such layout."""
    blocks = block_count(tuple(rows.shape), layout, size)
    if blocks is None:
        return None
    return rows.reshape(blocks, size, -1).transpose(0, 1).reshape(size, -1)


def block_count(shape: tuple[int, ...], layout: Layout, size: int) -> int | None:
    """The number of blocks with a row of every sample, 1 if the rows of a sample lie together."""
    if layout == "second":
        return shape[0] if len(shape) > 1 and shape[1] == size else None
    if layout not in ("samples", "blocks") or not shape or shape[0] == 0 or shape[0] % size:
        return None
    return 1 if layout == "samples" else shape[0] // size


def _layout(rows: Tensor | None, others: Tensor | None, index: Sequence[int], rounding: float) -> Layout:
    if rows is None or others is None or rows.shape != others.shape or rows.dim() == 0:
        return "unknown"
    layouts: tuple[Layout, ...] = ("samples", "blocks", "second")
    if len(rows) == len(index):  # what is one block as well
        layouts = ("samples", "second")
    views = {name: [_arranged(each, name, len(index)) for each in (rows, others)] for name in layouts}
    possible = {name: (one[list(index)], two) for name, (one, two) in views.items() if one is not None}
    fitting = [name for name, (one, two) in possible.items() if _close(one, two, rounding)]
    if len(fitting) == 1:
        return fitting[0]
    return "unknown" if fitting or not possible else "mixed"


def _close(rows: Tensor | None, others: Tensor | None, rounding: float) -> bool:
    if rows is None or others is None or rows.shape != others.shape:
        return False
    one, two = rows.double(), others.double()
    largest = float(one[torch.isfinite(one)].abs().max()) if bool(torch.isfinite(one).any()) else 0.0
    return torch.allclose(one, two, rtol=0, atol=max(1e-3, 4 * rounding) * largest, equal_nan=True)
