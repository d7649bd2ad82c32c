r"""Best low-rank matrices in a metric, for several groups at once.

For a target T (m x n) the best rank-k matrix in the metric of an output moment S (m x m) and an input moment B (n x n),

    min || S^(1/2) (T - T_k) B^(1/2) ||_F   over matrices of rank k,

is the truncated singular value decomposition of S^(1/2) T B^(1/2), undone on both sides (Eckart and Young 1936). Only
the smaller side is ever decomposed, by eigenvalues. With m <= n and U the leading eigenvectors of
S^(1/2) T B T' S^(1/2)

    T_k = S^(-1/2) U U' S^(1/2) T

so B is never inverted and may be singular; with n < m the roles of the sides change. Any R with R' R = S does as
S^(1/2): damped moments are positive definite and have a Cholesky factor, for a tenth of the work of the symmetric root.
Everything is computed in float64 and in units in which moments and target have size 1, so the scale of the weights does
not matter. A moment with one dimension less is a diagonal: that of a side so large (a vocabulary) that the whole matrix
would not fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lrf_lightning.solver.layers.moments import LARGEST_SIDE

__all__ = [
    "Factors",
    "Root",
    "damped",
    "decomposition_cost",
    "divided",
    "factorize",
    "relative_traces",
]

# time of the eigendecomposition and of working with the root per cubed side, and of passing over a moment per entry, in
# multiply-adds of products
EIGEN, ENTRY = 13.0, 250.0


@dataclass(frozen=True)
class Factors:
    """All components of a factorization, the largest first, in float64.

    Attributes:
        left: shape (g, m, r), columns l_i.
        right: shape (g, r, n), rows r_i; the product of the first k columns and rows is the best matrix of rank k.
        singular_values: shape (g, min(m, n)), of the target in the metric, up to one factor common to all groups.
        gains: squared error in the metric with the best left factor over that with the truncated one, at every rank,
            shape (r,) on the CPU, at most 1; None where both are the same. See
            :mod:`lrf_lightning.solver.factors.conv_orders`.
    """

    left: Tensor
    right: Tensor
    singular_values: Tensor
    gains: Tensor | None = None

    def truncated(self, rank: int) -> tuple[Tensor, Tensor]:
        """The leading components, scaled so that both factors of each have the same norm."""
        left, right = self.left[..., :rank], self.right[..., :rank, :]
        left_norm, right_norm = left.norm(dim=-2), right.norm(dim=-1)
        product = left_norm * right_norm
        scale = torch.where(product > 0, (right_norm / left_norm.clamp_min(1e-300)).sqrt(), torch.ones_like(product))
        safe = torch.where(scale > 0, scale, torch.ones_like(scale))
        return left * safe[..., None, :], right / safe[..., None]

    def spectrum(self) -> Tensor:
        """Root mean square of the singular values over the groups, on the CPU, shape (min(m, n),)."""
        return self.singular_values.square().mean(0).sqrt().cpu()

    def relative_tail(self) -> Tensor:
        """Norm of what truncation to rank k = 1, 2, ... leaves out over the norm of all, in the metric, shape (r,)."""
        energy = self.singular_values.square().sum(0).cpu()  # where sums have one order, whatever the process
        tails = energy.flip(0).cumsum(0).flip(0)  # from the small end, where a difference would cancel
        if tails[0] <= 0:
            return torch.zeros_like(energy)
        return (torch.cat([tails[1:], tails.new_zeros(1)]) / tails[0]).sqrt()


def factorize(
    target: Tensor,  # (g, m, n)
    input_moment: Tensor | None = None,  # (g, n, n) or (g, n)
    output_moment: Tensor | None = None,  # (g, m, m) or (g, m)
    *,
    damping: float = 0.0,
    max_rank: int | None = None,
) -> Factors:
    """Decompose ``target`` in the metric of two moments.

    Args:
        target: matrices to be approximated.
        input_moment: positive semi-definite, or its diagonal, None for the identity.
        output_moment: positive semi-definite, or its diagonal, None for the identity.
        damping: share of the mean eigenvalue that is added to every eigenvalue of the moments.
        max_rank: number of components to return, all by default.

    Returns:
        The leading components.

    Raises:
        ValueError: if the target or a moment is not finite.
    """
    for name, tensor in (("weight", target), ("input moment", input_moment), ("output moment", output_moment)):
        if tensor is not None and not torch.isfinite(tensor).all():
            raise ValueError(f"the {name} holds NaN or infinite entries")
    _, rows, columns = target.shape
    scale = target.abs().amax().to(torch.float64)
    scale = scale if scale > 0 else torch.ones_like(scale)
    unit = target.to(torch.float64) / scale
    inner = None if input_moment is None else damped(input_moment, damping)
    outer = None if output_moment is None else damped(output_moment, damping)
    max_rank = min(rows, columns) if max_rank is None else max_rank
    if rows <= columns:
        left, right, values = _by_rows(unit, inner, outer, damping)
    else:
        back, front, values = _by_rows(unit.transpose(1, 2), outer, inner, damping)
        left, right = front.transpose(1, 2), back.transpose(1, 2)
    for moment in (input_moment, output_moment):
        if moment is not None:
            values = values * relative_traces(moment).sqrt()
    return Factors(left[..., :max_rank], right[..., :max_rank, :] * scale, values * scale)


def damped(moment: Tensor, damping: float) -> Tensor:
    """The moment in float64 with mean eigenvalue 1, plus ``damping`` on the diagonal; zero becomes the identity."""
    moment = moment.to(torch.float64)
    if moment.dim() == 2:
        mean = moment.mean(-1, keepdim=True)
        return torch.where(mean > 0, moment / torch.where(mean > 0, mean, 1.0) + damping, 1.0)
    # in place from here on: for a wide layer, new memory of this size takes longer than the products
    twice = moment + moment.transpose(-1, -2)
    diagonal = twice.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1)
    alive = mean > 0
    twice /= torch.where(alive, mean, 1.0)[..., None, None]
    diagonal += damping
    if not bool(alive.all()):
        twice[~alive] = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    return twice


def relative_traces(moment: Tensor) -> Tensor:
    """Size of every group's moment relative to the largest one, shape (g, 1); ``damped`` takes it out."""
    diagonal = moment if moment.dim() == 2 else moment.diagonal(dim1=-2, dim2=-1)
    trace = diagonal.to(torch.float64).sum(-1, keepdim=True).clamp_min(0)
    largest = trace.amax()
    return torch.where(largest > 0, trace / torch.where(largest > 0, largest, 1.0), 1.0)


