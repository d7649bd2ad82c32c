"""How the rows of a step's losses belong to the samples of its batch, found by giving the batch other samples.

A loss of shape (k * batch, ...) may have the k rows of a sample together, as flattened tokens, or block by block, as
the outputs of several time steps or two augmented views. Shapes do not tell, and targets only if they are the batch's
own. So the step is run once more with every other sample replaced by its neighbour: the rows of the samples that have
stayed must not change. Rows of no such layout depend on other samples too, as in contrastive losses. Noise that belongs
to a place in the batch is the same in all runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lrf_lightning.random_state import seeded
from lrf_lightning.solver.running.batch_contents import picked

__all__ = ["Layout", "block_count", "row_layouts"]

logger = logging.getLogger(__name__)

# samples: (batch * k, ...); blocks: (k * batch, ...); second: (k, batch, ...); mixed: they depend on other samples
Layout = Literal["samples", "blocks", "second", "mixed", "unknown"]

COARSEST = 2**-7  # relative rounding, of bfloat16: nothing could be told apart with more


def row_layouts(
    rows_of: Callable[[Any], Sequence[Tensor | None]], batch: Any, size: int, rounding: float
) -> tuple[Layout, ...]:
    """The layout of the rows of every loss function that a step calls; empty if the step cannot be tried.

    Args:
        rows_of: runs the step on a batch and returns the rows of all calls, None for those that are not known.
        batch: a batch of the step, of two samples at least.
        size: its samples.
        rounding: relative rounding of what the rows are computed in.
    """
    rounding = min(rounding, COARSEST)
    before, again = _tried(rows_of, batch), _tried(rows_of, batch)
    trials = [_trial(rows_of, before, batch, size, first, rounding) for first in (0, 1)]
    # what differs from run to run shows nothing
    repeats = [_close(rows, others, rounding) for rows, others in zip(before, again, strict=False)]
    found = [[trial[place] for trial in trials if trial] for place in range(len(before))]
    if not any(trials):
        return ()
    return tuple(_agreed(each) if r else "unknown" for each, r in zip(found, repeats, strict=False))


def _trial(
    rows_of: Callable[[Any], Sequence[Tensor | None]],
    before: Sequence[Tensor | None],
    batch: Any,
    size: int,
    first: int,
    rounding: float,
) -> list[Layout]:
    """What is found where the samples ``first``, ``first`` + 2, ... stay; empty if the step cannot be run so."""
    stay = [i for i in range(size) if i % 2 == first]
    index = [i if i % 2 == first else (i + 1 if i + 1 < size else i - 1) for i in range(size)]
    try:
        changed, complete = picked(batch, index)
    except Exception:  # the user's types
        logger.debug("The samples of a %s cannot be exchanged", type(batch).__name__, exc_info=True)
        return []
    after = _tried(rows_of, changed)
    if len(after) != len(before):
        return []
    found = [_layout(rows, others, stay, size, rounding) for rows, others in zip(before, after, strict=True)]
    # what in the batch belonged to the samples that are gone may be what makes a difference
    return [layout if complete or layout != "mixed" else "unknown" for layout in found]


def _agreed(layouts: Sequence[Layout]) -> Layout:
    """What both trials say; one of them may have lost the longest sample, to which a batch was cut."""
    known = set(layouts) - {"unknown"}
    if "mixed" in known:
        return "mixed"
    return known.pop() if len(known) == 1 else "unknown"


def _tried(rows_of: Callable[[Any], Sequence[Tensor | None]], batch: Any) -> Sequence[Tensor | None]:
    """The rows for a batch, with the same noise in every run; empty if the step fails."""
    try:
        with seeded(0):
            return rows_of(batch)
    except Exception:  # the user's step may bear no other batch than those of its loader
        logger.debug("The step cannot be run with other samples", exc_info=True)
        return ()


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


def _layout(rows: Tensor | None, others: Tensor | None, stay: Sequence[int], size: int, rounding: float) -> Layout:
    alike = rows is not None and others is not None and rows.shape == others.shape and rows.dim() > 0
    if not alike or rows is None or others is None or torch.equal(rows, others):
        return "unknown"
    layouts: tuple[Layout, ...] = ("samples", "blocks", "second")
    if len(rows) == size:  # what is one block as well
        layouts = ("samples", "second")
    views = {name: (_arranged(rows, name, size), _arranged(others, name, size)) for name in layouts}
    possible = {name: (a[stay], b[stay]) for name, (a, b) in views.items() if a is not None and b is not None}
    largest = _largest(rows)
    fitting = [name for name, (a, b) in possible.items() if _close(a, b, rounding, largest)]
    if len(fitting) == 1:
        return fitting[0]
    return "unknown" if fitting or not possible else "mixed"


def _close(rows: Tensor | None, others: Tensor | None, rounding: float, largest: float | None = None) -> bool:
    """Whether values are equal but for roundings, relative to the largest one."""
    if rows is None or others is None or rows.shape != others.shape:
        return False
    allowed = max(1e-3, 4 * rounding) * (_largest(rows) if largest is None else largest)
    return torch.allclose(rows.double(), others.double(), rtol=0, atol=allowed, equal_nan=True)


def _largest(rows: Tensor) -> float:
    finite = rows[torch.isfinite(rows)]
    return float(finite.abs().max()) if finite.numel() else 0.0
