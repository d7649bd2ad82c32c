"""Per-sample losses, accuracies and logits from the loss functions that a step calls.

A Lightning step returns one number for a batch. While it runs, :class:`LossCalls` watches calls of ``cross_entropy``,
``nll_loss``, ``binary_cross_entropy_with_logits`` and ``mse_loss`` in ``torch.nn.functional``, which the modules of
``torch.nn`` end in as well. The same call without reduction then gives one loss per row, and rows belong to samples::

    (batch,)            one row per sample
    (batch, d1, ...)    mean over a sample's rows
    (batch * t,)        flattened tokens, mean over a sample's t rows
    (t * batch,)        the same time-major, where the batch shows that the targets lie like that

Where some targets are ignored (padding, the last token of a text), the batch's mean is taken over the others, so a
sample counts by its number of them: its loss is the sum over its rows, divided by the mean number per sample.

Whether these are the loss is found by comparison: :func:`explanation` compares their mean with what the step returned,
which fails, as it should, for class weights and losses that are a sum of several ones.

:class:`ExplainedLoss` finds the terms of a user's own ``loss(model, batch)`` in the same way.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lrf_lightning.solver.batch_contents import batch_size, tensors
from lrf_lightning.solver.evaluation import LossFunction, StepOutput
from lrf_lightning.solver.loss_terms import LossTerms

__all__ = ["ExplainedLoss", "LossCall", "LossCalls", "explanation"]

WATCHED: frozenset[Callable[..., Any]] = frozenset(
    {functional.cross_entropy, functional.nll_loss, functional.binary_cross_entropy_with_logits, functional.mse_loss}
)
CLASSIFIERS: frozenset[Callable[..., Any]] = frozenset({functional.cross_entropy, functional.nll_loss})
MOST_CALLS = 4
REDUCTION = frozenset({"reduction", "reduce", "size_average"})


@dataclass(frozen=True)
class LossCall:
    """One call of a watched loss function.

    Attributes:
        function: the function of ``torch.nn.functional``.
        input: its first argument, logits or predictions.
        target: its second argument.
        options: the other arguments by name, those on reduction left out.
        result: what it returned.
        steps: length t of sequences whose rows are time-major; 0 if the rows of a sample lie together.
    """

    function: Callable[..., Tensor]
    input: Tensor
    target: Tensor
    options: Mapping[str, Any]
    result: Tensor
    steps: int = 0

    def arranged(self, size: int, given: Iterable[Tensor]) -> LossCall:
        """The call, with ``steps`` set if its targets are those of the batch, but time-major.

        Args:
            size: samples in the batch.
            given: the batch's tensors; targets may lack the first or the last step of one of them.
        """
        try:
            steps = next(filter(None, (self._steps_as_in(whole, size) for whole in given)), 0)
        except Exception:  # tensors of other kinds, and what was called in a function transform
            return self
        return replace(self, steps=steps) if steps > 0 else self

    def _steps_as_in(self, whole: Tensor, size: int) -> int:
        """The length of sequences if the targets are those of a tensor, but time-major; -1 if they lie as there do."""
        target, valid = self.target.reshape(-1), self._valid
        if whole.layout is not torch.strided or whole.dim() < 2 or len(whole) != size or whole.device != target.device:
            return 0
        for skipped, part in ((0, whole), (1, whole[:, 1:]), (1, whole[:, :-1])):
            steps = whole.shape[1] - skipped
            if steps < 2 or part.numel() != target.numel():
                continue
            for flat, answer in ((part.reshape(-1), -1), (part.transpose(0, 1).reshape(-1), steps)):
                same = flat == target if valid is None else (flat == target) | ~valid.reshape(-1)
                if bool(same.all()):
                    return answer
        return 0

    def per_sample(self, size: int) -> Tensor | None:
        """Loss of every sample, shape (size,), differentiable, in float32 or wider; None if rows fit no sample."""
        return self._by_sample(self._rows, size)

    def terms(self, size: int) -> LossTerms | None:
        """What the rows of every sample add to its loss; None if there is one row per sample, or rows fit no sample."""
        rows, valid = _rows_by_sample(self._rows, size, self.steps), self._valid
        if rows is None or rows.shape[1] == 1:
            return None
        return LossTerms.of(rows, None if valid is None else _rows_by_sample(valid, size, self.steps))

    def correct(self, size: int) -> Tensor | None:
        """Share of rows whose largest logit is the target's.

        Returns:
            Shape (size,) per sample, of which the mean is the share in the batch; () over all rows if they fit no
            sample; None if the loss is no classification with class indices, or all targets are ignored.
        """
        if not self._has_classes:
            return None
        hits = (self.input.detach().argmax(1) == self.target).to(torch.float32)
        valid = self._valid
        if valid is not None and not bool(valid.any()):
            return None
        per_sample = self._by_sample(hits if valid is None else hits * valid, size)
        if per_sample is not None:
            return per_sample
        return hits.mean() if valid is None else hits[valid].mean()

    def logits(self, size: int) -> Tensor | None:
        """Logits of shape (size, classes) if the loss is a plain cross-entropy with one row per sample, else None.

        Rows of tokens and pixels are left out: a vocabulary's logits for a whole split would not fit into memory.
        """
        plain = self.options.get("weight") is None and not self.options.get("label_smoothing")
        if not (self._has_classes and plain and self.input.dim() == 2 and self.target.shape == (size,)):
            return None
        return self.input.detach() if self._valid is None else None

    @cached_property
    def _rows(self) -> Tensor:
        """The loss without reduction."""
        options = {name: _widened(value) for name, value in self.options.items()}
        return self.function(_widened(self.input), _widened(self.target), **options, reduction="none")

    @property
    def _has_classes(self) -> bool:
        return self.function in CLASSIFIERS and not self.target.is_floating_point() and self.input.dim() >= 2

    @property
    def _valid(self) -> Tensor | None:
        """Which targets are not ignored, None if none is."""
        if not self._has_classes:
            return None
        valid = self.target != self.options.get("ignore_index", -100)
        return None if bool(valid.all()) else valid

    def _by_sample(self, rows: Tensor, size: int) -> Tensor | None:
        """Values of rows, zero at ignored ones, as values of shape (size,) whose mean is that over the valid rows."""
        valid, by_sample = self._valid, _rows_by_sample(rows, size, self.steps)
        if by_sample is None:
            return None
        means = by_sample.mean(1)
        return means if valid is None else means * (valid.numel() / valid.sum())


class LossCalls(TorchFunctionMode):
    """Context manager that notes the last calls of watched loss functions in :attr:`calls`.

    Of many calls, as of a loss that is computed in parts to save memory, the others are let go with their logits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[LossCall] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the function as it is and note it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in WATCHED:
            arguments = inspect.signature(func).bind(*args, **kwargs).arguments
            options = {name: value for name, value in arguments.items() if name not in REDUCTION}
            first, second = options.pop("input"), options.pop("target")
            self.calls.append(LossCall(func, first, second, options, result))
            del self.calls[:-MOST_CALLS]
        return result


