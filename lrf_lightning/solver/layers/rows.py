"""How the rows of a layer are read: inputs, output gradients, and their products with factors.

A layer maps rows x (columns entries) to rows y (rows entries), once per token or spatial position. Letters used here::

    B  samples in the batch          g  groups of the weight
    R  rows per sample               m  output side of one group's matrix (``candidate.rows``)
    P  sampled rows per sample       n  input side of one group's matrix (``candidate.columns``)
                                     k  rank

The rows of one sample must lie together: the leading dimension of the layer's input is B or a multiple of it (windows,
frames, flattened tokens), or the second one is B (time-major sequences). Where samples differ in their number of rows
(the nodes of graphs, regions of images, tokens that an expert gets), so that it does not go up, the rows are cut into B
runs of one length, and zeros fill the last ones. Sums over the batch stay exact that way, and the rows of a run are
mostly those of one sample. Where rows belong to all samples at once, curvatures come out too large.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lrf_lightning.surgery import Candidate

__all__ = ["EmbeddingRows", "LinearRows", "RowReader", "UnreadableRowsError"]


class UnreadableRowsError(ValueError):
    """The rows of a layer's input cannot be assigned to the samples of the batch."""


class RowReader:
    """Reads rows of one layer; every kind has its own reader, see :mod:`lrf_lightning.solver.layers.row_readers`."""

    def __init__(self, candidate: Candidate) -> None:
        self.candidate = candidate

    def rows_per_sample(self, x: Tensor, batch: int) -> int:
        """Number of rows R that one sample has in a call with the input ``x``."""
        raise NotImplementedError

    def rows(self, x: Tensor, batch: int) -> int:
        """Number of rows of all samples in a call with the input ``x``."""
        return self.rows_per_sample(x, batch) * batch

    def inputs(
        self,
        x: Tensor,
        positions: Tensor | None,  # (P,) indices into the R rows of a sample; None takes all
        batch: int,
    ) -> Tensor:
        """Input rows, shape (g, B * P, n)."""
        raise NotImplementedError

    def squared_inputs(self, x: Tensor, positions: Tensor | None, batch: int) -> tuple[Tensor, int]:
        """Sum over the input rows of their squared entries, shape (g, n) in float64, and the number of rows."""
        rows = self.inputs(x, positions, batch)
        return rows.double().square().sum(1), rows.shape[1]

    def gradients(
        self,
        grad: Tensor,
        positions: Tensor | None,  # (P,)
        batch: int,
    ) -> Tensor:
        """Rows of the output or its gradient, shape (g, B * P, m)."""
        raise NotImplementedError

    def project(
        self,
        x: Tensor,
        right: Tensor,  # (g, k, n)
        batch: int,
    ) -> Tensor:
        """Products r_i . x for all rows, to be passed to :meth:`components`."""
        raise NotImplementedError

    def components(
        self,
        projected: Tensor,
        grad: Tensor,
        left: Tensor,  # (g, m, k)
        batch: int,
    ) -> Tensor:
        """Directional derivative along every component, sum over rows of (g . l_i)(r_i . x), shape (B, k)."""
        raise NotImplementedError

    def inner(
        self,
        grad: Tensor,
        output: Tensor,
        bias: Tensor | None,  # (out,)
        batch: int,
    ) -> Tensor:
        """Derivative along the whole weight, sum over rows of g . (y - bias), shape (B,)."""
        raise NotImplementedError


class LinearRows(RowReader):
    """Rows of ``nn.Linear`` and Hugging Face's ``Conv1D``: the last dimension of input and output."""

    def rows(self, x: Tensor, batch: int) -> int:
        """See :meth:`RowReader.rows`; without those that fill up."""
        return math.prod(x.shape[:-1])

    def rows_per_sample(self, x: Tensor, batch: int) -> int:
        """See :meth:`RowReader.rows_per_sample`."""
        return _by_sample(x, batch, self.candidate.name).shape[1]

    def inputs(self, x: Tensor, positions: Tensor | None, batch: int) -> Tensor:
        """See :meth:`RowReader.inputs`."""
        rows = _by_sample(x, batch, self.candidate.name)
        if positions is not None:
            rows = rows[:, positions]
        return rows.reshape(1, -1, rows.shape[-1])

    def gradients(self, grad: Tensor, positions: Tensor | None, batch: int) -> Tensor:
        """See :meth:`RowReader.gradients`."""
        return self.inputs(grad, positions, batch)

    def project(self, x: Tensor, right: Tensor, batch: int) -> Tensor:
        """See :meth:`RowReader.project`; shape (B, R, k)."""
        return _by_sample(x, batch, self.candidate.name) @ right[0].T

    def components(self, projected: Tensor, grad: Tensor, left: Tensor, batch: int) -> Tensor:
        """See :meth:`RowReader.components`."""
        return ((_by_sample(grad, batch, self.candidate.name) @ left[0]) * projected).sum(1)

    def inner(self, grad: Tensor, output: Tensor, bias: Tensor | None, batch: int) -> Tensor:
        """See :meth:`RowReader.inner`."""
        values = _by_sample(output if bias is None else output - bias, batch, self.candidate.name)
        return (_by_sample(grad, batch, self.candidate.name) * values).sum((1, 2))


