"""Per-sample losses, accuracies and logits from the loss functions that a step calls.

A Lightning step returns one number for a batch. While it runs, :class:`LossCalls` watches calls of the common loss
functions in ``torch.nn.functional``, which the modules of ``torch.nn`` end in as well. The same call without reduction
then gives one loss per row, and rows belong to samples::

    (batch,)            one row per sample
    (batch, d1, ...)    mean over a sample's rows
    (batch * t,)        flattened tokens, mean over a sample's t rows
    (t * batch,)        the same time-major, where the batch's targets, or a run with other samples, show that

Where some targets are ignored (padding, the last token of a text), the batch's mean is taken over the others, so a
sample counts by its number of them: its loss is the sum over its rows, divided by the mean number per sample. The same
holds for weights of classes, with the sum of the weights instead of the number.

Losses that compare the samples of a batch with each other, contrastive ones, have none per sample: what a sample
changes in the losses of the others would be missing in intervals over samples.

Whether and how these are the loss is found out by :mod:`lrf_lightning.steps.loss_explanation`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import _reduction, functional
from torch.overrides import TorchFunctionMode

from lrf_lightning.solver.running.loss_terms import LossTerms
from lrf_lightning.steps.linear_trace import LinearTrace
from lrf_lightning.steps.row_layout import Layout, block_count

__all__ = ["LossCall", "LossCalls"]

WATCHED: frozenset[Callable[..., Any]] = frozenset(
    {
        functional.cross_entropy,
        functional.nll_loss,
        functional.binary_cross_entropy_with_logits,
        functional.binary_cross_entropy,
        functional.mse_loss,
        functional.l1_loss,
        functional.smooth_l1_loss,
        functional.huber_loss,
    }
)
CLASSIFIERS: frozenset[Callable[..., Any]] = frozenset({functional.cross_entropy, functional.nll_loss})
WEIGHTED: frozenset[Callable[..., Any]] = frozenset({functional.mse_loss, functional.l1_loss})  # mean over the weights
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
        reduction: of its rows to the result.
        leaf: where the graph of what is made of the result begins, if that is traced.
        steps: length t of sequences whose rows are time-major; 0 if the rows of a sample lie together.
        given: whether every row is known to belong to one sample.
        mixed: whether rows are known to depend on several samples, or it is not known to which one they belong.
    """

    function: Callable[..., Tensor]
    input: Tensor
    target: Tensor
    options: Mapping[str, Any]
    result: Tensor
    reduction: Literal["mean", "sum", "none"] = "mean"
    leaf: Tensor | None = None
    steps: int = 0
    given: bool = False
    mixed: bool = False

    def arranged(self, size: int, batch: Iterable[Tensor], layout: Layout | None = None) -> LossCall:
        """The call, with what is known about its rows, and ``steps`` set if they are time-major.

        Args:
            size: samples in the batch.
            batch: the batch's tensors; targets may lack the first or the last step of one of them.
            layout: what a run with other samples has shown, which goes before what the targets tell. Where it could not
                show anything, several rows per sample are taken for those of samples only if the targets tell it; None
                if that was not tried, then they are always.
        """
        if layout in ("samples", "blocks", "second"):
            blocks = block_count(self._row_shape, layout, size)
            if blocks is None:
                return replace(self, mixed=True)
            return replace(self, steps=0 if layout == "samples" else blocks, given=True)
        told = self._told(size, batch)
        several = size > 1 and self._row_shape[:1] != (size,)
        if layout == "mixed" or (layout == "unknown" and several and not told.given):
            return replace(self, mixed=True)
        return told

    def _told(self, size: int, batch: Iterable[Tensor]) -> LossCall:
        """The call with what the batch tells about its targets."""
        batch = list(batch)
        try:
            steps = next(filter(None, (self._steps_as_in(whole, size) for whole in batch)), 0)
            given = steps != 0 or any(self._targets_are(whole) for whole in batch)
        except Exception:  # tensors of other kinds, and what was called in a function transform
            return self
        return replace(self, steps=max(steps, 0), given=True) if given else self

    def _targets_are(self, whole: Tensor) -> bool:
        target = self.target
        alike = whole.layout is torch.strided and whole.device == target.device and whole.numel() == target.numel()
        return alike and bool((whole.reshape(-1) == target.reshape(-1)).all())

    def _steps_as_in(self, whole: Tensor, size: int) -> int:
        """The length of sequences if the targets are those of a tensor, but time-major; -1 if they lie as there do."""
        target, valid = self.target.reshape(-1), self._valid
        alike = whole.layout is torch.strided and whole.device == target.device
        if not alike or whole.dim() < 1 or len(whole) != size:
            return 0
        if whole.dim() == 1:  # one target for all steps
            return self._repeated(whole, target, size)
        for skipped, part in ((0, whole), (1, whole[:, 1:]), (1, whole[:, :-1])):
            steps = whole.shape[1] - skipped
            if steps < 2 or part.numel() != target.numel():
                continue
            for flat, answer in ((part.reshape(-1), -1), (part.transpose(0, 1).reshape(-1), steps)):
                same = flat == target if valid is None else (flat == target) | ~valid.reshape(-1)
                if bool(same.all()):
                    return answer
        return 0

    @staticmethod
    def _repeated(whole: Tensor, target: Tensor, size: int) -> int:
        steps = target.numel() // size
        if steps < 2 or target.numel() % size:
            return 0
        together, apart = (target.reshape(size, steps) == whole[:, None]), target.reshape(steps, size) == whole
        return -1 if bool(together.all()) else steps if bool(apart.all()) else 0

    def per_sample(self, size: int, *, weighted: bool = True) -> Tensor | None:
        """Loss of every sample, shape (size,), differentiable, in float32 or wider.

        Args:
            size: samples in the batch.
            weighted: whether their mean is that over the rows' weights, as torch takes it, or over the rows' number.

        Returns:
            None if rows fit no sample, or samples are compared with each other.
        """
        if self._compares_samples(size):
            return None
        return self._mean(self.rows, self._weights if weighted else None, size)

    def terms(self, size: int, *, weighted: bool = True) -> LossTerms | None:
        """What the rows of every sample add to its loss; None if that is one row as it is, or rows fit no sample."""
        rows, weights = self._by_sample(self.rows, size), self._weights
        if rows is None:
            return None
        if weights is not None and weights.dtype != torch.bool:
            parts = self.weighted(size, size / (weights.sum() if weighted else weights.numel()))
            return None if parts is None else LossTerms.weighted(*parts)
        counts = None if weights is None or not weighted else self._by_sample(weights, size)
        return None if rows.shape[1] == 1 else LossTerms.of(rows, counts)

    def weighted(self, size: int, factor: Tensor | float) -> tuple[Tensor, Tensor] | None:
        """All rows times a factor, and what they weigh in it, both of shape (size, t).

        Args:
            size: samples in the batch.
            factor: one for all rows, or of their shape; rows do not count where it is 0, whatever they are.

        Returns:
            None if rows fit no sample, or samples are compared with each other.
        """
        if self._compares_samples(size):
            return None
        factor = torch.as_tensor(factor, device=self.rows.device).detach().to(self.rows).expand_as(self.rows)
        rows = self._by_sample((self.rows * factor).masked_fill(factor == 0, 0.0), size)
        weights = self._by_sample(factor if self._weights is None else factor * self._weights, size)
        return None if rows is None or weights is None else (rows, weights)

    @property
    def share(self) -> Tensor | float:
        """What the rows' sum is multiplied by to give the result."""
        if self.reduction != "mean":
            return 1.0
        return 1 / (self.rows.numel() if self._weights is None else self._weights.sum())

    def correct(self, size: int) -> Tensor | None:
        """Share of rows whose largest logit is the target's.

        Returns:
            Shape (size,) per sample, of which the mean is the share in the batch; () over all rows if they fit no
            sample or samples are compared with each other; None if the loss is no classification with class indices,
            or all targets are ignored.
        """
        if not self._has_classes:
            return None
        hits = (self.input.detach().argmax(1) == self.target).to(torch.float32)
        valid = self._valid
        if valid is not None and not bool(valid.any()):
            return None
        per_sample = None
        if not self._compares_samples(size):
            per_sample = self._mean(hits if valid is None else hits * valid, valid, size)
        if per_sample is not None:
            return per_sample
        return hits.mean() if valid is None else hits[valid].mean()

    def logits(self, size: int) -> Tensor | None:
        """Logits of shape (size, classes) if the loss is a plain cross-entropy with one row per sample, else None.

        Rows of tokens and pixels are left out: a vocabulary's logits for a whole split would not fit into memory.
        """
        plain = not self.mixed and self.options.get("weight") is None and not self.options.get("label_smoothing")
        if not (self._has_classes and plain and self.input.dim() == 2 and self.target.shape == (size,)):
            return None
        return self.input.detach() if self._valid is None else None

    @property
    def _row_shape(self) -> tuple[int, ...]:
        return tuple(self.target.shape if self._has_classes else self.input.shape)

    @cached_property
    def rows(self) -> Tensor:
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

    def _compares_samples(self, size: int) -> bool:
        """Whether the batch's samples are the classes: targets that are none of the batch's, in one of the usual forms.

        That is a square of all with all, the samples' numbers among more, or the first of all others.
        """
        if self.mixed:
            return True
        if self.given or self.input.dim() != 2 or size < 2 or len(self.input) % size:
            return False
        (rows, columns), target = self.input.shape, self.target
        if rows == columns and not self._has_classes:
            return target.shape == self.input.shape
        if not self._has_classes:
            return False
        steps = target.reshape(-1, size).diff(dim=1)
        numbered = columns >= size and bool((steps == steps[0, 0]).all()) and int(steps[0, 0]) >= 1
        if numbered and (size > 2 or int(steps[0, 0]) == 1):
            return True
        if rows == columns:
            return len(torch.unique(target)) == rows
        return rows == columns + 1 and not bool(target.any())

    @cached_property
    def _weights(self) -> Tensor | None:
        """What every row counts in the mean, of the rows' shape, bool if that is all or nothing; None if all are alike.

        The rows hold them already.
        """
        weight, valid = self.options.get("weight"), self._valid
        if weight is None or self.function not in {*CLASSIFIERS, *WEIGHTED}:
            return valid
        if self.function in WEIGHTED:
            return torch.as_tensor(weight, device=self.rows.device)
        if not self._has_classes:
            return None
        weights: Tensor = _widened(weight)[(self.target if valid is None else self.target.where(valid, 0)).long()]
        return weights if valid is None else weights * valid

    def _mean(self, rows: Tensor, weights: Tensor | None, size: int) -> Tensor | None:
        """Values of rows, weighted already, as values of shape (size,) whose mean is the weighted one over all rows."""
        by_sample = self._by_sample(rows, size)
        if by_sample is None:
            return None
        means = by_sample.mean(1)
        return means if weights is None else means * (weights.numel() / weights.sum())

    def _by_sample(self, rows: Tensor, size: int) -> Tensor | None:
        """Rows of shape (batch * t, ...), or time-major, as (batch, t * ...); None if they fit no sample."""
        if self.steps:
            return rows.reshape(self.steps, size, -1).transpose(0, 1).reshape(size, -1)
        if rows.dim() == 0 or size < 1 or rows.shape[0] == 0 or rows.shape[0] % size:
            return None
        return rows.reshape(size, -1)