def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`torch.linalg.eigh`, on the CPU where the device's routine does not converge, as happens on CUDA."""
    try:
        values, vectors = torch.linalg.eigh(matrices)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if matrices.device.type == "cpu":
            raise
        values, vectors = (part.to(matrices.device) for part in torch.linalg.eigh(matrices.cpu()))
    return values, vectors


def _by_rows(
    target: Tensor,  # (g, m, n) with m <= n
    inner: Tensor | None,  # (g, n, n) or (g, n)
    outer: Tensor | None,  # (g, m, m) or (g, m)
    damping: float,
) -> tuple[Tensor, Tensor, Tensor]:
    gram = _times(target, inner) @ target.transpose(-1, -2)
    if outer is None:
        values, vectors = eigh(gram)
        left, back = vectors, vectors
    else:
        root = Root.of(outer, damping)
        values, vectors = eigh(root.times(root.times(gram).transpose(-1, -2)))
        left, back = root.divided(vectors), root.transposed(vectors)
    # below the rounding of the products nothing is known: count it as zero, so that the rank is the numerical one
    floor = values.amax(-1, keepdim=True) * target.shape[-1] * torch.finfo(values.dtype).eps
    singular_values = torch.where(values > floor, values, torch.zeros_like(values)).flip(-1).sqrt()
    left, back = left.flip(-1), back.flip(-1)
    return left, back.transpose(-1, -2) @ target, singular_values


def _times(target: Tensor, moment: Tensor | None) -> Tensor:
    if moment is None:
        return target
    return target * moment[:, None, :] if moment.dim() == 2 else target @ moment


