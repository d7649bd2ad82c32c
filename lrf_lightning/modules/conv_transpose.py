"""Low-rank stand-ins for ``nn.ConvTranspose1d``, ``nn.ConvTranspose2d`` and ``nn.ConvTranspose3d``.

A transposed convolution spreads every input position over a patch of the output: the weight of one group is a matrix
(out_channels / groups * prod(kernel_size), in_channels / groups). So the kernel belongs to the left factor here: a
grouped convolution of size 1 first, then a transposed convolution with the original options from ``groups * rank``
channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrf_lightning.modules.base import LowRankModule, check_rank, memory_format
from lrf_lightning.modules.conv import CONVOLVE

__all__ = [
    "SPREAD",
    "LowRankConvTranspose1d",
    "LowRankConvTranspose2d",
    "LowRankConvTranspose3d",
    "LowRankConvTransposeNd",
]

SPREAD: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class LowRankConvTransposeNd(LowRankModule):
    """A transposed convolution whose weight has rank ``rank`` in every group.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: size of the kernel, one entry per spatial dimension.
        rank: number of components per group, from 1 to the smaller side of a group's matrix.
        stride: stride of the spatial factor, 1 by default.
        padding: what is cut off at both ends of every output dimension, 0 by default.
        output_padding: what is added at one end of every output dimension, 0 by default.
        dilation: dilation of the spatial factor, 1 by default.
        groups: groups of both factors.
        bias: whether the layer adds a bias of shape (out_channels,).
        device: device of the parameters.
        dtype: dtype of the parameters.
    """

    dense_type: ClassVar[type[nn.ConvTranspose1d] | type[nn.ConvTranspose2d] | type[nn.ConvTranspose3d]]
    transposed, padding_mode = True, "zeros"  # as in the dense layer, which knows no other mode

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        rank: int,
        *,
        stride: Sequence[int] | int = 1,
        padding: Sequence[int] | int = 0,
        output_padding: Sequence[int] | int = 0,
        dilation: Sequence[int] | int = 1,
        groups: int = 1,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        kernel_size = tuple(kernel_size)
        check_rank(rank, min(out_channels // groups * math.prod(kernel_size), in_channels // groups))
        geometry = self.dense_type(
            in_channels=groups,
            out_channels=groups,
            kernel_size=kernel_size,  # type: ignore[arg-type]
            stride=stride,  # type: ignore[arg-type]
            padding=padding,  # type: ignore[arg-type]
            output_padding=output_padding,  # type: ignore[arg-type]
            dilation=dilation,  # type: ignore[arg-type]
            groups=groups,
            device="meta",
        )
        self.in_channels, self.out_channels, self.kernel_size, self.rank = in_channels, out_channels, kernel_size, rank
        self.stride: tuple[int, ...] = geometry.stride
        self.padding: tuple[int, ...] = geometry.padding  # type: ignore[assignment]
        self.dilation: tuple[int, ...] = geometry.dilation
        self.output_padding, self.groups = geometry.output_padding, groups
        ones = (1,) * len(kernel_size)
        self.right_factor = nn.Parameter(
            torch.empty(groups * rank, in_channels // groups, *ones, device=device, dtype=dtype)
        )
        self.left_factor = nn.Parameter(torch.empty(out_channels, rank, *kernel_size, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        )

    @classmethod
    def like(cls, dense: nn.Module, rank: int, *, split: int | None = None) -> LowRankConvTransposeNd:
        """See :meth:`LowRankModule.like`; the memory format is kept too."""
        assert isinstance(dense, cls.dense_type)
        weight = dense.weight
        new = cls(rank=rank, **_geometry(dense), bias=dense.bias is not None, device=weight.device, dtype=weight.dtype)
        return new.to(memory_format=memory_format(weight))  # type: ignore[call-overload, no-any-return]

    @staticmethod
    def matrices(dense: nn.Module) -> Tensor:
        """See :meth:`LowRankModule.matrices`."""
        assert isinstance(dense, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
        return dense.weight.detach().reshape(dense.groups, dense.in_channels // dense.groups, -1).transpose(1, 2)

    def factors(self) -> tuple[Tensor, Tensor]:
        """See :meth:`LowRankModule.factors`."""
        left = self.left_factor.reshape(self.groups, self.out_channels // self.groups, self.rank, -1)
        return left.transpose(2, 3).reshape(self.groups, -1, self.rank), super().factors()[1]

    def _copy_factors(self, left: Tensor, right: Tensor) -> None:
        left = left.reshape(self.out_channels, -1, self.rank).transpose(1, 2)
        super()._copy_factors(left, right)

    @property
    def weight(self) -> Tensor:
        """The product of the factors, shape (in_channels, out_channels / groups, *kernel_size)."""
        left, right = self.factors()
        return (left @ right).transpose(1, 2).reshape(self.in_channels, -1, *self.kernel_size)

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Map (batch, in_channels, *size), or the same without a batch, to the output of the dense layer's shape.

        Args:
            x: the input.
            output_size: wanted spatial size of the output, as for the dense layer; decides on the output padding.

        Raises:
            ValueError: if the wanted size cannot be reached.
        """
        output_padding = self.output_padding if output_size is None else self._output_padding(x, output_size)
        dims = len(self.kernel_size)
        x = CONVOLVE[dims](x, self.right_factor, None, groups=self.groups)
        grouped = self.left_factor.reshape(self.groups, -1, self.rank, *self.kernel_size).transpose(1, 2)
        weight = grouped.reshape(self.groups * self.rank, -1, *self.kernel_size)
        return SPREAD[dims](x, weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation)

    def _output_padding(self, x: Tensor, output_size: Sequence[int]) -> list[int]:
        dims = len(self.kernel_size)
        wanted = list(output_size)[-dims:]
        lowest = [
            (x.shape[i - dims] - 1) * self.stride[i]
            - 2 * self.padding[i]
            + self.dilation[i] * (self.kernel_size[i] - 1)
            + 1
            for i in range(dims)
        ]
        if len(output_size) not in (dims, x.dim()) or any(
            not low <= size < low + stride for low, size, stride in zip(lowest, wanted, self.stride, strict=True)
        ):
            raise ValueError(
                f"output_size={tuple(output_size)} cannot be reached; each of the last {dims} sizes must be at least "
                f"{tuple(lowest)} and exceed that by less than the stride {tuple(self.stride)}"
            )
        return [size - low for low, size in zip(lowest, wanted, strict=True)]

    def to_dense(self) -> nn.Module:
        """See :meth:`LowRankModule.to_dense`."""
        dense = self.dense_type(
            **_geometry(self),
            bias=self.bias is not None,
            device=self.left_factor.device,
            dtype=self.left_factor.dtype,
        )
        dense.to(memory_format=memory_format(self.left_factor))  # type: ignore[call-overload]
        self._fill(dense)
        return dense

    def extra_repr(self) -> str:
        """The geometry and the rank."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, rank={self.rank}, "
            f"stride={self.stride}, padding={self.padding}, output_padding={self.output_padding}, "
            f"dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}"
        )


class LowRankConvTranspose1d(LowRankConvTransposeNd):
    """Stands in for ``nn.ConvTranspose1d``; see :class:`LowRankConvTransposeNd`."""

    dense_type = nn.ConvTranspose1d


class LowRankConvTranspose2d(LowRankConvTransposeNd):
    """Stands in for ``nn.ConvTranspose2d``; see :class:`LowRankConvTransposeNd`."""

    dense_type = nn.ConvTranspose2d


class LowRankConvTranspose3d(LowRankConvTransposeNd):
    """Stands in for ``nn.ConvTranspose3d``; see :class:`LowRankConvTransposeNd`."""

    dense_type = nn.ConvTranspose3d


def _geometry(module: nn.Module) -> dict[str, Any]:
    names = "in_channels out_channels kernel_size stride padding output_padding dilation groups"
    return {name: getattr(module, name) for name in names.split()}
