"""Running statistics of batch norms, estimated anew for a compressed model.

What a layer puts out after truncation has another mean and variance than before, and running statistics that were
gathered under augmentation do not quite fit plain data either. One pass over the calibration data measures them. It
needs no labels, but it does not always help: whether it does is decided on the selection split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lrf_lightning.copies.model_copy import copied_model
from lrf_lightning.distributed import ALONE, Processes
from lrf_lightning.solver.running.batch_contents import batch_size, to_device
from lrf_lightning.solver.running.evaluation import Batches, LossFunction, evaluation_mode
from lrf_lightning.solver.running.hooks import first_tensor

__all__ = ["renormalized"]


def renormalized(
    model: nn.Module,
    loss: LossFunction,
    batches: Batches,
    device: torch.device,
    processes: Processes = ALONE,
    shared: Mapping[int, Any] | None = None,
) -> nn.Module | None:
    """A copy of ``model`` with the statistics of the calibration data, None if it has no batch norm that keeps any.

    Every norm sees inputs that the norms before it have normalised by the statistics of their batch, as in training;
    mean and variance are those of all values of all processes. Batches of a single sample are passed over.

    Args:
        model: any model, on ``device``.
        loss: the user's loss; only its forward pass is used.
        batches: this process's calibration data.
        device: where batches are moved to.
        processes: who else works on other batches.
        shared: what the copy shares, see :func:`~lrf_lightning.copies.model_copy.shareable`.
    """
    copied = copied_model(model, shared)
    norms = {name: module for name, module in copied.named_modules() if _keeps_statistics(module)}
    if not norms:
        return None
    sums = {name: _Sums(norm) for name, norm in norms.items()}
    with (
        processes.together("the statistics of batch norms"),
        evaluation_mode(copied),
        _observed(norms, sums),
        torch.no_grad(),
    ):
        for norm in norms.values():
            norm.train()
        for batch in batches:
            if batch_size(batch) > 1:
                loss(copied, to_device(batch, device))
    for seen in sums.values():
        processes.sum_([seen.count, seen.total, seen.square])
        seen.write()
    return copied


def _keeps_statistics(module: nn.Module) -> bool:
    # synchronised norms exchange statistics in every training pass, in which processes do not keep step here
    synchronised = isinstance(module, nn.SyncBatchNorm)
    return isinstance(module, _BatchNorm) and not synchronised and module.running_mean is not None


class _Sums:
    """Sums over the rows of a norm's inputs, in float64, less the old running mean so that squares do not cancel."""

    def __init__(self, norm: Any) -> None:
        self.norm, self.old = norm, [buffer.detach().clone() for buffer in (norm.running_mean, norm.running_var)]
        self.shift = self.old[0].double()
        self.count = torch.zeros((), dtype=torch.float64, device=self.shift.device)
        self.total, self.square = torch.zeros_like(self.shift), torch.zeros_like(self.shift)
        self.batches = None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone()

    def add(self, x: Tensor) -> None:
        """Add an input of shape (batch, features, ...)."""
        rows = x.detach().double().movedim(1, -1).flatten(0, -2) - self.shift
        self.count += len(rows)
        self.total += rows.sum(0)
        self.square += rows.square().sum(0)

    def write(self) -> None:
        """Give the norm the mean and unbiased variance of at least two finite rows; else the old ones back."""
        rows = float(self.count)
        mean = self.total / max(rows, 1.0)
        variance = (self.square / max(rows, 1.0) - mean.square()).clamp_min(0) * rows / max(rows - 1, 1.0)
        known = rows > 1 and bool(torch.isfinite(variance).all())
        self.norm.running_mean.copy_(mean + self.shift if known else self.old[0])
        self.norm.running_var.copy_(variance if known else self.old[1])
        if self.batches is not None:
            self.norm.num_batches_tracked.copy_(self.batches)


@contextmanager
def _observed(norms: dict[str, Any], sums: dict[str, _Sums]) -> Iterator[None]:
    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def observe(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            sums[name].add(first_tensor(name, args, kwargs))

        return observe

    handles = [norm.register_forward_pre_hook(hook(name), with_kwargs=True) for name, norm in norms.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
