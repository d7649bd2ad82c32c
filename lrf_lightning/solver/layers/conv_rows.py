"""Rows of convolutions and transposed convolutions in one, two and three dimensions.

A convolution gathers patches: an input row is the patch under the kernel at one output position, an output row the
channels there. A transposed convolution spreads patches: an input row is the channels at one input position, an output
row the patch that it adds to. Positions are numbered row by row. Letters as in
:mod:`lrf_lightning.solver.layers.rows`, and::

    c  channels              k1.. sizes of the kernel
    s1.. spatial sizes       P    positions that are taken
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrf_lightning.modules.conv import CONVOLVE
from lrf_lightning.modules.conv_transpose import SPREAD
from lrf_lightning.solver.layers.rows import RowReader, UnreadableRowsError

__all__ = ["ConvRows", "ConvTransposeRows"]


class _SpatialRows(RowReader):
    """What both directions share: rows at positions, images that belong to samples."""

    def rows_per_sample(self, x: Tensor, batch: int) -> int:
        """See :meth:`RowReader.rows_per_sample`."""
        return self._images(x, batch).shape[0] // batch * math.prod(self._sizes(x))

    def inner(self, grad: Tensor, output: Tensor, bias: Tensor | None, batch: int) -> Tensor:
        """See :meth:`RowReader.inner`."""
        values = output if bias is None else output - bias.reshape(-1, *(1,) * self._dims)
        return (self._images(grad, batch) * values).reshape(batch, -1).sum(1)

    def _sizes(self, x: Tensor) -> Sequence[int]:
        """Sizes of the grid of positions for an input."""
        raise NotImplementedError

    @property
    def _layer(self) -> nn.modules.conv._ConvNd:
        module = self.candidate.module
        assert isinstance(module, nn.modules.conv._ConvNd)
        return module

    @property
    def _dims(self) -> int:
        return len(self._layer.kernel_size)

    def _images(self, x: Tensor, batch: int) -> Tensor:
        """Check that (images, c, s1, ...) holds whole samples."""
        if x.dim() != self._dims + 2 or x.shape[0] % batch != 0:
            raise UnreadableRowsError(
                f"layer {self.candidate.name!r} sees a tensor of shape {tuple(x.shape)} for a batch of {batch} "
                "samples; its images cannot be assigned to samples"
            )
        return x

    def _channels(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """The channels of (B, c, s1, ...) at positions, shape (g, B * P, c / g)."""
        groups = self.candidate.groups
        x = x.flatten(2)  # (B, c, s1 * ...)
        if positions is not None:
            x = x[:, :, _places(positions, x.shape[-1])]
        x = x.reshape(x.shape[0], groups, -1, x.shape[-1])
        return x.permute(1, 0, 3, 2).reshape(groups, -1, x.shape[2])

    def _patches(self, x: Tensor, sizes: Sequence[int], positions: Tensor | None) -> Tensor:
        """The patches of (B, c, s1, ...), borders included, at positions, shape (g, B * P, c / g * k1 * ...)."""
        layer, groups = self._layer, self.candidate.groups
        total = math.prod(sizes)
        remaining = torch.arange(total, device=x.device) if positions is None else _places(positions, total)
        taken = len(remaining)
        index: list[Tensor] = []
        for axis in reversed(range(self._dims)):
            corner = remaining % sizes[axis] * layer.stride[axis]
            remaining = remaining // sizes[axis]
            offsets = torch.arange(layer.kernel_size[axis], device=x.device) * layer.dilation[axis]
            shape = [taken] + [1] * self._dims
            shape[axis + 1] = len(offsets)
            index.insert(0, (corner[:, None] + offsets).reshape(shape))
        everywhere: tuple[slice | Tensor, ...] = (slice(None), slice(None))
        patches = x[everywhere + tuple(index)]  # (B, c, P, k1, ...)
        count, channels = patches.shape[:2]
        patches = patches.reshape(count, groups, channels // groups, taken, -1).permute(1, 0, 3, 2, 4)
        return patches.reshape(groups, count * taken, -1)

    def _correlate(self, x: Tensor, weight: Tensor) -> Tensor:
        """Convolve (B, c, s1, ...), borders included, with the layer's stride and dilation."""
        layer = self._layer
        return CONVOLVE[self._dims](x, weight, None, layer.stride, 0, layer.dilation, layer.groups)


