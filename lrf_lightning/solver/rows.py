"""How the rows of a layer are read: inputs, output gradients, and their products with factors.

A layer maps rows x (columns entries) to rows y (rows entries), once per token or spatial position. Letters used here::

    B  samples in the batch          g  groups of the weight
    R  rows per sample               m  output side of one group's matrix (``candidate.rows``)
    P  sampled rows per sample       n  input side of one group's matrix (``candidate.columns``)
                                     k  rank

The rows of one sample must lie together: the leading dimension of the layer's input is B or a multiple of it (windows,
frames, flattened tokens), or the second one is B (time-major sequences).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrf_lightning.surgery import Candidate

__all__ = ["ConvRows", "LinearRows", "RowReader", "UnreadableRowsError", "row_reader"]


class UnreadableRowsError(ValueError):
    """The rows of a layer's input cannot be assigned to the samples of the batch."""


class RowReader:
    """Reads rows of one layer; see :class:`LinearRows` and :class:`ConvRows`."""

    def __init__(self, candidate: Candidate) -> None:
        self.candidate = candidate

    def rows_per_sample(self, x: Tensor, batch: int) -> int:
        """Number of rows R that one sample has in a call with the input ``x``."""
        raise NotImplementedError

    def inputs(
        self,
        x: Tensor,
        positions: Tensor | None,  # (P,) indices into the R rows of a sample; None takes all
        batch: int,
    ) -> Tensor:
        """Input rows, shape (g, B * P, n)."""
        raise NotImplementedError

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
        """Products r_i . x for all rows, shape (B, R', g, k) or (B, g, k, R'); to be passed to :meth:`components`."""
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
    """Rows of ``nn.Linear``: the last dimension of input and output."""

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


class ConvRows(RowReader):
    """Rows of ``nn.Conv2d``: the patches under the kernel and the output channels at every position."""

    @property
    def _conv(self) -> nn.Conv2d:
        module = self.candidate.module
        assert isinstance(module, nn.Conv2d)
        return module

    def rows_per_sample(self, x: Tensor, batch: int) -> int:
        """See :meth:`RowReader.rows_per_sample`."""
        images = _images(x, batch, self.candidate.name).shape[0] // batch
        height, width = self._output_size(x.shape[-2:], bordered=False)
        return images * height * width

    def _output_size(self, size: Sequence[int], *, bordered: bool) -> tuple[int, int]:
        """Height and width of the output for an input of this height and width, with its borders already or not."""
        conv = self._conv
        left, right, top, bottom = (0, 0, 0, 0) if bordered else conv._reversed_padding_repeated_twice
        (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
        height, width = size[0] + top + bottom, size[1] + left + right
        return (height - dh * (kh - 1) - 1) // sh + 1, (width - dw * (kw - 1) - 1) // sw + 1

    def inputs(self, x: Tensor, positions: Tensor | None, batch: int) -> Tensor:
        """See :meth:`RowReader.inputs`."""
        conv, groups = self._conv, self.candidate.groups
        x = _with_borders(_images(x, batch, self.candidate.name), conv)
        (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
        height, width = self._output_size(x.shape[-2:], bordered=True)
        if positions is None:
            positions = torch.arange(height * width, device=x.device)
        else:
            # positions run over all rows of a sample; a sample of several images takes the same places in each
            positions = torch.unique(positions % (height * width))
        top, left = (positions // width) * sh, (positions % width) * sw
        rows = top[:, None, None] + dh * torch.arange(kh, device=x.device)[:, None]  # (P, kh, 1)
        columns = left[:, None, None] + dw * torch.arange(kw, device=x.device)  # (P, 1, kw)
        patches = x[:, :, rows, columns]  # (B, channels, P, kh, kw)
        count, _, taken = patches.shape[:3]
        patches = patches.reshape(count, groups, -1, taken, kh, kw).permute(1, 0, 3, 2, 4, 5)
        return patches.reshape(groups, count * taken, -1)

    def gradients(self, grad: Tensor, positions: Tensor | None, batch: int) -> Tensor:
        """See :meth:`RowReader.gradients`."""
        grad = _images(grad, batch, self.candidate.name).flatten(2)  # (B, out, H * W)
        if positions is not None:
            grad = grad[:, :, torch.unique(positions % grad.shape[-1])]
        grad = grad.reshape(grad.shape[0], self.candidate.groups, -1, grad.shape[-1])
        return grad.permute(1, 0, 3, 2).reshape(self.candidate.groups, -1, grad.shape[2])

    def project(self, x: Tensor, right: Tensor, batch: int) -> Tensor:
        """See :meth:`RowReader.project`; shape (images, g * k, H, W)."""
        conv = self._conv
        x = _with_borders(_images(x, batch, self.candidate.name), conv)
        weight = right.reshape(-1, *conv.weight.shape[1:])
        return F.conv2d(x, weight, None, conv.stride, 0, conv.dilation, conv.groups)

    def components(self, projected: Tensor, grad: Tensor, left: Tensor, batch: int) -> Tensor:
        """See :meth:`RowReader.components`."""
        groups, rank = self.candidate.groups, left.shape[-1]
        grad = _images(grad, batch, self.candidate.name)
        weight = left.transpose(1, 2).reshape(groups * rank, -1, 1, 1)
        products = F.conv2d(grad, weight, groups=groups) * projected
        return products.sum((2, 3)).reshape(batch, -1, groups, rank).sum((1, 2))

    def inner(self, grad: Tensor, output: Tensor, bias: Tensor | None, batch: int) -> Tensor:
        """See :meth:`RowReader.inner`."""
        values = output if bias is None else output - bias[:, None, None]
        return (_images(grad, batch, self.candidate.name) * values).reshape(batch, -1).sum(1)


def row_reader(candidate: Candidate) -> RowReader:
    """The reader for a layer's kind."""
    return ConvRows(candidate) if isinstance(candidate.module, nn.Conv2d) else LinearRows(candidate)


def _by_sample(x: Tensor, batch: int, name: str) -> Tensor:
    """Reshape (..., features) to (B, R, features)."""
    if x.dim() >= 2 and x.shape[0] % batch == 0:
        return x.reshape(batch, -1, x.shape[-1])
    if x.dim() == 3 and x.shape[1] == batch:
        return x.transpose(0, 1)
    raise UnreadableRowsError(
        f"layer {name!r} sees a tensor of shape {tuple(x.shape)} for a batch of {batch} samples; "
        "its rows cannot be assigned to samples"
    )


def _images(x: Tensor, batch: int, name: str) -> Tensor:
    """Check that (images, channels, height, width) holds whole samples."""
    if x.dim() != 4 or x.shape[0] % batch != 0:
        raise UnreadableRowsError(
            f"layer {name!r} sees a tensor of shape {tuple(x.shape)} for a batch of {batch} samples; "
            "its images cannot be assigned to samples"
        )
    return x


def _with_borders(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Pad explicitly, whatever the padding mode, so that patches can be gathered by index."""
    borders = list(conv._reversed_padding_repeated_twice)  # left, right, top, bottom
    if not any(borders):
        return x
    if conv.padding_mode == "zeros":
        return F.pad(x, borders)
    return F.pad(x, borders, mode=conv.padding_mode)
