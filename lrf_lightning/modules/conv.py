"""Low-rank stand-ins for ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``.

Both factors are grouped convolutions, and all groups have the same rank. Every spatial dimension belongs to one of the
factors, with its kernel size, stride, padding and dilation; along that dimension the other factor has size 1. The first
``split`` dimensions belong to the right factor, which is applied first, and the others to the left one:

* by default all belong to the right one: ``groups * rank`` channels are computed with the whole kernel and mixed
  afterwards. What is truncated is the space of the outputs, the weight as a matrix (m, c k) of a group's m outputs, c
  input channels and k entries of the kernel.
* with ``split=0`` all belong to the left one: channels are mixed before the kernel is applied. What is truncated is
  the space of the input channels, the matrix (m k, c).
* between them, ``split=1`` in two dimensions is a column k x 1 followed by a row 1 x k (Jaderberg et al. 2014, Speeding
  up Convolutional Neural Networks with Low Rank Expansions), the matrix (m k2, c k1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrf_lightning.modules.base import LowRankModule, check_rank, memory_format

__all__ = ["CONVOLVE", "LowRankConv1d", "LowRankConv2d", "LowRankConv3d", "LowRankConvNd"]

# by the number of spatial dimensions; not an attribute of the classes, where torch.export of torch 2.7 refuses them
CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class LowRankConvNd(LowRankModule):
    """A convolution whose weight, unfolded in one of several ways, has rank ``rank`` in every group.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: size of the kernel, one entry per spatial dimension.
        rank: number of components per group, from 1 to the smaller side of a group's unfolded weight.
        split: number of leading spatial dimensions that belong to the right factor, all for None.
        stride: stride of the whole, 1 by default.
        padding: padding of the whole, one entry per dimension or one of ``"same"`` and ``"valid"``.
        dilation: dilation of the whole, 1 by default.
        groups: groups of both factors.
        bias: whether the layer adds a bias of shape (out_channels,).
        padding_mode: as for ``nn.Conv2d``.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        ValueError: if the rank or the split is out of range.
    """

    dense_type: ClassVar[type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]]
    transposed = False  # as in the dense layer

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        rank: int,
        *,
        split: int | None = None,
        stride: Sequence[int] | int = 1,
        padding: Sequence[int] | str = "valid",
        dilation: Sequence[int] | int = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        kernel_size = tuple(kernel_size)
        dims = len(kernel_size)
        if split is not None and not 0 <= split <= dims:
            raise ValueError(f"split={split} is outside 0..{dims}, the number of spatial dimensions")
        first, last = kernel_size[:split], () if split is None else kernel_size[split:]
        check_rank(rank, min(out_channels // groups * math.prod(last), in_channels // groups * math.prod(first)))
        # the dense layer's own constructor checks the options and works out the borders that F.pad needs
        geometry = self.dense_type(
            in_channels=groups,
            out_channels=groups,
            kernel_size=kernel_size,  # type: ignore[arg-type]
            stride=stride,  # type: ignore[arg-type]
            padding=padding,  # type: ignore[arg-type]
            dilation=dilation,  # type: ignore[arg-type]
            groups=groups,
            padding_mode=padding_mode,  # type: ignore[arg-type]
            device="meta",
        )
        self.in_channels, self.out_channels, self.kernel_size, self.rank = in_channels, out_channels, kernel_size, rank
        self.stride, self.padding, self.dilation = geometry.stride, geometry.padding, geometry.dilation
        self.output_padding = geometry.output_padding
        self.groups, self.padding_mode, self.split = groups, padding_mode, None if split == dims else split
        self._borders: list[int] = list(geometry._reversed_padding_repeated_twice)
        right, left = (*first, *(1,) * (dims - len(first))), (*(1,) * (dims - len(last)), *last)
        self.right_factor = nn.Parameter(
            torch.empty(groups * rank, in_channels // groups, *right, device=device, dtype=dtype)
        )
        self.left_factor = nn.Parameter(torch.empty(out_channels, rank, *left, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        )

    @classmethod
    def like(cls, dense: nn.Module, rank: int, *, split: int | None = None) -> LowRankConvNd:
        """See :meth:`LowRankModule.like`; the memory format is kept too."""
        assert isinstance(dense, cls.dense_type)
        weight = dense.weight
        new = cls(
            rank=rank,
            split=split,
            **_geometry(dense),
            bias=dense.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        return new.to(memory_format=memory_format(weight))  # type: ignore[call-overload, no-any-return]

    @staticmethod
    def matrices(dense: nn.Module) -> Tensor:
        """See :meth:`LowRankModule.matrices`."""
        assert isinstance(dense, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        return dense.weight.detach().reshape(dense.groups, dense.out_channels // dense.groups, -1)

    def factors(self) -> tuple[Tensor, Tensor]:
        """See :meth:`LowRankModule.factors`."""
        left, right = super().factors()
        if self.split is not None:
            left = self.left_factor.reshape(self.groups, self.out_channels // self.groups, self.rank, -1)
            left = left.transpose(2, 3).reshape(self.groups, -1, self.rank)
        return left, right

    def _copy_factors(self, left: Tensor, right: Tensor) -> None:
        if self.split is not None:
            left = left.reshape(self.out_channels, -1, self.rank).transpose(1, 2)
        super()._copy_factors(left, right)

    @property
    def weight(self) -> Tensor:
        """The product of the factors, shape (out_channels, in_channels / groups, *kernel_size)."""
        left, right = self.factors()
        product, shape = left @ right, (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        if self.split is not None:  # entries of the left factor's part of the kernel come last
            product = product.reshape(self.out_channels, -1, right.shape[-1]).transpose(1, 2)
        return product.reshape(shape)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in_channels, *size), or the same without a batch, to the output of the dense layer's shape."""
        dims = len(self.kernel_size)
        split = dims if self.split is None else self.split
        # borders of zeros, mirrored or repeated ones are the same after a linear map along the other dimensions
        return self._along(split, dims, self._along(0, split, x, self.right_factor, None), self.left_factor, self.bias)

    def _along(self, start: int, stop: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply a factor that has the spatial dimensions from ``start`` to ``stop``."""
        dims, padding = len(self.kernel_size), self.padding

        def own(sizes: Sequence[int], other: int) -> tuple[int, ...]:
            return tuple(size if start <= axis < stop else other for axis, size in enumerate(sizes))

        if not isinstance(padding, str):
            padding = own(padding, 0)
        if self.padding_mode != "zeros":
            # F.pad takes the last dimension first
            borders = self._borders[2 * (dims - stop) : 2 * (dims - start)] + [0] * (2 * start)
            borders = [0] * (2 * dims - len(borders)) + borders
            x, padding = F.pad(x, borders, mode=self.padding_mode), (0,) * dims
        return CONVOLVE[dims](x, weight, bias, own(self.stride, 1), padding, own(self.dilation, 1), self.groups)

    def to_dense(self) -> nn.Module:
        """See :meth:`LowRankModule.to_dense`."""
        dense = self.dense_type(
            **_geometry(self),
            bias=self.bias is not None,
            device=self.left_factor.device,
            dtype=self.left_factor.dtype,
        )
        layouts = {memory_format(factor) for factor in (self.left_factor, self.right_factor)}
        # a factor without a kernel, or with one component, has no layout of its own
        layout = next((layout for layout in layouts if layout != torch.contiguous_format), torch.contiguous_format)
        dense.to(memory_format=layout)  # type: ignore[call-overload]
        self._fill(dense)
        return dense

    def extra_repr(self) -> str:
        """The geometry and the rank."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, rank={self.rank}, "
            f"split={self.split}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, groups={self.groups}, "
            f"bias={self.bias is not None}, padding_mode={self.padding_mode!r}"
        )


class LowRankConv1d(LowRankConvNd):
    """Stands in for ``nn.Conv1d``; see :class:`LowRankConvNd`."""

    dense_type = nn.Conv1d


class LowRankConv2d(LowRankConvNd):
    """Stands in for ``nn.Conv2d``; see :class:`LowRankConvNd`."""

    dense_type = nn.Conv2d


class LowRankConv3d(LowRankConvNd):
    """Stands in for ``nn.Conv3d``; see :class:`LowRankConvNd`."""

    dense_type = nn.Conv3d


def _geometry(module: nn.Module) -> dict[str, Any]:
    names = "in_channels out_channels kernel_size stride padding dilation groups padding_mode"
    return {name: getattr(module, name) for name in names.split()}
