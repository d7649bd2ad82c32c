r"""The predicted change of the loss for every rank of a layer at once, from per-sample component derivatives.

Truncation to rank k perturbs the weight by d_k = - sum over i >= k of l_i r_i. With

    z_ni = sum over the rows of sample n of (g . l_i)(r_i . x)

the directional derivative of sample n's loss along d_k is t_n(k) = - sum over i >= k of z_ni, and

    L(W + d_k) - L(W)  ~  mean_n t_n(k)  +  1/2 mean_n t_n(k)^2

the first-order change (with its standard error over the samples) and the curvature along the truncated direction, the
second moment of gradients standing in for the Hessian. Only ranks that save parameters are of interest, so only their
components are projected; the rest of the sum follows from the total g . (W x), which costs no extra product.

Where a sample's loss is a mean over T terms (tokens, pixels), its own derivative squared is not its curvature, but up
to T times smaller. A second pass, back from the terms with random signs
(:meth:`~lrf_lightning.solver.running.loss_terms.LossTerms.scattered`), then gives the t_n(k) of the second sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lrf_lightning.distributed import ALONE, Processes
from lrf_lightning.solver.factors.factorization import Factors
from lrf_lightning.solver.layers.backward_passes import Use, backward_passes, scattered_loss, summed_loss
from lrf_lightning.solver.layers.layer_curve import Curve, Prediction
from lrf_lightning.solver.layers.layer_statistics import LayerStatistics
from lrf_lightning.solver.running.evaluation import Batches, LossFunction

__all__ = [
    "Derivatives",
    "Tails",
    "component_derivatives",
    "energy_curve",
    "predict",
    "tail_moments",
]


@dataclass(frozen=True)
class Tails:
    """Derivatives of every sample's loss along truncations, one column each, float64 on the CPU.

    Attributes:
        loss: shape (samples, r), of the loss itself; their mean is the first-order change.
        scattered: shape (samples, r), of its terms with random signs, whose half mean square is the curvature; the same
            as ``loss`` where every sample is one term.
    """

    loss: Tensor
    scattered: Tensor


@dataclass(frozen=True)
class Derivatives:
    """Derivatives of every sample's loss along a layer's components and along its whole weight, float64 on the CPU.

    Attributes:
        loss: those of the loss itself, shapes (samples, r) and (samples,).
        scattered: those of its terms with random signs; the same where every sample is one term.
    """

    loss: tuple[Tensor, Tensor]
    scattered: tuple[Tensor, Tensor]

    def tails(self, gains: Tensor | None = None) -> Tails:
        """Derivatives along the truncation to the ranks 1 to r.

        Args:
            gains: share of the squared error that better factors than the truncated ones leave, shape (r,). They are
                taken for a perturbation in the same direction that is as much shorter.
        """
        loss = _tails(*self.loss, gains)
        return Tails(loss, loss if self.scattered is self.loss else _tails(*self.scattered, gains))


class _Collected:
    """Derivatives of one layer, batch by batch: heads (B, r) and totals (B,)."""

    def __init__(self, components: int) -> None:
        self.components = components
        self.loss: list[tuple[Tensor, Tensor]] = []
        self.scattered: list[tuple[Tensor, Tensor]] = []

    def add(self, calls: Sequence[tuple[Tensor, Tensor]], size: int, target: int) -> None:
        """Add up the calls of one batch; the samples of a batch in which the layer did not run do not depend on it.

        Args:
            calls: derivatives of every call of the layer.
            size: samples of the batch.
            target: 0 for the loss, 1 for its scattered terms, which come after it.
        """
        none = _zeros(size, self.components), _zeros(size)
        sums = sum((head for head, _ in calls), none[0]), sum((total for _, total in calls), none[1])
        if target == 0:
            self.loss.append(sums)
            self.scattered.append(sums)  # until the batch turns out to have terms
        else:
            self.scattered[-1] = sums

    def joined(self) -> Derivatives:
        """Those of all batches; a process may have none."""
        loss = self._joined(self.loss)
        alike = all(a is b for a, b in zip(self.loss, self.scattered, strict=True))
        return Derivatives(loss, loss if alike else self._joined(self.scattered))

    def _joined(self, batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        none = _zeros(0, self.components), _zeros(0)
        heads, totals = zip(none, *batches, strict=True)
        return torch.cat(heads), torch.cat(totals)


def component_derivatives(
    model: nn.Module,
    layers: Mapping[str, LayerStatistics],
    factors: Mapping[str, Factors],
    loss: LossFunction,
    batches: Batches,
    device: torch.device,
    *,
    seed: int = 0,
    processes: Processes = ALONE,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Derivatives]:
    """Collect the derivatives of this process's samples, in one forward and backward pass or, with terms, in two.

    Args:
        model: dense model on ``device``.
        layers: the layers by name.
        factors: their leading components by name, r of them.
        loss: the user's loss.
        batches: calibration data.
        device: where batches are moved to.
        seed: of the random signs of terms.
        processes: who else works on other batches.
        advance: called after every batch.
    """
    collected = {name: _Collected(factors[name].left.shape[-1]) for name in layers}
    working = {
        name: (f.left.to(device, _row_dtype(layers[name])), f.right.to(device, _row_dtype(layers[name])))
        for name, f in ((name, _balanced(factors[name])) for name in layers)
    }
    pending: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}

    def on_forward(use: Use, x: Tensor, output: Tensor, size: int, index: int) -> Callable[[Tensor], None]:
        reader, (left, right) = use.reader, working[use.name]
        if use.transposed:
            left, right = right.transpose(1, 2), left.transpose(1, 2)
        with torch.autocast(x.device.type, enabled=False):
            # float32 cannot count beyond 2^24, as the indices of an embedding may
            projected = reader.project(x.to(right.dtype) if x.is_floating_point() else x, right, size)
        bias = use.modules[0]._parameters.get("bias")

        def on_gradient(grad: Tensor) -> None:
            grad = grad.to(left.dtype)
            with torch.autocast(grad.device.type, enabled=False):
                head = reader.components(projected, grad, left, size)
                total = reader.inner(grad, output, None if bias is None else bias.detach(), size)
            pending[use.name].append((head.double().cpu(), total.double().cpu()))

        return on_gradient

    def flush(size: int, target: int) -> None:
        for name, calls in pending.items():
            collected[name].add(calls, size, target)
            calls.clear()
        if target == 0:
            advance()

    with processes.together("the curves"):
        # other signs than those of the moments that the components come from
        targets = [summed_loss, scattered_loss(seed + 1)]
        backward_passes(model, layers, loss, batches, device, on_forward, flush, targets, processes)
    return {name: found.joined() for name, found in collected.items()}


def predict(
    tails: Tails,
    relative_tail: Tensor,  # (r,)
    processes: Processes = ALONE,
) -> Prediction:
    """First-order change, its standard error and the curvature at the ranks 1 to r, over all processes' samples."""
    mean, square, error = tail_moments(tails, processes)
    return Prediction(mean, error, square / 2, relative_tail[: len(mean)].cpu())


