"""The published greedy algorithms, as far as the sources allow.

Source: "Compression for Better" (arXiv 2412.06868), Algorithm 2, and "Lossless Model Compression via Joint Low-Rank
Factorization Optimization" (arXiv 2412.06867). For every layer by itself, and for k = 1, 2, ... below break-even:
truncate the weight W to W_k by plain singular value decomposition, d_k = W_k - W; where the error of d_k stays within
gamma and <G, d_k> is negative, with G the mean gradient over the data, k is a candidate; stop when the error is near 0.

* *lossless* takes the candidate with the smallest predicted loss, L + <G, d_k>,
* *compact* takes the smallest candidate;

a layer without candidates is left alone. Gradients only: no curvature, no compensation, no view across layers.

Here all ranks are evaluated at once: the error from the singular values, <G, d_k> from the components' derivatives
(:mod:`lrf_lightning.solver.predictions.curves`). A test holds the candidates against the literal loop.

Inferred, since the sources leave it open:

* gamma. The published 1e-4 fits a mean squared elementwise error of usual weights (``gamma_kind="mean_square"``).
  By default gamma bounds the squared error relative to the squared norm of the weight, which means the same for every
  layer; 1e-4 is about 0.1 of the mean square of a weight with entries of about 0.03.
* the loss that is compared is the predicted one; the sources speak of gradients only.
* "near 0" is a relative error of 1e-6, which nothing but rounding is below.
* *compact* is only described in words.
* the sources calibrate on the data they report on. Here G comes from the calibration split, and the result is judged on
  the verification split like any other.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["candidate_ranks", "greedy_rank"]

NEAR_ZERO = 1e-6


def greedy_rank(
    first_order: Tensor,  # (r,)
    relative_error: Tensor,  # (r,)
    gamma: float,
    variant: Literal["lossless", "compact"],
) -> int | None:
    """The rank that the published algorithm gives one layer.

    Args:
        first_order: <G, d_k> at the ranks 1 to r below break-even.
        relative_error: Frobenius norm of d_k over that of the weight at the same ranks.
        gamma: largest squared relative error. A bound g on the mean squared elementwise error is the squared relative
            error g / (mean squared entry of the weight).
        variant: which of the two algorithms.

    Returns:
        The rank, or None if the layer is left alone.
    """
    ranks = candidate_ranks(first_order, relative_error, gamma)
    if not ranks:
        return None
    # of equal losses min takes the first, as a loop that keeps the best one so far does
    return ranks[0] if variant == "compact" else min(ranks, key=lambda rank: float(first_order[rank - 1]))


def candidate_ranks(
    first_order: Tensor,  # (r,)
    relative_error: Tensor,  # (r,)
    gamma: float,
) -> list[int]:
    """The ranks that Algorithm 2 records for one layer, in rising order; see :func:`greedy_rank`."""
    near_zero = relative_error <= NEAR_ZERO
    # the loop ends with the first rank whose error is near 0, that rank included
    reached = torch.cat([near_zero.new_zeros(1), near_zero[:-1]]).cumsum(0) == 0
    candidates = reached & (relative_error.square() <= gamma) & (first_order < 0)
    return [index + 1 for index in candidates.nonzero().flatten().tolist()]
