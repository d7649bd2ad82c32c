"""Forward and backward passes over the calibration data with every layer's inputs and output gradients observed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrf_lightning.distributed import ALONE, Processes
from lrf_lightning.solver.layers.layer_statistics import LayerStatistics
from lrf_lightning.solver.layers.rows import RowReader
from lrf_lightning.solver.running.batch_contents import batch_size, to_device
from lrf_lightning.solver.running.evaluation import Batches, LossFunction, StepOutput, evaluation_mode, step
from lrf_lightning.solver.running.hooks import HeldGradients, frozen_parameters, observe_gradients
from lrf_lightning.solver.running.own_attributes import Attributes, OwnAttributes

__all__ = ["Use", "backward_passes", "scattered_loss", "summed_loss"]


@dataclass(frozen=True)
class Use:
    """Modules that share a layer's weight and read it in the same way.

    Attributes:
        name: name of the layer.
        transposed: whether they read it transposed.
        modules: the modules, in the model that is run; the bias of the first stands for all.
        reader: how their rows are read.
    """

    name: str
    transposed: bool
    modules: tuple[nn.Module, ...]
    reader: RowReader


# of losses in float16, powers of two; a sample's own loss is meant, whose gradients are larger than those of a mean
SCALES = (2.0**14, 2.0**7, 1.0)

# what a backward pass starts from, for the output of a step, the size of its batch and its index among all batches
BackwardTarget = Callable[[StepOutput, int, int], Tensor]


def _uses(model: nn.Module, layer: LayerStatistics) -> Iterator[Use]:
    candidate = layer.candidate
    names = (candidate.name, *candidate.twins)
    modules = dict(zip(names, candidate.modules_in(model), strict=True))
    own = tuple(module for name, module in modules.items() if name not in candidate.transposed)
    yield Use(candidate.name, False, own, layer.reader)
    if layer.tied is not None:
        yield Use(candidate.name, True, tuple(modules[name] for name in candidate.transposed), layer.tied.reader)


def backward_passes(
    model: nn.Module,
    layers: Mapping[str, LayerStatistics],
    loss: LossFunction,
    batches: Batches,
    device: torch.device,
    on_forward: Callable[[Use, Tensor, Tensor, int, int], Callable[[Tensor], None] | None],
    after_backward: Callable[[int, int], None],
    targets: Sequence[BackwardTarget],
    processes: Processes = ALONE,
) -> int:
    """Run forward and backward over this process's batches and return the number of their samples.

    ``on_forward`` also gets the batch's size and its index among all batches. Every target has a pass of its own, those
    after the first one only for batches whose loss has terms. Then ``after_backward`` is called with the size and the
    index of the target.
    """
    samples = 0
    uses = {(use.name, use.transposed): use for layer in layers.values() for use in _uses(model, layer)}
    modules = {key: use.modules for key, use in uses.items()}
    # what a step keeps on a module belongs to a graph here: it would stay in memory, and could not be copied
    own = OwnAttributes(Attributes(model))
    with evaluation_mode(model), own, frozen_parameters([model]):
        for position, batch in enumerate(batches):
            size, index = batch_size(batch), processes.index(position)
            samples += size

            def observe(key: tuple[str, bool], x: Tensor, y: Tensor, size: int = size, index: int = index) -> Any:
                return on_forward(uses[key], x, y, size, index)

            for i, target in enumerate(targets):
                # a forward pass again: not every kind of module bears going back twice, compiled ones do not
                with observe_gradients(modules, observe) as held:
                    has_terms = _backward(model, loss, to_device(batch, device), size, index, target, held)
                after_backward(size, i)
                if not has_terms:
                    break
    return samples


def _backward(
    model: nn.Module, loss: LossFunction, batch: Any, size: int, index: int, target: BackwardTarget, held: HeldGradients
) -> bool:
    """One forward and backward pass from a target, of which nothing is kept; whether the loss has terms."""
    output = step(model, loss, batch, size)
    total = summed_loss(output, size, index).detach()
    if not torch.isfinite(total):
        raise ValueError(
            f"the loss of calibration batch {index} is {float(total / size)}; it must be finite. "
            "Check the batch and the weights for NaN"
        )
    start = target(output, size, index)
    if start.requires_grad:
        _go_back(start, held)
    return output.terms is not None


def _go_back(start: Tensor, held: HeldGradients) -> None:
    """The backward pass, with a scale where gradients are in float16: the largest one at which none overflows."""
    if not held.half:
        start.backward()  # type: ignore[no-untyped-call]
        return
    for scale in SCALES:
        held.calls.clear()
        start.backward(torch.full_like(start, scale), retain_graph=scale != SCALES[-1])  # type: ignore[no-untyped-call]
        if all(bool(torch.isfinite(grad).all()) for _, grad in held.calls):
            break
    for on_gradient, grad in held.calls:
        on_gradient(grad.float() / scale)
    held.calls.clear()


def summed_loss(output: StepOutput, size: int, index: int) -> Tensor:
    """The sum of the per-sample losses; a scalar loss is taken for the mean over its batch."""
    return output.loss.sum() if output.loss.dim() == 1 else output.loss * size


def scattered_loss(seed: int) -> BackwardTarget:
    """What second moments of gradients start from: the terms with random signs, or :func:`summed_loss` without terms.

    See :meth:`~lrf_lightning.solver.running.loss_terms.LossTerms.scattered`. The signs depend on the index of the
    batch, not on the process that has it.
    """

    def total(output: StepOutput, size: int, index: int) -> Tensor:
        if output.terms is None:
            return summed_loss(output, size, index)
        generator = torch.Generator("cpu").manual_seed(hash((seed, index)) % 2**63)
        return output.terms.scattered(generator).sum()

    return total
