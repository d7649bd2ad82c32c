r"""The predicted change of the loss for every rank of a layer at once, from per-sample component derivatives.

Truncation to rank k perturbs the weight by d_k = - sum over i >= k of l_i r_i. With

    z_ni = sum over the rows of sample n of (g . l_i)(r_i . x)

the directional derivative of sample n's loss along d_k is t_n(k) = - sum over i >= k of z_ni, and

    L(W + d_k) - L(W)  ~  mean_n t_n(k)  +  1/2 mean_n t_n(k)^2

the first-order change (with its standard error over the samples) and the curvature along the truncated direction, the
second moment of gradients standing in for the Hessian. Only ranks that save parameters are of interest, so only their
components are projected; the rest of the sum follows from the total g . (W x), which costs no extra product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lrf_lightning.distributed import ALONE, Processes
from lrf_lightning.solver.evaluation import Batches, LossFunction
from lrf_lightning.solver.factorization import Factors
from lrf_lightning.solver.statistics import LayerStatistics, Use, backward_passes

__all__ = ["Prediction", "component_derivatives", "predict", "shrink", "tail_derivatives", "tail_moments"]


@dataclass(frozen=True)
class Prediction:
    """Predictions for the ranks 1 to r of one layer, float64 on the CPU, each of shape (r,)."""

    first_order: Tensor
    standard_error: Tensor
    curvature: Tensor
    perturbation: Tensor

    def change(self, errors: float) -> Tensor:
        """First-order change, believed only beyond ``errors`` standard errors from 0, plus curvature."""
        # a single sample has an infinite standard error: 0 times that is 0 here, the figure is taken at face value
        threshold = self.standard_error * errors if errors > 0 else torch.zeros_like(self.standard_error)
        return shrink(self.first_order, threshold) + self.curvature


@dataclass
class _Derivatives:
    heads: list[Tensor]  # per batch (B, r): z of the components that are projected
    totals: list[Tensor]  # per batch (B,): sum of z over all components

    def add(self, calls: list[tuple[Tensor, Tensor]], size: int, components: int) -> None:
        """Add up the calls of one batch; the samples of a batch in which the layer did not run do not depend on it."""
        none = torch.zeros(size, components, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
        self.heads.append(sum((head for head, _ in calls), none[0]))
        self.totals.append(sum((total for _, total in calls), none[1]))

    def joined(self, components: int) -> tuple[Tensor, Tensor]:
        """Those of all batches; a process may have none."""
        none = torch.zeros(0, components, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
        return torch.cat([none[0], *self.heads]), torch.cat([none[1], *self.totals])


def component_derivatives(
    model: nn.Module,
    layers: Mapping[str, LayerStatistics],
    factors: Mapping[str, Factors],
    loss: LossFunction,
    batches: Batches,
    device: torch.device,
    *,
    processes: Processes = ALONE,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """One forward and backward pass that collects the directional derivatives of every sample of this process.

    Args:
        model: dense model on ``device``.
        layers: the layers by name.
        factors: their leading components by name, r of them.
        loss: the user's loss.
        batches: calibration data.
        device: where batches are moved to.
        processes: who else works on other batches.
        advance: called after every batch.

    Returns:
        For every layer the derivatives along its components, shape (samples, r), and along the whole weight, shape
        (samples,), both on the CPU in float64.
    """
    collected = {name: _Derivatives([], []) for name in layers}
    working = {
        name: (f.left.to(device, _row_dtype(layers[name])), f.right.to(device, _row_dtype(layers[name])))
        for name, f in ((name, _balanced(factors[name])) for name in layers)
    }
    pending: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}

    def on_forward(use: Use, x: Tensor, output: Tensor, size: int, index: int) -> Callable[[Tensor], None]:
        reader, (left, right) = use.reader, working[use.name]
        if use.transposed:
            left, right = right.transpose(1, 2), left.transpose(1, 2)
        projected = reader.project(x.to(right.dtype), right, size)
        bias = use.modules[0]._parameters.get("bias")

        def on_gradient(grad: Tensor) -> None:
            grad = grad.to(left.dtype)
            head = reader.components(projected, grad, left, size)
            total = reader.inner(grad, output, None if bias is None else bias.detach(), size)
            pending[use.name].append((head.double().cpu(), total.double().cpu()))

        return on_gradient

    def flush(size: int) -> None:
        for name, calls in pending.items():
            collected[name].add(calls, size, factors[name].left.shape[-1])
            calls.clear()
        advance()

    with processes.together("the curves"):
        backward_passes(model, layers, loss, batches, device, on_forward, flush, processes)
    return {name: derivatives.joined(factors[name].left.shape[-1]) for name, derivatives in collected.items()}


def predict(
    tails: Tensor,  # (samples, r)
    relative_tail: Tensor,  # (r,)
    processes: Processes = ALONE,
) -> Prediction:
    """First-order change, its standard error and the curvature at the ranks 1 to r, over all processes' samples."""
    mean, square, error = tail_moments(tails, processes)
    return Prediction(mean, error, square / 2, relative_tail[: len(mean)].cpu())


def tail_derivatives(
    heads: Tensor,  # (samples, r)
    totals: Tensor,  # (samples,)
    gains: Tensor | None = None,  # (r,)
) -> Tensor:
    """Derivative of every sample's loss along the truncation to the ranks 1 to r, shape (samples, r).

    Where better factors than the truncated ones leave a share ``gains`` of the squared error, they are taken for a
    perturbation in the same direction that is as much shorter.
    """
    tails = -(totals[:, None] - heads.cumsum(1))
    return tails if gains is None else tails * gains.to(tails).sqrt()


def tail_moments(tails: Tensor, processes: Processes = ALONE) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, mean square and standard error of the mean of every column over the samples of all processes."""
    count = torch.tensor(float(len(tails)), dtype=torch.float64)
    total, square = tails.sum(0), tails.square().sum(0)
    processes.sum_([count, total])
    mean = total / count
    spread = (tails - mean).square().sum(0)
    processes.sum_([square, spread])
    samples = float(count)
    error = (spread / (samples - 1)).sqrt() / math.sqrt(samples) if samples > 1 else torch.full_like(mean, math.inf)
    return mean, square / samples, error


def shrink(value: Tensor, threshold: Tensor) -> Tensor:
    """Soft threshold: move ``value`` towards 0 by ``threshold``, stopping there."""
    return value.sign() * (value.abs() - threshold).clamp_min(0)


def _row_dtype(layer: LayerStatistics) -> torch.dtype:
    weight = layer.candidate.module._parameters["weight"]
    assert weight is not None
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _balanced(factors: Factors) -> Factors:
    left, right = factors.truncated(factors.left.shape[-1])
    return Factors(left, right, factors.singular_values)
