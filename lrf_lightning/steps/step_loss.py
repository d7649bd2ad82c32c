"""The loss of a LightningModule, taken from its own steps.

The solver needs ``loss(model, batch)``. :class:`StepLoss` calls the module's ``validation_step``, which has no
augmentation, or its ``training_step``, and takes the loss from where :mod:`lrf_lightning.steps.loss_source` finds it on
the first batch; processes that solve together take what the first of them finds.

Where the loss is the mean of one watched loss function, or a weighted sum of several (see
:mod:`lrf_lightning.steps.loss_explanation`), the loss is given per sample, with the accuracy as score where one of them
shows it and the logits of a classifier. Otherwise it stays one number per batch. Compiled
submodules may be called by a step; a step that is compiled as a whole hides its calls and gives the number per batch.

The score can also be a value that the module logs, by name. A logged metric object is reset before every batch and
computed after it. Where the accuracy seen in the loss has the same value, it stands in, because it is per sample.

Nothing reaches the trainer and nothing stays in the module, see :mod:`lrf_lightning.steps.step_record`. Nothing here
moves batches or sets the training mode: the solver and :mod:`lrf_lightning.data.loaders` do.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lrf_lightning.distributed import Processes
from lrf_lightning.random_state import preserved
from lrf_lightning.solver.running.batch_contents import batch_size, own_copy, tensors
from lrf_lightning.solver.running.evaluation import StepOutput, evaluation_mode
from lrf_lightning.solver.running.state import restored_state
from lrf_lightning.steps.loss_calls import LossCall
from lrf_lightning.steps.loss_explanation import explanation
from lrf_lightning.steps.loss_source import LossSource, can_be_run, combination_in, find_source, required_loss
from lrf_lightning.steps.step_record import StepRecord, run_step

__all__ = ["Score", "StepLoss"]

logger = logging.getLogger(__name__)

Score = Callable[[nn.Module, Any], Tensor]


class StepLoss:
    """Callable ``(module, batch) -> StepOutput`` made of a LightningModule's own steps.

    Args:
        trainer: lent to the module while a step runs, together with its precision; None for a module without one.
        score: name of a logged value, larger is better; a callable ``(module, batch) -> Tensor`` of shape (batch,) or
            (); None for the accuracy, where the loss shows it.
        loss: a callable ``(module, batch) -> Tensor | StepOutput`` that replaces the module's steps.
    """

    def __init__(
        self,
        trainer: Trainer | None = None,
        *,
        score: str | Score | None = None,
        loss: Callable[[nn.Module, Any], Tensor | StepOutput] | None = None,
    ) -> None:
        self.trainer, self.score, self.loss = trainer, score, loss
        self._source: LossSource | None = None
        self._told = False

    @property
    def score_name(self) -> str:
        """What the score is called, empty if that is not known."""
        if isinstance(self.score, str):
            return self.score
        if self.score is not None:
            name = getattr(self.score, "__name__", type(self.score).__name__)
            return "" if name == "<lambda>" else str(name)
        return "" if self.loss is not None else "accuracy"  # the only score that is found in a loss

    def agree(self, module: nn.Module, batches: Iterable[Any], processes: Processes) -> None:
        """Let all processes take the loss from where the first one finds it, on the first of all batches.

        A step that fails on one process only would otherwise make that process alone take another one.

        Raises:
            PeerError: if the first process finds no loss.
            ValueError: on the first process, see :meth:`__call__`.
        """
        if processes.size == 1 or self.loss is not None:
            return
        with processes.together("looking for the loss"):
            batch = next(iter(batches), None) if processes.rank == 0 else None
            if batch is not None:
                with evaluation_mode(module):
                    self(module, batch)
        self._source = processes.of_first(self._source)

    def __call__(self, module: nn.Module, batch: Any) -> StepOutput:
        """Loss and score of one batch, which must be on the module's device.

        Raises:
            TypeError: if the module is no LightningModule.
            ValueError: if no step gives a loss, or the score's name is not logged.
        """
        if not isinstance(module, LightningModule):
            raise TypeError(f"module is a {type(module).__name__}; StepLoss takes a LightningModule, or pass loss=")
        with self._attached(module):
            if self.loss is not None:
                output = self.loss(module, batch)
                output = StepOutput(output) if isinstance(output, Tensor) else output
                return output if self.score is None else _with_score(output, self._extra_score(module, batch, None))
            kept = batch if self.score is None else own_copy(batch)  # a step may change its batch
            if self._source is None:
                # the first model shall see no other noise and no other state than those that come later
                with preserved(), restored_state(module):
                    self._source = find_source(module, batch)
                logger.info("The loss is taken from %s (%s).", self._source.step, self._source.place)
            size, given = batch_size(batch), list(tensors(batch))  # first, since a step may take its batch to pieces
            self._source = self._source.with_layouts(module, batch, size)
            record = self._record(module, self._source.step, batch, traced=self._source.combined)
            self._compare_sizes(record, size)
            output = _output(record, self._source, size, given)
            return output if self.score is None else _with_score(output, self._extra_score(module, kept, record))

    def _compare_sizes(self, record: StepRecord, size: int) -> None:
        """Warn once if the step logs with another number of samples than was counted."""
        if record.batch_size is not None and record.batch_size != size and not self._told:
            self._told = True
            rank_zero_warn(
                f"a batch was counted as {size} samples, mostly by the first dimension of its first tensor, but its "
                f"step logs with batch_size={record.batch_size}: intervals and numbers of samples will be wrong. Put a "
                "tensor first that has a row for every sample, or yield an object with the number as batch_size"
            )

    def _record(self, module: LightningModule, step: str, batch: Any, *, traced: bool = False) -> StepRecord:
        name = self.score if isinstance(self.score, str) else None
        compute = None if name is None else partial(_logged_name, name)
        return run_step(module, step, batch, compute=compute, traced=traced)

    def _extra_score(self, module: LightningModule, batch: Any, record: StepRecord | None) -> Tensor:
        """The score that was asked for; a named one may have to be fetched from the other step."""
        assert self.score is not None
        with torch.no_grad():
            if not isinstance(self.score, str):
                return self.score(module, batch)
            names: set[str] = set()
            for step in ("validation_step", "training_step"):
                if record is None or self._source is None or self._source.step != step:
                    if not can_be_run(module, step):
                        continue
                    found = self._record(module, step, batch)
                else:
                    found = record
                name = _logged_name(self.score, found.logged)
                if name is not None:
                    return _scalar(self.score, found.logged[name])
                names |= set(found.logged)
        raise ValueError(
            f"score={self.score!r} is not logged by a step of {type(module).__name__}; "
            f"logged are {sorted(names) or 'no values'}. Use one of them, or pass a callable score(module, batch)"
        )

    @contextmanager
    def _attached(self, module: LightningModule) -> Iterator[None]:
        """Lend the trainer to a copied module, and run at the trainer's precision."""
        if self.trainer is None:
            yield
            return
        before = module._trainer
        module.trainer = self.trainer
        precision: AbstractContextManager[Any] = self.trainer.precision_plugin.val_step_context()
        try:
            with precision:
                yield
        finally:
            module.trainer = before


