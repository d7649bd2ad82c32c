"""Run a model over batches and keep loss and score of every sample, so that two models can be compared in pairs.

The user's loss is any callable ``loss(model, batch)``. It returns a :class:`StepOutput`, or just the loss: a vector
with one entry per sample, or a scalar that is the mean over the batch. With a scalar the pairs of the comparison are
batches instead of samples. Means are taken in float64.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from lrf_lightning.distributed import ALONE, Processes
from lrf_lightning.solver.buffers import restored_buffers
from lrf_lightning.solver.loss_terms import LossTerms
from lrf_lightning.solver.result import Measurement

__all__ = [
    "Batches",
    "LossFunction",
    "Outcome",
    "StepOutput",
    "batch_size",
    "evaluate",
    "evaluation_mode",
    "own_copy",
    "step",
    "tensors",
    "to_device",
]

logger = logging.getLogger(__name__)

Batches = Iterable[Any]

SIZES = ("num_graphs", "batch_size")  # names under which a user's object may say how many samples it holds


@dataclass(frozen=True)
class StepOutput:
    """What one step of the user's model says about one batch.

    Attributes:
        loss: shape (batch,) per sample, or () as the mean over the batch.
        score: shape (batch,) or (), larger is better (accuracy: 1.0 or 0.0 per sample); None if there is none.
        logits: shape (rows, classes), None unless the loss is a cross-entropy; for the temperature-scaled loss.
        target: class indices, shape (rows,), that belong to ``logits``.
        terms: what the samples' losses are the sums of; None if every sample is one term, or if they are not known.
            Predictions for losses over tokens or pixels depend on them.
    """

    loss: Tensor
    score: Tensor | None = None
    logits: Tensor | None = None
    target: Tensor | None = None
    terms: LossTerms | None = None


LossFunction = Callable[[nn.Module, Any], "Tensor | StepOutput"]


@dataclass(frozen=True)
class Outcome:
    """Loss and score of one model on one split, pair by pair, on the CPU in float64.

    Attributes:
        losses: shape (pairs,).
        weights: shape (pairs,), the number of samples behind each pair, 1 for per-sample losses.
        scores: shape (pairs,), None if no score is known.
        logits: shape (rows, classes), None unless every batch gave them.
        target: shape (rows,).
        terms: number of terms per sample, 1 if they are not known.
    """

    losses: Tensor
    weights: Tensor
    scores: Tensor | None = None
    logits: Tensor | None = None
    target: Tensor | None = None
    terms: float = 1.0

    def measurement(self) -> Measurement:
        """The weighted means."""
        total = self.weights.sum()
        score = None if self.scores is None else float((self.scores * self.weights).sum() / total)
        return Measurement(int(total), float((self.losses * self.weights).sum() / total), score)


def evaluate(
    model: nn.Module,
    loss: LossFunction,
    batches: Batches,
    device: torch.device,
    *,
    split: str = "the data",
    keep_logits: bool = False,
    processes: Processes = ALONE,
) -> Outcome:
    """Loss and score of ``model`` on every sample, in evaluation mode and without gradients.

    Args:
        model: the model, already on ``device``.
        loss: see :data:`LossFunction`.
        batches: iterable of batches that can be run through several times.
        device: where the batches are moved to.
        split: name of the split for error messages.
        keep_logits: whether logits are kept, for the temperature-scaled loss.
        processes: who else evaluates other batches; the outcome covers those of all.

    Raises:
        ValueError: if there is no batch, or a loss is neither a scalar nor a vector with one entry per sample.
    """
    outputs: list[StepOutput] = []
    sizes: list[int] = []
    with processes.together(f"the evaluation on {split}"), evaluation_mode(model), torch.no_grad():
        for batch in batches:
            size = batch_size(batch)
            output = step(model, loss, to_device(batch, device), size)
            sizes.append(size)
            outputs.append(_to_cpu(output, keep_logits))
    outputs, sizes = processes.interleaved(outputs), processes.interleaved(sizes)
    if not outputs:
        raise ValueError(f"{split} holds no batch; give a loader that yields at least one and can be iterated again")
    return _join(outputs, sizes)


def step(model: nn.Module, loss: LossFunction, batch: Any, size: int) -> StepOutput:
    """Call the user's loss on one batch and check what it returns.

    Raises:
        ValueError: if the loss is neither a scalar nor a vector with one entry per sample.
    """
    output = loss(model, batch)
    if isinstance(output, Tensor):
        output = StepOutput(output)
    if not isinstance(output, StepOutput) or not isinstance(output.loss, Tensor):
        raise ValueError(
            f"loss returned {type(output).__name__}; return a Tensor of shape () or ({size},), or a StepOutput"
        )
    for name, value in (("loss", output.loss), ("score", output.score)):
        if value is not None and tuple(value.shape) not in {(), (size,)}:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} for a batch of {size} samples; "
                f"allowed are () (the mean over the batch) and ({size},) (one entry per sample)"
            )
    if output.terms is not None:
        output.terms.check(output.loss, size)
    return output


def batch_size(batch: Any) -> int:
    """Number of samples in a batch.

    A batch, or a part of it, may say it itself, as those of PyTorch Geometric do (``num_graphs``, ``batch_size``).
    Where it consists of lists with an entry for every sample, as those of torchvision's detectors do, it is their
    length. Otherwise it is the first dimension of the first tensor found in the batch.

    Raises:
        ValueError: if it is none of these, since the batch holds no tensor with at least one dimension.
    """
    size = _said_size(batch) or _listed_samples(batch) or next(_sizes(batch), None)
    if size is None and callable(getattr(batch, "to_dict", None)):  # a single graph does not say that it is one of many
        try:
            size = next(_sizes(batch.to_dict()), None)
        except Exception:  # the user's types
            logger.debug("%s.to_dict() failed", type(batch).__name__, exc_info=True)
    if size is None:
        raise ValueError(
            f"a batch of type {type(batch).__name__} holds no tensor with a batch dimension, "
            "so its samples cannot be counted; let the loader yield tensors whose first dimension is the batch, "
            "or an object with a number batch_size"
        )
    return size


def _said_size(part: Any) -> int | None:
    """What an object of the user's says about the number of its samples, None if it says nothing."""
    if isinstance(part, Tensor):
        return None
    for name in SIZES:
        try:
            size = getattr(part, name, None)
        except Exception:  # the user's property
            continue
        if isinstance(size, Tensor) and size.dim() == 0 and not size.is_floating_point():
            size = int(size)
        if isinstance(size, Integral) and not isinstance(size, bool) and int(size) > 0:
            return int(size)
    return None


