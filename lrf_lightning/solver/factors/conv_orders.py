r"""The orders in which a convolution can be factorized, and which one is best for a layer.

The weight of one group is W of shape (m, c, k): outputs, input channels, entries of the kernel. *Kernel first*
truncates the matrix (m, c k), the space of the outputs, in closed form in the metric of the patches' moment
A (c k x c k) and of the output gradients' moment S (m x m). The other orders give a part of the kernel, its last
dimensions with l entries in all, to the left factor, and truncate the matrix (m l, d) with d = c k / l:

* *pointwise first*, l = k: the space of the input channels. Behind a rectifier the channels are positive and strongly
  correlated, so that a few directions hold most of their energy; there this order is far better at equal size.
* *spatial split*, l = the entries of all but the first dimensions: a column of the kernel, then a row.

W_a ~ H_a V for every entry a of the left factor's part. For these the metric does not factor into the two sides of the
matrix. V comes from the nearest one that does: C, the mean over the entries a of the moment of what V reads, and S for
every entry,

    || (S^(1/2) x I) W C^(1/2) ||  truncated,  V = leading right vectors times C^(-1/2)

and given V the kernels are the least-squares answer in the metric itself, with T = V x I:

    H = W A T' (T A T')^(-1)

whatever S is, since every output is a regression of its own. The error of that is known for all ranks from a single
Cholesky decomposition of T A T', whose leading blocks belong to the smaller ranks.

Letters as in :mod:`lrf_lightning.solver.layers.rows`; moments are damped as in
:mod:`lrf_lightning.solver.factors.factorization`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lrf_lightning.solver.factors.factorization import (
    EIGEN,
    ENTRY,
    Factors,
    Root,
    damped,
    decomposition_cost,
    divided,
    factorize,
    relative_traces,
)
from lrf_lightning.surgery import Candidate

__all__ = ["best_factors", "decomposed", "layer_factors", "order_cost"]

SHARES = (0.5, 0.25)  # of the dense layer's cost at which the orders are compared
RIDGE = 1e-10  # keeps regressions on dead channels solvable
SMALLEST_ERROR = 1e-12  # below it is rounding


def layer_factors(
    candidate: Candidate,
    target: Tensor,  # (g, m, n)
    input_moment: Tensor | None,  # (g, n, n) or (g, n)
    output_moment: Tensor | None,  # (g, m, m) or (g, m)
    *,
    damping: float,
    max_rank: int,
) -> Factors:
    """Nested components of a layer in the metric, shapes (g, sides[0], r) and (g, r, sides[1]).

    Args:
        candidate: the layer, with the order of its factors.
        target: what is approximated, as the layer's weight.
        input_moment: None for the identity.
        output_moment: None for the identity.
        damping: see :func:`~lrf_lightning.solver.factors.factorization.factorize`.
        max_rank: number of components.
    """
    if candidate.split is None:
        return factorize(target, input_moment, output_moment, damping=damping, max_rank=max_rank)
    weighted = _weighted(target, output_moment, damping)
    return _truncated(candidate, target, weighted, input_moment, damping, max_rank)[0]


def _weighted(target: Tensor, output_moment: Tensor | None, damping: float) -> Tensor:
    """S^(1/2) W in float64, shape (g, m, n)."""
    target = target.double()
    if output_moment is None:
        return target
    root = Root.of(damped(output_moment, damping), damping)
    return root.times(target) * relative_traces(output_moment)[..., None].sqrt()


def _truncated(
    candidate: Candidate,
    target: Tensor,  # (g, m, n)
    weighted: Tensor,  # (g, m, n)
    input_moment: Tensor | None,
    damping: float,
    max_rank: int,
) -> tuple[Factors, Tensor]:
    """Nested components in an order whose left factor has a part of the kernel, and S^(1/2) times their left factor."""
    kernel = candidate.left_kernel
    read = None if input_moment is None else _read_moment(input_moment, kernel)
    found = factorize(_by_entry(weighted, kernel), read, damping=damping, max_rank=max_rank)
    # the rows are orthogonal in the metric of what they read: every component's column is a regression by itself
    plain, right = _by_entry(target.double(), kernel), found.right
    dual = right
    if read is not None:
        metric = damped(read, damping)
        dual = right * metric[:, None, :] if metric.dim() == 2 else right @ metric
    energy = (dual * right).sum(-1)
    dual = dual / torch.where(energy > 0, energy, 1.0)[..., None]
    left = torch.where(energy[:, None, :] > 0, plain @ dual.transpose(1, 2), 0.0)
    return Factors(left, right, found.singular_values), found.left


def best_factors(
    candidate: Candidate,
    factors: Factors,
    rank: int,
    target: Tensor,  # (g, m, n)
    input_moment: Tensor | None,
    *,
    damping: float,
) -> tuple[Tensor, Tensor]:
    """The best factors of one rank; those of smaller ranks are not among them where the kernels are fitted anew.

    Args:
        candidate: the layer, with the order of its factors.
        factors: at least as many components, see :func:`layer_factors`.
        rank: the rank.
        target: what is approximated.
        input_moment: None for the identity.
        damping: see :func:`~lrf_lightning.solver.factors.factorization.factorize`.
    """
    if not _is_regressed(candidate, input_moment):
        return factors.truncated(rank)
    assert input_moment is not None
    right = factors.right[:, :rank]
    gram, explained = _normal_equations(target.double(), right, damped(input_moment, damping), candidate.left_kernel)
    kernels = divided(explained, gram)
    groups, rows = kernels.shape[:2]
    left = kernels.reshape(groups, rows, rank, -1).transpose(2, 3).reshape(groups, -1, rank)
    return Factors(left, right, factors.singular_values).truncated(rank)


def decomposed(
    order: Candidate,
    target: Tensor,  # (g, m, n)
    input_moment: Tensor | None,
    output_moment: Tensor | None,
    *,
    damping: float,
    cost: float | None = None,
) -> tuple[float, Factors]:
    """All components of a layer in one order, and a score to compare orders by, the lower the better.

    The score is the sum of the logarithms of the relative squared errors in the metric at a half and a quarter of the
    dense layer's cost.

    Args:
        order: the layer with an order of its factors.
        target: its weight.
        input_moment: None for the identity.
        output_moment: None for the identity.
        damping: see :func:`~lrf_lightning.solver.factors.factorization.factorize`.
        cost: what one component costs, as a share of the dense layer; by default in parameters.
    """
    if order.split is None:
        factors = factorize(target, input_moment, output_moment, damping=damping, max_rank=order.max_rank)
        errors = factors.relative_tail().square()
    else:
        weighted = _weighted(target, output_moment, damping)
        factors, left = _truncated(order, target, weighted, input_moment, damping, order.max_rank)
        errors = factors.relative_tail().square()
        if _is_regressed(order, input_moment):
            assert input_moment is not None
            inputs = damped(input_moment, damping) * relative_traces(input_moment)[..., None]
            truncated, errors = _errors(weighted, left, factors.right, inputs, order.left_kernel)
            factors = replace(factors, gains=(errors / truncated).clamp_max(1.0))
    cost = order.low_rank_params(1) / order.dense_params if cost is None else cost
    ranks = [min(int(share / cost), len(errors)) for share in SHARES]
    # without a component everything is lost
    return sum(math.log(max(float(errors[rank - 1]), SMALLEST_ERROR)) for rank in ranks if rank > 0), factors


def order_cost(order: Candidate) -> float:
    """Estimated time of :func:`decomposed`, in multiply-adds of matrix products, for sharing the work out.

    The kernel first is one :func:`~lrf_lightning.solver.factors.factorization.factorize`. Another order takes one
    eigendecomposition of the smaller side of its matrix, passes over the moment of the patches entry by entry, and the
    products and the Cholesky decomposition of the regression at all ranks. See ``benchmarks/scaling.py`` for measured
    times.
    """
    if order.split is None:
        return decomposition_cost(order.groups, order.rows, order.columns)
    (rows, read), width = order.sides, order.max_rank * order.left_kernel
    small = min(rows, read)
    products = rows * read * (read + small)
    regression = width * (read * order.columns + width * read + order.rows * order.columns + 2 * order.rows * width)
    entries = order.columns**2 + width**2
    return order.groups * (EIGEN * small**3 + products + regression + width**3 / 3 + ENTRY * entries)


def _is_regressed(candidate: Candidate, input_moment: Tensor | None) -> bool:
    """Whether there is a better choice of the kernels than the truncation."""
    return candidate.split is not None and input_moment is not None and input_moment.dim() == 3


def _errors(
    weighted: Tensor,  # (g, m, n)
    left: Tensor,  # (g, m l, r)
    right: Tensor,  # (g, r, d)
    inputs: Tensor,  # (g, n, n)
    kernel: int,
) -> tuple[Tensor, Tensor]:
    """Relative squared errors in the metric at every rank, of the truncation and with the best kernels, each (r,).

    ``weighted`` and ``left`` have S^(1/2) in them, so that the metric of the outputs is the identity.
    """
    gram, explained = _normal_equations(weighted, right, inputs, kernel)
    rank = right.shape[1]
    truncated = _by_outputs(left, kernel)  # (g, m, r l)
    everything = float(((weighted @ inputs) * weighted).sum())
    if everything <= 0:  # a zero weight
        nothing = torch.full((rank,), SMALLEST_ERROR, dtype=gram.dtype, device=gram.device)
        return nothing, nothing
    # what the first r components explain, for all r: rows of the Cholesky factor's inverse are nested
    lower, _ = torch.linalg.cholesky_ex(gram)
    solved = torch.linalg.solve_triangular(lower, explained.transpose(1, 2), upper=False)
    best = solved.square().sum((0, 2)).reshape(rank, kernel).sum(1).cumsum(0)
    cross = (explained * truncated).sum((0, 1)).reshape(rank, kernel).sum(1).cumsum(0)
    pairs = ((truncated.transpose(1, 2) @ truncated) * gram).sum(0)
    pairs = pairs.reshape(rank, kernel, rank, kernel).sum((1, 3))
    own = pairs.cumsum(0).cumsum(1).diagonal()
    left_out = torch.stack([everything - 2 * cross + own, everything - best]) / everything
    return tuple(left_out.clamp_min(SMALLEST_ERROR).cpu())


def _normal_equations(
    target: Tensor,  # (g, m, n)
    right: Tensor,  # (g, r, d)
    moment: Tensor,  # (g, n, n)
    kernel: int,
) -> tuple[Tensor, Tensor]:
    """T A T', with a ridge for dead channels, shape (g, r l, r l), and W A T', shape (g, m, r l)."""
    groups, rank, channels = right.shape
    blocks = moment.reshape(groups, channels, kernel, channels, kernel)
    mixed = torch.einsum("gri,giajb->grajb", right, blocks)  # T A
    gram = torch.einsum("grajb,gsj->grasb", mixed, right).reshape(groups, rank * kernel, rank * kernel)
    explained = target @ mixed.reshape(groups, rank * kernel, -1).transpose(1, 2)
    # components differ by orders of magnitude: every one gets a share of its own energy
    energy = gram.diagonal(dim1=1, dim2=2)
    ridge = RIDGE * torch.where(energy > 0, energy, 1.0)
    return gram + torch.diag_embed(ridge), explained


def _by_entry(weight: Tensor, kernel: int) -> Tensor:
    """(g, m, d l) as (g, m l, d)."""
    groups, rows, _ = weight.shape
    return weight.reshape(groups, rows, -1, kernel).transpose(2, 3).reshape(groups, rows * kernel, -1)


def _by_outputs(left: Tensor, kernel: int) -> Tensor:
    """(g, m l, r) as (g, m, r l)."""
    groups, _, rank = left.shape
    return left.reshape(groups, -1, kernel, rank).transpose(2, 3).reshape(groups, -1, rank * kernel)


def _read_moment(moment: Tensor, kernel: int) -> Tensor:
    """The mean of a patch moment over the left factor's entries, (g, d, d) from (g, n, n), or (g, d) from (g, n)."""
    if moment.dim() == 2:
        return moment.reshape(len(moment), -1, kernel).mean(-1)
    channels = moment.shape[-1] // kernel
    blocks = moment.reshape(len(moment), channels, kernel, channels, kernel)
    return blocks.diagonal(dim1=2, dim2=4).mean(-1)