class ExplainedLoss:
    """A user's loss, with the terms that it is a mean of where a call of a watched loss function shows them.

    Loss and score are what the user's function returns, so that nothing else depends on what is found here. Watching
    takes time with every operation of the model: it ends if the first batch shows no terms.

    Args:
        loss: see :data:`~lrf_lightning.solver.evaluation.LossFunction`.
    """

    def __init__(self, loss: LossFunction) -> None:
        self.loss = loss
        self._plain, self._found = _is_compiled(loss), False

    def __call__(self, model: nn.Module, batch: Any) -> Tensor | StepOutput:
        """The loss of one batch."""
        if self._plain or any(_is_compiled(module) for module in model.modules()):
            return self.loss(model, batch)
        size, given = batch_size(batch), list(tensors(batch))  # first, since the loss may take its batch to pieces
        try:
            with LossCalls() as watch:
                output = self.loss(model, batch)
        except Exception as error:
            if not _was_compiling(error):
                raise
            self._plain = True  # code that is compiled further down may not bear being watched
            return self.loss(model, batch)
        plain = output if isinstance(output, StepOutput) else StepOutput(output)
        if isinstance(plain.loss, Tensor) and plain.terms is None:
            calls = [call.arranged(size, given) for call in watch.calls]
            found = explanation(calls, plain.loss, size, widened=True)
            terms = None if found is None or not torch.isfinite(plain.loss).all() else found[0].terms(size)
            if terms is not None:
                self._found = True
                return replace(plain, terms=terms)
        self._plain = not self._found
        return output


def explanation(
    calls: Iterable[LossCall], loss: Tensor, size: int, *, widened: bool = False
) -> tuple[LossCall, Tensor] | None:
    """The first watched call that a loss comes from, and its losses per sample; None if there is none.

    A loss that is not finite comes from a call that is not finite either, so that as many figures are given of it as of
    others.

    Args:
        calls: watched calls.
        loss: shape (batch,), or () for the mean.
        size: samples in the batch.
        widened: whether the loss may be no more exact than the call's result, in spite of its dtype.
    """
    for call in calls:
        # the same value may be computed from detached logits, for a log
        if loss.requires_grad and not call.input.requires_grad:
            continue
        try:
            losses = call.per_sample(size)
        except Exception:  # what was called in a function transform or a compiled region cannot be called again
            continue
        if losses is None or loss.shape not in ((), losses.shape):
            continue
        broken = loss.dim() == 0 and not torch.isfinite(loss) and not torch.isfinite(losses).all()
        eps = max(torch.finfo(value.dtype).eps for value in ((loss, call.result) if widened else (loss,)))
        if broken or _agrees(losses, loss, eps):
            return call, losses
    return None


def _was_compiling(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return any("torch/_dynamo" in Path(frame.filename).as_posix() for frame in frames)


def _is_compiled(code: Any) -> bool:
    return (
        getattr(code, "_compiled_call_impl", None) is not None
        or hasattr(code, "_orig_mod")
        or hasattr(code, "_torchdynamo_orig_callable")
    )


def _agrees(per_sample: Tensor, loss: Tensor, eps: float) -> bool:
    """Whether per-sample losses, or their mean, are the loss within 1e-4 or a few roundings; never if it is infinite.

    Args:
        per_sample: shape (batch,).
        loss: shape (batch,) or ().
        eps: relative rounding of what the loss was computed in.
    """
    found, wanted = per_sample.detach().double(), loss.detach().double()
    found = found if loss.dim() == 1 else found.mean()
    close = torch.allclose(found, wanted, rtol=max(1e-4, 4 * eps), atol=1e-9)
    return close and bool(torch.isfinite(wanted).all())


def _rows_by_sample(rows: Tensor, size: int, steps: int) -> Tensor | None:
    """Rows of shape (batch * t, ...), or time-major with ``steps`` of them, as (batch, t * ...)."""
    if steps:
        return rows.reshape(steps, size, -1).transpose(0, 1).reshape(size, -1)
    if rows.dim() == 0 or size < 1 or rows.shape[0] == 0 or rows.shape[0] % size:
        return None
    return rows.reshape(size, -1)


def _widened(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value