def _output(record: StepRecord, source: LossSource, size: int, given: list[Tensor]) -> StepOutput:
    """The loss per sample where watched calls explain it, else as it is; accuracy and logits where they are known."""
    found_loss = required_loss(record, source)
    loss = found_loss.reshape(()) if found_loss.numel() == 1 else found_loss
    finite = bool(torch.isfinite(loss).all())
    calls = source.arranged(record.calls, size, given)
    found = explanation(calls, loss, size) if loss.dim() == 0 else None
    if found is not None:
        logits = found.call.logits(size)
        target = None if logits is None else found.call.target
        terms = found.terms(size) if finite else None
        return StepOutput(found.losses, found.call.correct(size), logits, target, terms)
    summed = combination_in(record, calls, found_loss, size) if source.combined else None
    if summed is None:
        return StepOutput(loss, _only_accuracy(calls, size))
    score = _only_accuracy(summed.calls, size)
    score = _only_accuracy(calls, size) if score is None else score
    return StepOutput(summed.losses, score, terms=summed.terms if finite else None)


def _only_accuracy(calls: Iterable[LossCall], size: int) -> Tensor | None:
    """That of the one classification among the calls."""
    scores = []
    for call in calls:
        with suppress(Exception):  # what was called in a function transform cannot be looked at
            scores.append(call.correct(size))
    known = [score for score in scores if score is not None]
    return known[0] if len(known) == 1 else None


def _with_score(output: StepOutput, score: Tensor) -> StepOutput:
    """Replace the score, unless the one that is there has the same mean and says more."""
    known = output.score
    if known is not None and known.dim() == 1 and score.dim() == 0 and abs(float(known.mean()) - float(score)) < 1e-6:
        return output
    return replace(output, score=score)


def _logged_name(score: str, logged: Mapping[str, Any]) -> str | None:
    """The name as the step knows it: Lightning adds ``_step``, ``_epoch`` and ``/dataloader_idx_0`` by itself."""
    short = re.sub(r"/dataloader_idx_\d+$", "", score)
    return next((name for name in (score, short, re.sub(r"_(step|epoch)$", "", short)) if name in logged), None)


def _scalar(name: str, value: Any) -> Tensor:
    tensor = value.detach() if isinstance(value, Tensor) else torch.as_tensor(value)
    if tensor.numel() != 1:
        raise ValueError(f"score={name!r} is logged with shape {tuple(tensor.shape)}; it must be a single number")
    return tensor.reshape(()).to(torch.float64)