def energy_curve(factors: Factors, max_rank: int) -> Curve:
    """The baseline's curve: the share of the squared norm in the metric that truncation leaves out."""
    tail = factors.relative_tail()[:max_rank].cpu()
    none = torch.zeros_like(tail)
    prediction = Prediction(none, none, tail.square(), tail)
    return Curve(prediction, tail.square(), torch.ones_like(tail, dtype=torch.bool), [], factors.spectrum())


def tail_moments(tails: Tails, processes: Processes = ALONE) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, mean square (of the scattered ones) and error of the mean of every column, over all processes' samples."""
    count = torch.tensor(float(len(tails.loss)), dtype=torch.float64, device="cpu")
    total, square = tails.loss.sum(0), tails.scattered.square().sum(0)
    processes.sum_([count, total])
    mean = total / count
    spread = (tails.loss - mean).square().sum(0)
    processes.sum_([square, spread])
    samples = float(count)
    error = (spread / (samples - 1)).sqrt() / math.sqrt(samples) if samples > 1 else torch.full_like(mean, math.inf)
    return mean, square / samples, error


def _tails(
    heads: Tensor,  # (samples, r)
    totals: Tensor,  # (samples,)
    gains: Tensor | None,  # (r,)
) -> Tensor:
    tails = -(totals[:, None] - heads.cumsum(1))
    return tails if gains is None else tails * gains.to(tails).sqrt()


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device="cpu")  # whatever torch's default device is


def _row_dtype(layer: LayerStatistics) -> torch.dtype:
    weight = layer.candidate.module._parameters["weight"]
    assert weight is not None
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _balanced(factors: Factors) -> Factors:
    left, right = factors.truncated(factors.left.shape[-1])
    return Factors(left, right, factors.singular_values)