class ConvRows(_SpatialRows):
    """Rows of a convolution: the patches under the kernel and the output channels at every position."""

    def inputs(self, x: Tensor, positions: Tensor | None, batch: int) -> Tensor:
        """See :meth:`RowReader.inputs`."""
        return self._patches(self._bordered(self._images(x, batch)), self._sizes(x), positions)

    def gradients(self, grad: Tensor, positions: Tensor | None, batch: int) -> Tensor:
        """See :meth:`RowReader.gradients`."""
        return self._channels(self._images(grad, batch), positions)

    def project(self, x: Tensor, right: Tensor, batch: int) -> Tensor:
        """See :meth:`RowReader.project`; shape (images, g * k, s1, ...), borders included where the left factor reads.

        The right factor has the kernel of the leading dimensions, see :mod:`lrf_lightning.modules.conv`.
        """
        layer, own = self._layer, self._dims if self.candidate.split is None else self.candidate.split
        others = (1,) * (self._dims - own)
        weight = right.reshape(right.shape[0] * right.shape[1], -1, *layer.kernel_size[:own], *others)
        stride, dilation = (*layer.stride[:own], *others), (*layer.dilation[:own], *others)
        x = self._bordered(self._images(x, batch))
        return CONVOLVE[self._dims](x, weight, None, stride, 0, dilation, layer.groups)

    def components(self, projected: Tensor, grad: Tensor, left: Tensor, batch: int) -> Tensor:
        """See :meth:`RowReader.components`."""
        layer, groups, rank = self._layer, self.candidate.groups, left.shape[-1]
        images, split = self._images(grad, batch), self.candidate.split
        if split is None:
            weight = left.transpose(1, 2).reshape(groups * rank, -1, *(1,) * self._dims)
            return _per_sample(CONVOLVE[self._dims](images, weight, groups=groups) * projected, batch, groups, rank)
        others = (1,) * split
        weight = left.reshape(-1, self.candidate.left_kernel, rank).transpose(1, 2)
        weight = weight.reshape(-1, rank, *others, *layer.kernel_size[split:])
        stride, dilation = (*others, *layer.stride[split:]), (*others, *layer.dilation[split:])
        spread = SPREAD[self._dims](images, weight, None, stride, 0, 0, groups, dilation)
        # the last positions may be out of the kernel's reach
        inside = tuple(slice(size) for size in spread.shape)
        return _per_sample(projected[inside] * spread, batch, groups, rank)

    def positions_between(self, shape: Sequence[int]) -> int:
        """Positions per image of what the right factor puts out for an input (images, c, s1, ...)."""
        sizes = self._output_sizes(shape)
        split = self._dims if self.candidate.split is None else self.candidate.split
        return math.prod((*sizes[:split], *shape[2 + split :]))

    def _sizes(self, x: Tensor) -> Sequence[int]:
        return self._output_sizes(x.shape)

    def _output_sizes(self, shape: Sequence[int]) -> list[int]:
        layer, borders = self._layer, self._borders[::-1]  # the first dimension first
        sizes = []
        for axis, stride in enumerate(layer.stride):
            span = layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
            sizes.append((shape[axis + 2] + borders[2 * axis] + borders[2 * axis + 1] - span) // stride + 1)
        return sizes

    @property
    def _borders(self) -> list[int]:
        """Widths of the borders as ``F.pad`` takes them, the last dimension first."""
        return list(self._layer._reversed_padding_repeated_twice)

    def _bordered(self, x: Tensor) -> Tensor:
        """Pad explicitly, whatever the padding mode, so that patches can be gathered by index."""
        borders, mode = self._borders, self._layer.padding_mode
        if not any(borders):
            return x
        return F.pad(x, borders) if mode == "zeros" else F.pad(x, borders, mode=mode)


class ConvTransposeRows(_SpatialRows):
    """Rows of a transposed convolution: the channels at every input position and the patches they are spread over."""

    def inputs(self, x: Tensor, positions: Tensor | None, batch: int) -> Tensor:
        """See :meth:`RowReader.inputs`."""
        return self._channels(self._images(x, batch), positions)

    def gradients(self, grad: Tensor, positions: Tensor | None, batch: int) -> Tensor:
        """See :meth:`RowReader.gradients`."""
        bordered = self._bordered(self._images(grad, batch))
        return self._patches(bordered, self._input_sizes(bordered), positions)

    def project(self, x: Tensor, right: Tensor, batch: int) -> Tensor:
        """See :meth:`RowReader.project`; shape (images, g * k, s1, ...)."""
        weight = right.reshape(-1, right.shape[-1], *(1,) * self._dims)
        return CONVOLVE[self._dims](self._images(x, batch), weight, groups=self.candidate.groups)

    def components(self, projected: Tensor, grad: Tensor, left: Tensor, batch: int) -> Tensor:
        """See :meth:`RowReader.components`."""
        groups, rank = self.candidate.groups, left.shape[-1]
        weight = left.transpose(1, 2).reshape(groups * rank, -1, *self._layer.kernel_size)
        products = self._correlate(self._bordered(self._images(grad, batch)), weight)
        # output padding may add positions beyond the input
        inside = tuple(slice(size) for size in (*products.shape[:2], *projected.shape[2:]))
        return _per_sample(products[inside] * projected, batch, groups, rank)

    def _sizes(self, x: Tensor) -> Sequence[int]:
        return tuple(x.shape[2:])

    def _input_sizes(self, bordered: Tensor) -> Sequence[int]:
        """Sizes of the input that belongs to an output with its borders."""
        layer, sizes = self._layer, []
        for axis, stride in enumerate(layer.stride):
            extra = layer.output_padding[axis] if layer.output_padding[axis] >= stride else 0
            span = layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
            sizes.append((bordered.shape[axis + 2] - span - extra) // stride + 1)
        return sizes

    def _bordered(self, grad: Tensor) -> Tensor:
        """Put back the borders that the layer cuts off its output."""
        padding = [int(width) for width in self._layer.padding]
        borders = [width for width in reversed(padding) for _ in range(2)]
        return F.pad(grad, borders) if any(borders) else grad


def _places(positions: Tensor, total: int) -> Tensor:
    """Positions run over all rows of a sample; a sample of several images takes the same places in each."""
    places: Tensor = torch.unique(positions % total)  # type: ignore[no-untyped-call]
    return places


def _per_sample(products: Tensor, batch: int, groups: int, rank: int) -> Tensor:
    """Sum (images, g * k, s1, ...) over positions, groups and the images of a sample, shape (B, k)."""
    return products.flatten(2).sum(2).reshape(batch, -1, groups, rank).sum((1, 2))