def _sizes(batch: Any) -> Iterator[int]:
    """What the parts of a nested batch tell about the number of samples, in their order."""
    size = _said_size(batch)
    if size is not None:
        yield size
    elif isinstance(batch, Tensor):
        if batch.dim() > 0:
            yield int(batch.shape[0])
    else:
        for part in _members(batch):
            yield from _sizes(part)


def _listed_samples(batch: Any) -> int | None:
    """The common length of at least two lists that a batch consists of, None if they are not about samples.

    They are if each holds tensors of one rank, or dictionaries, or other values, and if either there are such others or
    tensors of a list differ in their first dimension. Lists of inputs that all have a row for every sample do not.
    """
    lists = list(batch.values()) if isinstance(batch, Mapping) else batch
    if not isinstance(lists, (list, tuple)) or len(lists) < 2 or not all(isinstance(x, (list, tuple)) for x in lists):
        return None
    if len({len(x) for x in lists}) > 1 or not lists[0]:
        return None
    told = False
    for entries in lists:
        shapes = {item.shape for item in entries if isinstance(item, Tensor)}
        if not shapes:
            told = told or not any(isinstance(item, (list, tuple)) for item in entries)
        elif all(isinstance(item, Tensor) for item in entries) and len({len(shape) for shape in shapes}) == 1:
            told = told or len({shape[:1] for shape in shapes}) > 1
        else:
            return None
    return len(lists[0]) if told else None


def to_device(batch: Any, device: torch.device) -> Any:
    """A copy of a nested batch on a device, which a step may change without harm to those that get the batch later.

    Containers and tensors are copied also where they are on the device already: a list of batches is run through dozens
    of times, and the passes of several models share a batch. Beside the pass itself a copy costs next to nothing.
    Values of other types pass unchanged, except that what has a method ``to`` is copied and moved by it.
    """
    return _moved(batch, device, {})


def own_copy(batch: Any) -> Any:
    """A deep copy for somebody who may change it; the batch itself if it cannot be copied."""
    try:
        return copy.deepcopy(batch)
    except Exception:  # the user's types; tensors inside a graph
        return batch


