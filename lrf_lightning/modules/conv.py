"""Low-rank stand-ins for ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``.

The unfolded weight of one group is a matrix (out_channels / groups, in_channels / groups * prod(kernel_size)); all
groups have the same rank. The kernel belongs to one of the factors, the other one is a grouped convolution of size 1:

* by default to the right one, so that the layer computes ``groups * rank`` channels with the original kernel, stride,
  padding and dilation first and mixes them afterwards. What is truncated is the space of the outputs.
* to the left one with ``pointwise_first``: channels are mixed first. What is truncated is the space of the input
  channels; the factors are those of the matrix (out_channels / groups * prod(kernel_size), in_channels / groups).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrf_lightning.modules.base import LowRankModule, check_rank, memory_format

__all__ = ["LowRankConv1d", "LowRankConv2d", "LowRankConv3d", "LowRankConvNd"]


class LowRankConvNd(LowRankModule):
    """A convolution whose weight, unfolded in one of two ways, has rank ``rank`` in every group.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: size of the kernel, one entry per spatial dimension.
        rank: number of components per group, from 1 to the smaller side of a group's unfolded weight.
        pointwise_first: whether the factor of size 1 comes first.
        stride: stride of the spatial factor, 1 by default.
        padding: padding of the spatial factor, one entry per dimension or one of ``"same"`` and ``"valid"``.
        dilation: dilation of the spatial factor, 1 by default.
        groups: groups of both factors.
        bias: whether the layer adds a bias of shape (out_channels,).
        padding_mode: as for ``nn.Conv2d``.
        device: device of the parameters.
        dtype: dtype of the parameters.
    """

    dense_type: ClassVar[type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]]
    _convolve: ClassVar[Callable[..., Tensor]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        rank: int,
        *,
        pointwise_first: bool = False,
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
        entries = math.prod(kernel_size)
        sides = (entries, 1) if pointwise_first else (1, entries)
        check_rank(rank, min(out_channels // groups * sides[0], in_channels // groups * sides[1]))
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
        self.groups, self.padding_mode, self.pointwise_first = groups, padding_mode, pointwise_first
        self._borders: list[int] = list(geometry._reversed_padding_repeated_twice)
        ones = (1,) * len(kernel_size)
        first, last = (ones, kernel_size) if pointwise_first else (kernel_size, ones)
        self.right_factor = nn.Parameter(
            torch.empty(groups * rank, in_channels // groups, *first, device=device, dtype=dtype)
        )
        self.left_factor = nn.Parameter(torch.empty(out_channels, rank, *last, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        )

    @classmethod
    def like(cls, dense: nn.Module, rank: int, *, pointwise_first: bool = False) -> LowRankConvNd:
        """See :meth:`LowRankModule.like`; the memory format is kept too."""
        assert isinstance(dense, cls.dense_type)
        weight = dense.weight
        new = cls(
            rank=rank,
            pointwise_first=pointwise_first,
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
        if self.pointwise_first:
            left = self.left_factor.reshape(self.groups, self.out_channels // self.groups, self.rank, -1)
            left = left.transpose(2, 3).reshape(self.groups, -1, self.rank)
        return left, right

    def _copy_factors(self, left: Tensor, right: Tensor) -> None:
        if self.pointwise_first:
            left = left.reshape(self.out_channels, -1, self.rank).transpose(1, 2)
        super()._copy_factors(left, right)

    @property
    def weight(self) -> Tensor:
        """The product of the factors, shape (out_channels, in_channels / groups, *kernel_size)."""
        left, right = self.factors()
        product, shape = left @ right, (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        if self.pointwise_first:
            product = product.reshape(self.out_channels, -1, self.in_channels // self.groups).transpose(1, 2)
        return product.reshape(shape)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in_channels, *size), or the same without a batch, to the output of the dense layer's shape."""
        if self.pointwise_first:  # borders of zeros, mirrored or repeated ones are the same after mixing channels
            x = self._convolve(x, self.right_factor, groups=self.groups)
            return self._spatial(x, self.left_factor, self.bias)
        return self._convolve(
            self._spatial(x, self.right_factor, None), self.left_factor, self.bias, groups=self.groups
        )

    def _spatial(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._borders, mode=self.padding_mode), (0,) * len(self.kernel_size)
        return self._convolve(x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def to_dense(self) -> nn.Module:
        """See :meth:`LowRankModule.to_dense`."""
        dense = self.dense_type(
            **_geometry(self),
            bias=self.bias is not None,
            device=self.left_factor.device,
            dtype=self.left_factor.dtype,
        )
        kernel = self.left_factor if self.pointwise_first else self.right_factor
        dense.to(memory_format=memory_format(kernel))  # type: ignore[call-overload]
        self._fill(dense)
        return dense

    def extra_repr(self) -> str:
        """The geometry and the rank."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, rank={self.rank}, "
            f"pointwise_first={self.pointwise_first}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, groups={self.groups}, "
            f"bias={self.bias is not None}, padding_mode={self.padding_mode!r}"
        )


class LowRankConv1d(LowRankConvNd):
    """Stands in for ``nn.Conv1d``; see :class:`LowRankConvNd`."""

    dense_type = nn.Conv1d
    _convolve = staticmethod(F.conv1d)


class LowRankConv2d(LowRankConvNd):
    """Stands in for ``nn.Conv2d``; see :class:`LowRankConvNd`."""

    dense_type = nn.Conv2d
    _convolve = staticmethod(F.conv2d)


class LowRankConv3d(LowRankConvNd):
    """Stands in for ``nn.Conv3d``; see :class:`LowRankConvNd`."""

    dense_type = nn.Conv3d
    _convolve = staticmethod(F.conv3d)


def _geometry(module: nn.Module) -> dict[str, Any]:
    names = "in_channels out_channels kernel_size stride padding dilation groups padding_mode"
    return {name: getattr(module, name) for name in names.split()}
