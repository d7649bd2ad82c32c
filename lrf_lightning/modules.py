r"""Low-rank layers that stand in for a dense ``nn.Linear`` or ``nn.Conv2d``.

A dense weight of shape (out, in) is replaced by two factors::

    weight (out, in)  ~  left_factor (out, rank) @ right_factor (rank, in)

      x ---[ right_factor ]---> rank channels ---[ left_factor ]---> + bias ---> y

For a convolution ``in`` is ``in_channels / groups * kernel_height * kernel_width``, one matrix per group, all groups
with the same rank: the right factor is a convolution with the original kernel, stride, padding, dilation and groups
that yields ``groups * rank`` channels, the left factor a grouped 1 x 1 convolution.

The layers hold no copy of the dense weight. ``weight`` is a property that multiplies the factors, for code that reads
it. Nothing here decides on ranks or factors; that is the work of :mod:`lrf_lightning.solver`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["LowRankConv2d", "LowRankLinear", "LowRankModule"]


class LowRankModule(nn.Module):
    """Base of all low-rank layers.

    Attributes:
        rank: number of components that are kept, at least 1 and common to all groups.
        groups: number of blocks on the diagonal of the dense weight, 1 for a linear layer.
    """

    rank: int
    groups: int
    left_factor: nn.Parameter
    right_factor: nn.Parameter
    bias: nn.Parameter | None

    @property
    def weight(self) -> Tensor:
        """The product of the factors in the shape of the dense weight, computed anew at each call."""
        raise NotImplementedError

    @classmethod
    def like(cls, dense: nn.Module, rank: int) -> LowRankModule:
        """An uninitialised low-rank layer with the geometry, dtype, device and bias of ``dense``."""
        raise NotImplementedError

    def to_dense(self) -> nn.Module:
        """The dense layer of the same geometry that computes the same function."""
        raise NotImplementedError

    def set_factors(
        self,
        left: Tensor,  # (groups, out / groups, rank)
        right: Tensor,  # (groups, rank, in / groups * prod(kernel))
    ) -> None:
        """Copy the factors in, cast to the layer's dtype and device.

        Raises:
            ValueError: if a shape does not fit the layer.
        """
        expected_left = (self.groups, self.left_factor.shape[0] // self.groups, self.rank)
        expected_right = (self.groups, self.rank, self.right_factor[0].numel())
        if tuple(left.shape) != expected_left or tuple(right.shape) != expected_right:
            raise ValueError(
                f"factors of shapes {tuple(left.shape)} and {tuple(right.shape)} do not fit {self}; "
                f"expected {expected_left} and {expected_right}"
            )
        with torch.no_grad():
            self.left_factor.copy_(left.reshape(self.left_factor.shape))
            self.right_factor.copy_(right.reshape(self.right_factor.shape))

    def set_bias(self, bias: Tensor | None) -> None:
        """Copy the bias in; both sides must agree on having one.

        Raises:
            ValueError: if exactly one of the layer and the argument has a bias.
        """
        if (bias is None) != (self.bias is None):
            raise ValueError(f"bias={'None' if bias is None else 'a tensor'} does not fit {self}")
        if bias is not None and self.bias is not None:
            with torch.no_grad():
                self.bias.copy_(bias)


class LowRankLinear(LowRankModule):
    """``nn.Linear`` with a weight of rank ``rank``; accepts any number of leading dimensions.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        rank: number of components, from 1 to ``min(in_features, out_features)``.
        bias: whether the layer adds a bias of shape (out_features,).
        device: device of the parameters.
        dtype: dtype of the parameters.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        _check_rank(rank, min(in_features, out_features))
        self.in_features, self.out_features, self.rank, self.groups = in_features, out_features, rank, 1
        self.right_factor = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.left_factor = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )

    @classmethod
    def like(cls, dense: nn.Module, rank: int) -> LowRankLinear:
        """See :meth:`LowRankModule.like`."""
        assert isinstance(dense, nn.Linear)
        return cls(
            dense.in_features,
            dense.out_features,
            rank,
            dense.bias is not None,
            device=dense.weight.device,
            dtype=dense.weight.dtype,
        )

    @property
    def weight(self) -> Tensor:
        """The product of the factors, shape (out_features, in_features)."""
        return self.left_factor @ self.right_factor

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return F.linear(F.linear(x, self.right_factor), self.left_factor, self.bias)

    def to_dense(self) -> nn.Linear:
        """See :meth:`LowRankModule.to_dense`."""
        dense = nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=self.left_factor.device,
            dtype=self.left_factor.dtype,
        )
        _fill_dense(dense, self)
        return dense

    def extra_repr(self) -> str:
        """The geometry, as ``nn.Linear`` prints it, with the rank."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )


class LowRankConv2d(LowRankModule):
    """``nn.Conv2d`` whose unfolded weight has rank ``rank`` in every group.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: height and width of the kernel.
        rank: number of components per group, from 1 to the smaller side of a group's unfolded weight.
        stride: stride of the spatial factor.
        padding: padding of the spatial factor, a pair or one of ``"same"`` and ``"valid"``.
        dilation: dilation of the spatial factor.
        groups: groups of both factors.
        bias: whether the layer adds a bias of shape (out_channels,).
        padding_mode: as for ``nn.Conv2d``.
        device: device of the parameters.
        dtype: dtype of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        rank: int,
        *,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] | str = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        height, width = kernel_size
        _check_rank(rank, min(out_channels // groups, in_channels // groups * height * width))
        self.in_channels, self.out_channels, self.kernel_size, self.rank = in_channels, out_channels, kernel_size, rank
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.padding_mode = padding_mode
        # nn.Conv2d has worked out the widths of the four borders already; F.pad needs them for the other modes
        geometry = nn.Conv2d(1, 1, kernel_size, stride, padding, dilation, padding_mode=padding_mode, device="meta")  # type: ignore[arg-type]
        self._borders: list[int] = list(geometry._reversed_padding_repeated_twice)
        self.right_factor = nn.Parameter(
            torch.empty(groups * rank, in_channels // groups, height, width, device=device, dtype=dtype)
        )
        self.left_factor = nn.Parameter(torch.empty(out_channels, rank, 1, 1, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        )

    @classmethod
    def like(cls, dense: nn.Module, rank: int) -> LowRankConv2d:
        """See :meth:`LowRankModule.like`."""
        assert isinstance(dense, nn.Conv2d)
        return cls(
            rank=rank,
            device=dense.weight.device,
            dtype=dense.weight.dtype,
            **_conv_geometry(dense),
            bias=dense.bias is not None,
        )

    @property
    def weight(self) -> Tensor:
        """The product of the factors, shape (out_channels, in_channels / groups, height, width)."""
        left = self.left_factor.reshape(self.groups, -1, self.rank)
        right = self.right_factor.reshape(self.groups, self.rank, -1)
        return (left @ right).reshape(self.out_channels, *self.right_factor.shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in_channels, height, width) to the output of the dense layer's shape."""
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._borders, mode=self.padding_mode), (0, 0)
        x = F.conv2d(x, self.right_factor, None, self.stride, padding, self.dilation, self.groups)
        return F.conv2d(x, self.left_factor, self.bias, groups=self.groups)

    def to_dense(self) -> nn.Conv2d:
        """See :meth:`LowRankModule.to_dense`."""
        dense = nn.Conv2d(
            **_conv_geometry(self),
            bias=self.bias is not None,
            device=self.left_factor.device,
            dtype=self.left_factor.dtype,
        )
        _fill_dense(dense, self)
        return dense

    def extra_repr(self) -> str:
        """The geometry and the rank."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, rank={self.rank}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, groups={self.groups}, "
            f"bias={self.bias is not None}, padding_mode={self.padding_mode!r}"
        )


def _check_rank(rank: int, full_rank: int) -> None:
    if not 1 <= rank <= full_rank:
        raise ValueError(f"rank={rank} is outside 1..{full_rank}, the full rank of the layer")


def _conv_geometry(module: nn.Conv2d | LowRankConv2d) -> dict[str, Any]:
    names = "in_channels out_channels kernel_size stride padding dilation groups padding_mode"
    return {name: getattr(module, name) for name in names.split()}


def _fill_dense(dense: nn.Linear | nn.Conv2d, low_rank: LowRankModule) -> None:
    with torch.no_grad():
        dense.weight.copy_(low_rank.weight)
        if low_rank.bias is not None and dense.bias is not None:
            dense.bias.copy_(low_rank.bias)
    dense.train(low_rank.training)