def _moved(batch: Any, device: torch.device, known: dict[int, Tensor]) -> Any:
    """Like :func:`to_device`; a tensor that is ``known`` by its id stays one tensor, such as an input as target."""
    if isinstance(batch, Tensor):
        if id(batch) not in known:
            own = batch.detach().to(device, copy=True)
            known[id(batch)] = own.requires_grad_() if batch.requires_grad else own
        return known[id(batch)]
    if isinstance(batch, (dict, UserDict)):
        return _filled(batch, {key: _moved(value, device, known) for key, value in batch.items()})
    if hasattr(batch, "to") and not isinstance(batch, nn.Module):
        return own_copy(batch).to(device)
    if isinstance(batch, Mapping):
        return _filled(batch, {key: _moved(value, device, known) for key, value in batch.items()})
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_moved(value, device, known) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(_moved(value, device, known) for value in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        moved = copy.copy(batch)
        for item in dataclasses.fields(batch):
            # the way around __init__ and frozen
            object.__setattr__(moved, item.name, _moved(getattr(batch, item.name), device, known))
        return moved
    return own_copy(batch)


def _filled(mapping: Any, values: dict[Any, Any]) -> Any:
    """A copy of a mapping with other values; a plain dictionary if its type allows neither that nor making one."""
    try:
        filled = copy.copy(mapping)
        for key, value in values.items():
            filled[key] = value
        return filled
    except Exception:  # the user's types
        logger.debug("A %s cannot be copied", type(mapping).__name__, exc_info=True)
    try:
        return type(mapping)(values)
    except Exception:
        return values


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode and restore every module's own training flag and its buffers afterwards."""
    training = {module: module.training for module in model.modules()}
    try:
        with restored_buffers(model):
            model.eval()
            yield
    finally:
        for module, flag in training.items():
            module.training = flag


def tensors(batch: Any) -> Iterator[Tensor]:
    """All tensors of a nested batch, in the order in which they stand there; the user's own objects are not opened."""
    if isinstance(batch, Tensor):
        yield batch
    else:
        for part in _members(batch):
            yield from tensors(part)


def _members(batch: Any) -> Iterator[Any]:
    """What a container holds, nothing for other values."""
    if isinstance(batch, Mapping):
        yield from batch.values()
    elif isinstance(batch, (list, tuple)):
        yield from batch
    elif dataclasses.is_dataclass(batch):
        for item in dataclasses.fields(batch):
            yield getattr(batch, item.name)


def _to_cpu(output: StepOutput, keep_logits: bool) -> StepOutput:
    def double(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to("cpu", torch.float64)

    keep = keep_logits and output.logits is not None and output.target is not None
    return StepOutput(
        loss=output.loss.detach().to("cpu", torch.float64),
        score=double(output.score),
        logits=output.logits.detach().to("cpu", torch.float32) if keep and output.logits is not None else None,
        target=output.target.detach().to("cpu") if keep and output.target is not None else None,
        # how many, but not what they are
        terms=None if output.terms is None else LossTerms(torch.empty(0, 0), output.terms.mean_count),
    )


def _join(outputs: list[StepOutput], sizes: list[int]) -> Outcome:
    has_scores = all(output.score is not None for output in outputs)
    losses = [output.loss for output in outputs]
    scores = [output.score for output in outputs if output.score is not None] if has_scores else []
    # the mean over one sample is that sample's figure
    per_sample = all(values.dim() == 1 or size == 1 for values, size in zip(losses + scores, sizes * 2, strict=False))
    if per_sample:
        join, weights = _concatenated, torch.ones(sum(sizes), dtype=torch.float64)
    else:
        join, weights = _means, torch.tensor(sizes, dtype=torch.float64)
    logits = [output.logits for output in outputs if output.logits is not None]
    target = [output.target for output in outputs if output.target is not None]
    # a contrastive loss has as many classes as the batch has samples
    complete = len(logits) == len(target) == len(outputs) and len({rows.shape[1:] for rows in logits}) == 1
    return Outcome(
        join(losses),
        weights,
        join(scores) if has_scores else None,
        torch.cat(logits) if complete else None,
        torch.cat(target) if complete else None,
        max((output.terms.mean_count for output in outputs if output.terms is not None), default=1.0),
    )


def _concatenated(values: list[Tensor]) -> Tensor:
    return torch.cat([value.reshape(-1) for value in values])


def _means(values: list[Tensor]) -> Tensor:
    return torch.stack([value.mean() for value in values])
