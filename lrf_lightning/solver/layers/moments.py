"""Second moments of rows, summed batch by batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lrf_lightning.distributed import Processes

__all__ = ["LARGEST_SIDE", "Moment"]

# of a side beyond this only the diagonal of the moment is kept; a whole one takes 2 GiB here
LARGEST_SIDE = 16384


@dataclass
class Moment:
    """A running sum of outer products u v', or of their diagonals u * v, in float64."""

    total: Tensor | None = None  # (g, a, b), or (g, a)
    rows: int = 0
    diagonal: bool = False

    def add(
        self,
        u: Tensor,  # (g, rows, a)
        v: Tensor,  # (g, rows, b)
    ) -> None:
        """Add the outer products of matching rows."""
        if self.diagonal:
            self.add_sum((u.double() * v.double()).sum(1), u.shape[1])
            return
        # rows may be as coarse as the user's autocast makes them, but not their products: a moment whose entries are
        # rounded to 8 bits has negative eigenvalues
        with torch.autocast(u.device.type, enabled=False):
            u, v = u.float(), v.float()
            u_scale, v_scale = _scale(u), _scale(v)
            product = ((u / u_scale).transpose(1, 2) @ (v / v_scale)).double() * (u_scale.double() * v_scale.double())
        self.add_sum(product, u.shape[1])

    def add_sum(
        self,
        total: Tensor,  # (g, a, b), or (g, a) for a diagonal
        rows: int,
    ) -> None:
        """Add a sum over some rows."""
        self.total = total if self.total is None else self.total + total
        self.rows += rows

    def merge(self, processes: Processes, device: torch.device) -> None:
        """Add up the sums of all processes; all of them must call it."""
        shapes = processes.gather((self.rows, None if self.total is None else tuple(self.total.shape)))
        shape = next((shape for _, shape in shapes if shape is not None), None)
        self.rows = sum(rows for rows, _ in shapes)
        if shape is None:
            return
        if self.total is None:
            self.total = torch.zeros(shape, dtype=torch.float64, device=device)
        processes.sum_([self.total])

    def forget(self) -> None:
        """Free the memory; the mean is not known any more."""
        self.total = None

    @property
    def known_mean(self) -> Tensor | None:
        """The mean outer product, None if there are no rows or they are forgotten."""
        return None if self.total is None else self.mean

    @property
    def mean(self) -> Tensor:
        """The mean outer product, or its diagonal."""
        assert self.total is not None
        return self.total / self.rows


def _scale(rows: Tensor) -> Tensor:
    largest = rows.abs().amax() if rows.numel() else torch.zeros((), device=rows.device)
    return torch.where(largest > 0, largest, torch.ones_like(largest))
