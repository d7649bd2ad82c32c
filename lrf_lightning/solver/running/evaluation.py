"""Run a model over batches and keep loss and score of every sample, so that two models can be compared in pairs.

The user's loss is any callable ``loss(model, batch)``. It returns a :class:`StepOutput`, or just the loss: a vector
with one entry per sample, or a scalar that is the mean over the batch. With a scalar the pairs of the comparison are
batches instead of samples. Means are taken in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrf_lightning.distributed import ALONE, Processes
from lrf_lightning.solver.result import Measurement
from lrf_lightning.solver.running.batch_contents import batch_size, to_device
from lrf_lightning.solver.running.loss_terms import LossTerms
from lrf_lightning.solver.running.state import restored_state

__all__ = [
    "Batches",
    "LossFunction",
    "Outcome",
    "StepOutput",
    "evaluate",
    "evaluation_mode",
    "loss_differences",
    "score_differences",
    "step",
]

Batches = Iterable[Any]


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
        score_weights: as ``weights`` for the scores; None if their pairs are those of the losses.
    """

    losses: Tensor
    weights: Tensor
    scores: Tensor | None = None
    logits: Tensor | None = None
    target: Tensor | None = None
    terms: float = 1.0
    score_weights: Tensor | None = None

    @property
    def weights_of_scores(self) -> Tensor:
        """The number of samples behind every score."""
        return self.weights if self.score_weights is None else self.score_weights

    def measurement(self) -> Measurement:
        """The weighted means."""
        total = self.weights.sum()
        score = None if self.scores is None else float((self.scores * self.weights_of_scores).sum() / total)
        return Measurement(int(total), float((self.losses * self.weights).sum() / total), score)


def loss_differences(outcome: Outcome, other: Outcome) -> tuple[Tensor, Tensor]:
    """Losses minus another model's on the same samples, pair by pair, and the number of samples behind every pair.

    Whether figures are known per sample may depend on the model, as with a metric that happens to be the mean of what
    the samples' losses show. Where two outcomes differ in that, the samples' figures become those of their batches.

    Raises:
        ValueError: if the outcomes are not on the same samples.
    """
    return _differences((outcome.losses, outcome.weights), (other.losses, other.weights))


def score_differences(outcome: Outcome, other: Outcome) -> tuple[Tensor, Tensor] | None:
    """As :func:`loss_differences` for the scores, None if one of the models has none."""
    if outcome.scores is None or other.scores is None:
        return None
    return _differences((outcome.scores, outcome.weights_of_scores), (other.scores, other.weights_of_scores))


def _differences(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    (values, weights), (others, other_weights) = _as_batches(*first, second[1]), _as_batches(*second, first[1])
    if values.shape != others.shape or not torch.equal(weights, other_weights):
        raise ValueError(
            f"the original and the compressed model cannot be compared: one has figures for {len(values)} pairs of "
            f"samples or batches, the other for {len(others)}, or for others; the loader must yield the same samples "
            "in the same order at every iteration"
        )
    return values - others, weights


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


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode; restore its state and every module's own training flag afterwards."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()  # may change attributes on purpose
        with restored_state(model):
            yield
    finally:
        for module, flag in training.items():
            module.training = flag


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
        terms=None if output.terms is None else LossTerms(torch.empty(0, 0, device="cpu"), output.terms.mean_count),
    )


def _join(outputs: list[StepOutput], sizes: list[int]) -> Outcome:
    has_scores = all(output.score is not None for output in outputs)
    losses, weights = _pairs([output.loss for output in outputs], sizes)
    scores, score_weights = None, None
    if has_scores:
        scores, score_weights = _pairs([output.score for output in outputs if output.score is not None], sizes)
    logits = [output.logits for output in outputs if output.logits is not None]
    target = [output.target for output in outputs if output.target is not None]
    # a contrastive loss has as many classes as the batch has samples
    complete = len(logits) == len(target) == len(outputs) and len({rows.shape[1:] for rows in logits}) == 1
    return Outcome(
        losses,
        weights,
        scores,
        torch.cat(logits) if complete else None,
        torch.cat(target) if complete else None,
        max((output.terms.mean_count for output in outputs if output.terms is not None), default=1.0),
        None if score_weights is None or torch.equal(score_weights, weights) else score_weights,
    )


def _as_batches(values: Tensor, weights: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Values of samples as means of batches of some sizes; as they are if they are no samples, or others."""
    if len(values) == len(sizes) or len(values) != int(sizes.sum()) or not bool((weights == 1).all()):
        return values, weights
    return torch.stack([part.mean() for part in torch.split(values, [int(size) for size in sizes])]), sizes


def _pairs(values: list[Tensor], sizes: list[int]) -> tuple[Tensor, Tensor]:
    """The values of all samples, or of all batches if some have only one for all of theirs, and their weights."""
    # the mean over one sample is that sample's figure
    if all(value.dim() == 1 or size == 1 for value, size in zip(values, sizes, strict=True)):
        return torch.cat([value.reshape(-1) for value in values]), _on_cpu([1] * sum(sizes))
    return torch.stack([value.mean() for value in values]), _on_cpu(sizes)


def _on_cpu(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")  # whatever torch's default device is
