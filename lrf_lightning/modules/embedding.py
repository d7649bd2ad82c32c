"""Low-rank stand-in for ``nn.Embedding``: a lookup of ``rank`` numbers per entry, then a linear map.

The table (num_embeddings, embedding_dim) is ``left_factor @ right_factor``, in the same layout as the weight of a
linear layer that shares it. As a matrix from one-hot rows to outputs it is the transpose, (embedding_dim,
num_embeddings); that is the form in which :meth:`LowRankEmbedding.matrices` and ``set_factors`` speak.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrf_lightning.modules.base import LowRankModule, check_rank

__all__ = ["LowRankEmbedding"]


class LowRankEmbedding(LowRankModule):
    """``nn.Embedding`` with a table of rank ``rank``.

    Args:
        num_embeddings: number of entries of the table.
        embedding_dim: size of each of them.
        rank: number of components, from 1 to the smaller side of the table.
        padding_idx: entry whose part of the left factor gets no gradient, None for none; not negative.
        device: device of the parameters.
        dtype: dtype of the parameters.
    """

    # as in the dense layer; with other values it is not replaced, see objection
    max_norm, norm_type, scale_grad_by_freq, sparse = None, 2.0, False, False

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        *,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_rank(rank, min(num_embeddings, embedding_dim))
        self.num_embeddings, self.embedding_dim, self.rank, self.groups = num_embeddings, embedding_dim, rank, 1
        self.padding_idx = padding_idx
        self.right_factor = nn.Parameter(torch.empty(rank, embedding_dim, device=device, dtype=dtype))
        self.left_factor = nn.Parameter(torch.empty(num_embeddings, rank, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    @classmethod
    def like(cls, dense: nn.Module, rank: int, *, split: int | None = None) -> LowRankEmbedding:
        """See :meth:`LowRankModule.like`."""
        assert isinstance(dense, nn.Embedding)
        return cls(
            dense.num_embeddings,
            dense.embedding_dim,
            rank,
            padding_idx=dense.padding_idx,
            device=dense.weight.device,
            dtype=dense.weight.dtype,
        )

    @staticmethod
    def matrices(dense: nn.Module) -> Tensor:
        """See :meth:`LowRankModule.matrices`; shape (1, embedding_dim, num_embeddings)."""
        assert isinstance(dense, nn.Embedding)
        return dense.weight.detach().T[None]

    @classmethod
    def objection(cls, dense: nn.Module) -> str | None:
        """See :meth:`LowRankModule.objection`."""
        assert isinstance(dense, nn.Embedding)
        if dense.max_norm is not None:
            return f"max_norm={dense.max_norm:g} rewrites its weight at every call"
        if dense.sparse:
            return "its gradients are sparse (sparse=True)"
        if dense.scale_grad_by_freq:
            return "its gradients are scaled by frequency (scale_grad_by_freq=True)"
        return None

    def factors(self) -> tuple[Tensor, Tensor]:
        """See :meth:`LowRankModule.factors`; shapes (1, embedding_dim, rank) and (1, rank, num_embeddings)."""
        return self.right_factor.T[None], self.left_factor.T[None]

    def _copy_factors(self, left: Tensor, right: Tensor) -> None:
        self.left_factor.copy_(right[0].T)
        self.right_factor.copy_(left[0].T)

    @property
    def weight(self) -> Tensor:
        """The product of the factors, shape (num_embeddings, embedding_dim)."""
        return self.left_factor @ self.right_factor

    def forward(self, x: Tensor) -> Tensor:
        """Map indices of any shape (...) to (..., embedding_dim)."""
        return F.embedding(x, self.left_factor, self.padding_idx) @ self.right_factor

    def to_dense(self) -> nn.Module:
        """See :meth:`LowRankModule.to_dense`; an ``nn.Embedding``."""
        dense = nn.Embedding(
            self.num_embeddings,
            self.embedding_dim,
            padding_idx=self.padding_idx,
            device=self.left_factor.device,
            dtype=self.left_factor.dtype,
        )
        self._fill(dense)
        return dense

    def extra_repr(self) -> str:
        """The geometry, as ``nn.Embedding`` prints it, with the rank."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}{padding}"
