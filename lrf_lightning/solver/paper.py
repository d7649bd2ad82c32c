"""The published greedy algorithms, as far as the sources allow.

Source: "Compression for Better" (arXiv 2412.06868), Algorithm 2, and "Lossless Model Compression via Joint Low-Rank
Factorization Optimization" (arXiv 2412.06867). For every layer by itself: among the ranks below break-even whose
truncation error stays within gamma and whose first-order change <G, d_k> is negative,

* *lossless* takes the rank with the smallest predicted loss,
* *compact* takes the smallest rank;

a layer without such a rank is left alone. Plain singular value decomposition, gradients only: no curvature, no
compensation.

Inferred, since the sources leave it open: gamma bounds the squared error relative to the squared norm of the weight
(the published 1e-4 fits a mean squared elementwise error of usual weights, which is about 0.1 of their mean square);
*compact* is only described in words.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

__all__ = ["greedy_rank"]


def greedy_rank(
    first_order: Tensor,  # (r,)
    relative_error: Tensor,  # (r,)
    gamma: float,
    variant: Literal["lossless", "compact"],
) -> int | None:
    """The rank that the published algorithm gives one layer.

    Args:
        first_order: <G, d_k> at the ranks 1 to r below break-even.
        relative_error: norm of d_k over norm of the weight at the same ranks.
        gamma: largest squared relative error.
        variant: which of the two algorithms.

    Returns:
        The rank, or None if the layer is left alone.
    """
    candidates = ((relative_error.square() <= gamma) & (first_order < 0)).nonzero().flatten()
    if len(candidates) == 0:
        return None
    if variant == "compact":
        return int(candidates[0]) + 1
    return int(candidates[first_order[candidates].argmin()]) + 1