class LossCalls(TorchFunctionMode):
    """Context manager that notes the last calls of watched loss functions in :attr:`calls`.

    Of many calls, as of a loss that is computed in parts to save memory, the others are let go with their logits.

    Args:
        traced: whether what is made of the results is followed in :attr:`trace`.
    """

    def __init__(self, *, traced: bool = False) -> None:
        super().__init__()
        self.calls: list[LossCall] = []
        self.trace = LinearTrace() if traced else None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the function as it is and note it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs) if self.trace is None else self.trace.call(func, args, kwargs)
        if func in WATCHED:
            leaf = None if self.trace is None else self.trace.start(result)
            arguments = inspect.signature(func).bind(*args, **kwargs).arguments
            options = {name: value for name, value in arguments.items() if name not in REDUCTION}
            first, second = options.pop("input"), options.pop("target")
            self.calls.append(LossCall(func, first, second, options, result, _reduction_of(arguments), leaf))
            del self.calls[:-MOST_CALLS]
        return result


def _reduction_of(arguments: Mapping[str, Any]) -> Any:
    average, reduce = arguments.get("size_average"), arguments.get("reduce")
    if average is not None or reduce is not None:
        return _reduction.legacy_get_string(average, reduce, emit_warning=False)
    return arguments.get("reduction", "mean")


def _widened(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value
