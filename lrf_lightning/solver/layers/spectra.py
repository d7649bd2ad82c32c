"""How many directions a weight really uses: its singular values and four figures that sum them up.

With singular values s_1 >= s_2 >= ... of one matrix and p_i = s_i / sum s_j,

- effective rank: exp(- sum p_i log p_i), between 1 and the full rank (Roy and Vetterli 2007, The effective rank);
- stable rank: sum s_i^2 / s_1^2, at most the rank (Rudelson and Vershynin 2007);
- numerical rank: number of s_i > s_1 * max(m, n) * eps, with eps of float32;
- energy: sum of s_i^2 up to the largest rank that saves parameters, over the sum of all.

Means are taken over the groups of a convolution. They look at the weights alone, not at the data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lrf_lightning.surgery import Candidate

__all__ = ["Spectrum", "spectrum"]


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one layer's weight, and what they say.

    Attributes:
        params: entries of the weight.
        full_rank: number of singular values.
        singular_values: shape (full_rank,), largest first, the root mean square over the groups, float64 on the CPU.
        effective_rank: exponential of the entropy of the normalised singular values.
        stable_rank: squared Frobenius norm over squared spectral norm.
        numerical_rank: singular values above float32's rounding error.
        energy: share of the squared norm within the largest rank that saves parameters.
    """

    params: int
    full_rank: int
    singular_values: Tensor
    effective_rank: float
    stable_rank: float
    numerical_rank: float
    energy: float


def spectrum(candidate: Candidate) -> Spectrum:
    """Decompose a layer's weight by the eigenvalues of its smaller Gram matrix, in float64.

    Raises:
        ValueError: if the weight is not finite.
    """
    weight = candidate.matrices().double()  # (groups, rows, columns)
    if not torch.isfinite(weight).all():
        raise ValueError(f"the weight of {candidate.name!r} holds NaN or infinite values")
    wide = candidate.rows <= candidate.columns
    gram = weight @ weight.transpose(1, 2) if wide else weight.transpose(1, 2) @ weight
    squares = torch.linalg.eigvalsh(gram).flip(-1).clamp_min(0).cpu()  # (groups, full_rank)
    values = squares.sqrt()
    first, total = squares[:, :1], squares.sum(1)
    shares = values / values.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    alive = (total > 0).double()
    tolerance = max(candidate.rows, candidate.columns) * torch.finfo(torch.float32).eps
    everything = float(total.sum())
    return Spectrum(
        params=candidate.dense_params,
        full_rank=candidate.full_rank,
        singular_values=squares.mean(0).sqrt(),
        effective_rank=float((torch.special.entr(shares).sum(1).exp() * alive).mean()),
        stable_rank=float((total / first[:, 0].clamp_min(torch.finfo(torch.float64).tiny)).mean()),
        numerical_rank=float((values > values[:, :1] * tolerance).double().sum(1).mean()),
        energy=float(squares[:, : candidate.max_rank].sum()) / everything if everything > 0 else 1.0,
    )