def divided(
    numerator: Tensor,  # (g, m, n)
    moment: Tensor,  # (g, n, n)
) -> Tensor:
    """``numerator @ moment^(-1)`` for positive definite moments, with a pseudo-inverse if one of them is singular.

    By Cholesky's decomposition: it takes half the work of a general one, whose batched form fails in oneMKL with
    several threads on some processors (AMD EPYC, torch 2.15: "Parameter 6 was incorrect on entry to DLASWP").
    """
    lower, failed = torch.linalg.cholesky_ex(moment)
    if bool(failed.any()):
        inverse: Tensor = torch.linalg.pinv(moment, hermitian=True)
        return numerator @ inverse
    return torch.cholesky_solve(numerator.transpose(1, 2), lower).transpose(1, 2)


@dataclass(frozen=True)
class Root:
    """A matrix R with R' R equal to a moment, of shape (g, m, m), as what it does to columns of shape (g, m, n).

    Attributes:
        root: the Cholesky factor R', the symmetric root R, or a diagonal of shape (g, m, 1).
        inverse: the pseudo-inverse of the symmetric root or of the diagonal, None for a Cholesky factor.
    """

    root: Tensor
    inverse: Tensor | None = None

    @classmethod
    def of(cls, moment: Tensor, damping: float) -> Root:
        """A root of a moment with mean eigenvalue 1 and none below ``damping``, or of a diagonal of shape (g, m).

        Without damping there may be null directions, which stay null: that takes the symmetric root.
        """
        if moment.dim() == 2:
            alive = moment > 0
            root = moment.clamp_min(0).sqrt()
            return cls(root[..., None], torch.where(alive, 1 / torch.where(alive, root, 1.0), 0.0)[..., None])
        epsilon, side = torch.finfo(moment.dtype).eps, moment.shape[-1]
        if damping > side**2 * epsilon:  # above the rounding of the largest eigenvalue that there can be, the trace
            lower, failed = torch.linalg.cholesky_ex(moment)
            if not bool(failed.any()):
                return cls(lower)
        values, vectors = eigh(moment)
        alive = values > values.amax(-1, keepdim=True) * side * epsilon
        root = torch.where(alive, values.clamp_min(0).sqrt(), torch.zeros_like(values))
        inverse = torch.where(alive, 1 / root.clamp_min(torch.finfo(values.dtype).tiny), torch.zeros_like(values))
        back = vectors.transpose(-1, -2)
        return cls((vectors * root[..., None, :]) @ back, (vectors * inverse[..., None, :]) @ back)

    def times(self, columns: Tensor) -> Tensor:
        """R times some columns."""
        return self.root.transpose(-1, -2) @ columns if self.inverse is None else self._product(self.root, columns)

    def transposed(self, columns: Tensor) -> Tensor:
        """R' times some columns."""
        return self._product(self.root, columns)  # as it stands a Cholesky factor is R', and the others are symmetric

    def divided(self, columns: Tensor) -> Tensor:
        """R^(-1) times some columns."""
        if self.inverse is None:
            solved: Tensor = torch.linalg.solve_triangular(self.root.transpose(-1, -2), columns, upper=True)
            return solved
        return self._product(self.inverse, columns)

    @staticmethod
    def _product(root: Tensor, columns: Tensor) -> Tensor:
        return root * columns if root.shape[-1] == 1 != root.shape[-2] else root @ columns


def decomposition_cost(groups: int, rows: int, columns: int) -> float:
    """Estimated time of :func:`factorize`, in multiply-adds of matrix products, for sharing the work out.

    An eigendecomposition of the smaller side and work with the root of its moment, products with the moments of both
    sides, and reading and writing of both moments entry by entry, which dominates where one side is much wider than the
    other. The factors are measured on one core of a CPU, see ``benchmarks/scaling.py``. The larger moment may be a
    diagonal.
    """
    small, large = min(rows, columns), max(rows, columns)
    moment = large if large <= LARGEST_SIDE else 1
    products = float(small) * large * (2 * small + moment)
    return groups * (EIGEN * small**3 + products + ENTRY * (small**2 + large * moment))
