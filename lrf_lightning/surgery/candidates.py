"""A layer that can be factorized, and the orders of its factors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from lrf_lightning.modules import LowRankModule
from lrf_lightning.surgery.kinds import low_rank_type
from lrf_lightning.surgery.structure import factorized

__all__ = ["Candidate", "ConvOrder"]

ConvOrder = Literal["best", "kernel_first", "pointwise_first", "spatial_split"]


@dataclass(frozen=True)
class Candidate:
    """A layer that can be factorized.

    A convolution can be factorized in several orders, see :mod:`lrf_lightning.modules.conv`; ``rows`` and ``columns``
    are those of the weight as the layer reads it, whatever the order.

    Attributes:
        name: qualified name of the module, the first one if it hangs in the tree several times.
        kind: class name of the module.
        module: the dense module itself.
        groups: number of matrices in the weight.
        rows: output side of one group's matrix.
        columns: input side of one group's matrix, kernel included.
        twins: names of further modules that share the weight; they are factorized with it.
        transposed: those of the twins that read the weight transposed, as an output layer does with the table of an
            embedding.
        kernel: sizes of a convolution's kernel, empty for other layers and transposed convolutions.
        split: number of leading entries of ``kernel`` that belong to the right factor, all for None.
    """

    name: str
    kind: str
    module: nn.Module
    groups: int
    rows: int
    columns: int
    twins: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    kernel: tuple[int, ...] = ()
    split: int | None = None

    def orders(self, wanted: ConvOrder = "best") -> list[Candidate]:
        """The layer in all orders of its factors that are wanted and save parameters at some rank.

        Where a convolution has none of the wanted orders, it is that with the kernel first; it is the only order of
        other layers. A depthwise convolution has no channels to mix.
        """
        splits: list[int | None] = []
        if math.prod(self.kernel) > 1 and self.rows * self.columns > math.prod(self.kernel):
            if wanted in ("best", "pointwise_first"):
                splits.append(0)
            if wanted in ("best", "spatial_split"):
                parts = [(math.prod(self.kernel[:at]), math.prod(self.kernel[at:])) for at in range(len(self.kernel))]
                splits += [at for at, (first, last) in enumerate(parts) if first > 1 and last > 1]
        found = [order for order in (replace(self, split=split) for split in splits) if order.max_rank > 0]
        kernel_first = replace(self, split=None)
        if kernel_first.max_rank > 0 and (wanted in ("best", "kernel_first") or not found):
            found.insert(0, kernel_first)
        return found

    @property
    def order(self) -> ConvOrder | None:
        """The name of a convolution's order, None for other layers and kernels of a single entry."""
        if math.prod(self.kernel) == 1:
            return None
        if self.split is None:
            return "kernel_first"
        return "spatial_split" if self.split else "pointwise_first"

    @property
    def left_kernel(self) -> int:
        """Entries of the kernel that belong to the left factor."""
        return 1 if self.split is None else math.prod(self.kernel[self.split :])

    @property
    def sides(self) -> tuple[int, int]:
        """Output and input side of the matrix of one group that is factorized."""
        return self.rows * self.left_kernel, self.columns // self.left_kernel

    @property
    def full_rank(self) -> int:
        """The smaller side of the matrix that is factorized."""
        return min(self.sides)

    @property
    def dense_params(self) -> int:
        """Entries of the dense weight, without the bias."""
        return self.groups * self.rows * self.columns

    def low_rank_params(self, rank: int) -> int:
        """Entries of both factors at a rank, without the bias."""
        return self.groups * rank * sum(self.sides)

    @property
    def max_rank(self) -> int:
        """The largest rank at which the factors hold fewer entries than the dense weight, 0 if there is none."""
        return min((self.rows * self.columns - 1) // sum(self.sides), self.full_rank)

    def stand_in(self, left: Tensor, right: Tensor) -> LowRankModule:
        """The low-rank layer with these factors, shapes (groups, sides[0], rank) and (groups, rank, sides[1])."""
        return factorized(self.module, left, right, split=self.split)

    def matrices(self) -> Tensor:
        """The detached weight as matrices, shape (groups, rows, columns), in the module's dtype."""
        kind = low_rank_type(self.module)
        assert kind is not None
        return kind.matrices(self.module)

    def modules_in(self, model: nn.Module) -> tuple[nn.Module, ...]:
        """The layer and its twins in a model of the same structure, low-rank or dense."""
        modules = dict(model.named_modules(remove_duplicate=False))
        return tuple(modules[name] for name in (self.name, *self.twins))