class EmbeddingRows(LinearRows):
    """Rows of ``nn.Embedding``: the inputs are one-hot, the columns of the matrix are the entries of the table."""

    def rows_per_sample(self, x: Tensor, batch: int) -> int:
        """See :meth:`RowReader.rows_per_sample`.

        Raises:
            UnreadableRowsError: if the entries 0, 1, 2, ... are looked up once for the whole batch.
        """
        shared = (
            batch > 1
            and x.numel() == x.shape[-1]
            and torch.equal(x.flatten(), torch.arange(x.numel(), device=x.device).to(x))
        )
        if shared:
            raise UnreadableRowsError(
                f"layer {self.candidate.name!r} looks up the entries 0 to {x.numel() - 1} once for all {batch} samples "
                "of the batch, as embeddings of places do; its rows cannot be assigned to samples"
            )
        if x.dim() == 1 and x.numel() % batch:  # zeros that fill up would be looked up
            raise UnreadableRowsError(_unreadable(self.candidate.name, x, batch))
        return super().rows_per_sample(x[..., None], batch)

    def rows(self, x: Tensor, batch: int) -> int:
        """See :meth:`RowReader.rows`."""
        return x.numel()

    def squared_inputs(self, x: Tensor, positions: Tensor | None, batch: int) -> tuple[Tensor, int]:
        """See :meth:`RowReader.squared_inputs`; how often every entry was looked up."""
        indices = super().inputs(x[..., None], positions, batch).flatten().long()
        return torch.bincount(indices, minlength=self.candidate.columns).double()[None], len(indices)

    def inputs(self, x: Tensor, positions: Tensor | None, batch: int) -> Tensor:
        """See :meth:`RowReader.inputs`; one-hot rows."""
        indices = super().inputs(x[..., None], positions, batch)[..., 0]
        return F.one_hot(indices.long(), self.candidate.columns).to(self.candidate.matrices().dtype)

    def gradients(self, grad: Tensor, positions: Tensor | None, batch: int) -> Tensor:
        """See :meth:`RowReader.gradients`."""
        return LinearRows.inputs(self, grad, positions, batch)

    def project(self, x: Tensor, right: Tensor, batch: int) -> Tensor:
        """See :meth:`RowReader.project`; shape (B, R, k)."""
        indices = _by_sample(x[..., None], batch, self.candidate.name)[..., 0].long()
        return F.embedding(indices, right[0].T)


def _by_sample(x: Tensor, batch: int, name: str) -> Tensor:
    """Reshape (..., features) to (B, R, features).

    Time-major sequences (R, B, features) are told from windows (B * c, R, features) by their second dimension.
    """
    time_major = x.dim() == 3 and x.shape[1] == batch and x.shape[0] != batch
    if time_major:
        return x.transpose(0, 1)
    missing = -x.shape[0] % batch if x.dim() == 2 else 0
    if x.dim() >= 2 and (x.shape[0] + missing) % batch == 0:
        each = (x.shape[0] + missing) // batch * math.prod(x.shape[1:-1])  # may be 0: an expert without a token
        x = F.pad(x, (0, 0, 0, missing)) if missing else x
        return x.reshape(batch, each, x.shape[-1])
    raise UnreadableRowsError(_unreadable(name, x, batch))


def _unreadable(name: str, x: Tensor, batch: int) -> str:
    return (
        f"layer {name!r} sees a tensor of shape {tuple(x.shape)} for a batch of {batch} samples; "
        "its rows cannot be assigned to samples"
    )
