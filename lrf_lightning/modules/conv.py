"""Low-rank stand-ins for ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``.

The unfolded weight of one group is a matrix (out_channels / groups, in_channels / groups * prod(kernel_size)); all
groups have the same rank. The right factor is a convolution with the original kernel, stride, padding, dilation and
groups that yields ``groups * rank`` channels, the left factor a grouped convolution of size 1.
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
    """A convolution whose unfolded weight has rank ``rank`` in every group.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: size of the kernel, one entry per spatial dimension.
        rank: number of components per group, from 1 to the smaller side of a group's unfolded weight.
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
        check_rank(rank, min(out_channels // groups, in_channels // groups * math.prod(kernel_size)))
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
        self.groups, self.padding_mode = groups, padding_mode
        self._borders: list[int] = list(geometry._reversed_padding_repeated_twice)
        ones = (1,) * len(kernel_size)
        self.right_factor = nn.Parameter(
            torch.empty(groups * rank, in_channels // groups, *kernel_size, device=device, dtype=dtype)
        )
        self.left_factor = nn.Parameter(torch.empty(out_channels, rank, *ones, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        )

    @classmethod
    def like(cls, dense: nn.Module, rank: int) -> LowRankConvNd:
        """See :meth:`LowRankModule.like`; the memory format is kept too."""
        assert isinstance(dense, cls.dense_type)
        weight = dense.weight
        new = cls(rank=rank, **_geometry(dense), bias=dense.bias is not None, device=weight.device, dtype=weight.dtype)
        return new.to(memory_format=memory_format(weight))  # type: ignore[call-overload, no-any-return]

    @staticmethod
    def matrices(dense: nn.Module) -> Tensor:
        """See :meth:`LowRankModule.matrices`."""
        assert isinstance(dense, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        return dense.weight.detach().reshape(dense.groups, dense.out_channels // dense.groups, -1)

    @property
    def weight(self) -> Tensor:
        """The product of the factors, shape (out_channels, in_channels / groups, *kernel_size)."""
        left, right = self.factors()
        return (left @ right).reshape(self.out_channels, *self.right_factor.shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in_channels, *size), or the same without a batch, to the output of the dense layer's shape."""
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._borders, mode=self.padding_mode), (0,) * len(self.kernel_size)
        x = self._convolve(x, self.right_factor, None, self.stride, padding, self.dilation, self.groups)
        return self._convolve(x, self.left_factor, self.bias, groups=self.groups)

    def to_dense(self) -> nn.Module:
        """See :meth:`LowRankModule.to_dense`."""
        dense = self.dense_type(
            **_geometry(self),
            bias=self.bias is not None,
            device=self.left_factor.device,
            dtype=self.left_factor.dtype,
        )
        dense.to(memory_format=memory_format(self.right_factor))  # type: ignore[call-overload]
        self._fill(dense)
        return dense

    def extra_repr(self) -> str:
        """The geometry and the rank."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, rank={self.rank}, "
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
