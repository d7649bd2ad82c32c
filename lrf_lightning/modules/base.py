"""What all low-rank layers have in common."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["LowRankModule", "check_rank", "memory_format"]


class LowRankModule(nn.Module):
    """Base of all low-rank layers.

    Attributes:
        rank: number of components that are kept, at least 1 and common to all groups.
        groups: number of blocks on the diagonal of the dense weight, 1 for a linear layer.
        split: number of leading spatial dimensions whose kernel belongs to the right factor of a convolution, while
            that of the others belongs to the left one; None if the right factor has the whole kernel, and for layers
            of other kinds.
        left_factor: shape (out, rank, ...).
        right_factor: shape (groups * rank, in / groups, ...).
        bias: as in the dense layer, None if it has none.
    """

    rank: int
    groups: int
    split: int | None = None
    left_factor: nn.Parameter
    right_factor: nn.Parameter
    bias: nn.Parameter | None

    @property
    def weight(self) -> Tensor:
        """The product of the factors in the shape of the dense weight, computed anew at each call."""
        raise NotImplementedError

    @classmethod
    def like(cls, dense: nn.Module, rank: int, *, split: int | None = None) -> LowRankModule:
        """An uninitialised low-rank layer with the geometry, dtype, device and bias of ``dense``.

        Args:
            dense: a layer of the kind that this class stands in for.
            rank: number of components.
            split: see the attribute; it means nothing to kinds that have none.

        Raises:
            ValueError: if the rank is not within 1 and the full rank.
        """
        raise NotImplementedError

    @staticmethod
    def matrices(dense: nn.Module) -> Tensor:
        """The weight of a dense layer as matrices, shape (groups, output side, input side); a view where possible."""
        raise NotImplementedError

    @classmethod
    def objection(cls, dense: nn.Module) -> str | None:
        """Why this dense layer cannot be replaced although its kind can, None if it can."""
        return None

    def to_dense(self) -> nn.Module:
        """The dense layer of the same geometry that computes the same function."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor]:
        """Both factors as matrices, shapes (groups, output side, rank) and (groups, rank, input side).

        Their product equals :meth:`matrices` of the dense layer; that of a convolution with a ``split`` is the same
        weight with those entries of the kernel on the output side that belong to the left factor.
        """
        return (
            self.left_factor.reshape(self.groups, -1, self.rank),
            self.right_factor.reshape(self.groups, self.rank, -1),
        )

    def set_factors(
        self,
        left: Tensor,  # (groups, output side, rank)
        right: Tensor,  # (groups, rank, input side)
    ) -> None:
        """Copy the factors in, cast to the layer's dtype and device.

        Raises:
            ValueError: if a shape does not fit the layer.
        """
        expected_left, expected_right = (tuple(factor.shape) for factor in self.factors())
        if tuple(left.shape) != expected_left or tuple(right.shape) != expected_right:
            raise ValueError(
                f"factors of shapes {tuple(left.shape)} and {tuple(right.shape)} do not fit {self}; "
                f"expected {expected_left} and {expected_right}"
            )
        with torch.no_grad():
            self._copy_factors(left, right)

    def _copy_factors(self, left: Tensor, right: Tensor) -> None:
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

    def _fill(self, dense: nn.Module) -> None:
        """Give a dense layer this one's weight, bias, mode and ``requires_grad``."""
        weight, bias = dense._parameters["weight"], dense._parameters.get("bias")
        assert weight is not None
        with torch.no_grad():
            weight.copy_(self.weight)
            if bias is not None and self.bias is not None:
                bias.copy_(self.bias)
        weight.requires_grad_(self.left_factor.requires_grad)
        if bias is not None and self.bias is not None:
            bias.requires_grad_(self.bias.requires_grad)
        dense.train(self.training)


def check_rank(rank: int, full_rank: int) -> None:
    """Check that a rank lies within 1 and the full rank.

    Raises:
        ValueError: if it does not.
    """
    if not 1 <= rank <= full_rank:
        raise ValueError(f"rank={rank} is outside 1..{full_rank}, the full rank of the layer")


def memory_format(weight: Tensor) -> torch.memory_format:
    """The memory format of a weight, so that a channels-last model keeps its layout."""
    for dims, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if weight.dim() == dims and not weight.is_contiguous() and weight.is_contiguous(memory_format=layout):
            return layout
    return torch.contiguous_format
