"""Low-rank stand-ins for ``nn.Linear`` and for Hugging Face's ``Conv1D``, a linear layer with a transposed weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrf_lightning.modules.base import LowRankModule, check_rank

__all__ = ["LowRankLinear", "LowRankTransposedLinear"]


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
        check_rank(rank, min(in_features, out_features))
        self.in_features, self.out_features, self.rank, self.groups = in_features, out_features, rank, 1
        self.right_factor = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.left_factor = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )

    @classmethod
    def like(cls, dense: nn.Module, rank: int, *, split: int | None = None) -> LowRankLinear:
        """See :meth:`LowRankModule.like`."""
        weight = dense._parameters["weight"]
        assert weight is not None
        out_features, in_features = weight.shape
        has_bias = dense._parameters.get("bias") is not None
        return cls(in_features, out_features, rank, has_bias, device=weight.device, dtype=weight.dtype)

    @staticmethod
    def matrices(dense: nn.Module) -> Tensor:
        """See :meth:`LowRankModule.matrices`; shape (1, out_features, in_features)."""
        weight = dense._parameters["weight"]
        assert weight is not None
        return weight.detach()[None]

    @property
    def weight(self) -> Tensor:
        """The product of the factors, shape (out_features, in_features)."""
        return self.left_factor @ self.right_factor

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return F.linear(F.linear(x, self.right_factor), self.left_factor, self.bias)

    def to_dense(self) -> nn.Module:
        """See :meth:`LowRankModule.to_dense`; an ``nn.Linear``."""
        dense = nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=self.left_factor.device,
            dtype=self.left_factor.dtype,
        )
        self._fill(dense)
        return dense

    def extra_repr(self) -> str:
        """The geometry, as ``nn.Linear`` prints it, with the rank."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )


class LowRankTransposedLinear(LowRankLinear):
    """Hugging Face's ``Conv1D`` (GPT-2), which stores its weight as (in_features, out_features).

    The factors lie as in :class:`LowRankLinear`; only ``weight`` is transposed.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        rank: number of components.
        dense_type: class of the dense layer, called as ``dense_type(out_features, in_features)`` by :meth:`to_dense`.
        device: device of the parameters.
        dtype: dtype of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        dense_type: type[nn.Module],
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, rank, bias=True, device=device, dtype=dtype)
        self.dense_type = dense_type

    @classmethod
    def like(cls, dense: nn.Module, rank: int, *, split: int | None = None) -> LowRankTransposedLinear:
        """See :meth:`LowRankModule.like`."""
        weight = dense._parameters["weight"]
        assert weight is not None
        in_features, out_features = weight.shape
        return cls(in_features, out_features, rank, dense_type=type(dense), device=weight.device, dtype=weight.dtype)

    @staticmethod
    def matrices(dense: nn.Module) -> Tensor:
        """See :meth:`LowRankModule.matrices`; shape (1, out_features, in_features)."""
        weight = dense._parameters["weight"]
        assert weight is not None
        return weight.detach().T[None]

    @property
    def weight(self) -> Tensor:
        """The product of the factors, shape (in_features, out_features)."""
        return (self.left_factor @ self.right_factor).T

    def to_dense(self) -> nn.Module:
        """See :meth:`LowRankModule.to_dense`; of the class that was replaced."""
        dense = self.dense_type(self.out_features, self.in_features)
        dense.to(device=self.left_factor.device, dtype=self.left_factor.dtype)
        self._fill(dense)
        return dense
