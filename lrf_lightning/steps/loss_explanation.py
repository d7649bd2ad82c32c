"""Which calls of loss functions a loss consists of.

:func:`explanation` compares the means of calls with what a step returned: that finds the loss that is one mean.
:func:`combination` finds sums of several calls, weighted ones too, and means that a step takes itself, over a mask for
instance. It knows what linear function of the calls' results the loss is (:mod:`lrf_lightning.steps.linear_trace`),
and so its derivatives by all of them. If nothing else is added, it is the sum of the results times these, so that every
row's part in it is known.

:class:`ExplainedLoss` finds the terms of a user's own ``loss(model, batch)``.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lrf_lightning.solver.running.batch_contents import batch_size, tensors
from lrf_lightning.solver.running.evaluation import LossFunction, StepOutput
from lrf_lightning.solver.running.loss_terms import LossTerms
from lrf_lightning.steps.loss_calls import LossCall, LossCalls

__all__ = ["Combination", "ExplainedLoss", "Explanation", "combination", "explanation", "was_compiling"]


class Explanation(NamedTuple):
    """The call that a loss is the mean of.

    Attributes:
        call: the call.
        losses: of the samples, shape (batch,), differentiable.
        weighted: whether the mean is that over the rows' weights, or over their number.
    """

    call: LossCall
    losses: Tensor
    weighted: bool

    def terms(self, size: int) -> LossTerms | None:
        """See :meth:`~lrf_lightning.steps.loss_calls.LossCall.terms`."""
        return self.call.terms(size, weighted=self.weighted)


def explanation(calls: Iterable[LossCall], loss: Tensor, size: int, *, widened: bool = False) -> Explanation | None:
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
        for weighted in (True, False):
            try:
                losses = call.per_sample(size, weighted=weighted)
            except Exception:  # what was called in a function transform or a compiled region cannot be called again
                break
            if losses is None or loss.shape not in ((), losses.shape):
                break
            broken = loss.dim() == 0 and not torch.isfinite(loss) and not torch.isfinite(losses).all()
            eps = max(torch.finfo(value.dtype).eps for value in ((loss, call.result) if widened else (loss,)))
            if broken or _agrees(losses, loss, eps):
                return Explanation(call, losses, weighted)
    return None


@dataclass(frozen=True)
class Combination:
    """A loss that is a sum over the rows of several calls, or a mean that a step has taken itself.

    Attributes:
        losses: per sample, shape (batch,), differentiable.
        terms: what they are sums of.
        calls: those that contribute.
        is_mean: whether it is no more than the mean of one call.
    """

    losses: Tensor
    terms: LossTerms
    calls: Sequence[LossCall]
    is_mean: bool


def combination(
    calls: Iterable[LossCall], loss: Tensor, shadow: Tensor | None, size: int, *, check: bool = False
) -> Combination | None:
    """How a loss is made of calls; None if it is no sum of their rows with constant factors, or rows fit no sample.

    Args:
        calls: of ``LossCalls(traced=True)``.
        loss: shape (), the mean over the batch.
        shadow: that of the loss, of one entry.
        size: samples in the batch.
        check: whether to compare the gradients of what is found with those of the loss.
    """
    known = [(call, call.leaf) for call in calls if call.leaf is not None]
    if not known or shadow is None:
        return None
    try:
        leaves, one = [leaf for _, leaf in known], torch.ones_like(shadow)
        slopes = torch.autograd.grad(shadow, leaves, one, retain_graph=True, allow_unused=True)
        used = [(call, slope) for (call, _), slope in zip(known, slopes, strict=True) if slope is not None]
        parts = [call.weighted(size, slope * call.share * size) for call, slope in used]
    except Exception:  # what was called in a function transform or a compiled region cannot be called again
        return None
    found = [part for part in parts if part is not None]
    if len(found) < len(parts) or not found:
        return None
    rows, weights = (torch.cat(values, 1) for values in zip(*found, strict=True))
    losses = rows.sum(1)
    if not _adds_up(used, losses, loss) or (check and not _has_gradients_of(loss, losses, used)):
        return None
    plain = len(used) == 1 and used[0][0].reduction == "mean" and bool((used[0][1] == 1).all())
    return Combination(losses, LossTerms.weighted(rows, weights), [call for call, _ in used], plain)


def _has_gradients_of(loss: Tensor, losses: Tensor, used: Sequence[tuple[LossCall, Tensor]]) -> bool:
    """Whether losses per sample change with the calls' inputs as the loss does.

    Factors may depend on the same inputs, and functions with a backward pass of their own may pretend to be others.
    """
    inputs = [call.input for call, _ in used if call.input.requires_grad]
    if not (inputs and loss.requires_grad and losses.requires_grad):
        return True
    try:
        both = [
            torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
            for value in (loss, losses.mean())
        ]
    except RuntimeError:  # the step has changed in place what a gradient needs
        return False
    coarse = max(torch.finfo(x.dtype).eps for x in (loss, *inputs))
    return all(
        not torch.isfinite(real).all() or float((real - own).norm()) <= max(1e-3, 4 * coarse) * float(real.norm())
        for real, own in zip(*both, strict=True)
    )


def _adds_up(used: Sequence[tuple[LossCall, Tensor]], losses: Tensor, loss: Tensor) -> bool:
    """Whether nothing but the calls is in a loss, and the losses per sample are right.

    Roundings are relative to the size of the parts, which may be much larger than their sum. A loss that is not finite
    consists of calls that are not.
    """
    if not torch.isfinite(loss):
        return not bool(torch.isfinite(losses).all())
    leaves = [(call.leaf.detach(), slope) for call, slope in used if call.leaf is not None]  # results may be changed
    parts = [(slope.double() * leaf.double()).masked_fill(slope == 0, 0) for leaf, slope in leaves]
    size = float(sum(part.abs().sum() for part in parts))
    # derivatives by a result are as coarse as the result; losses per sample come from rows in float32 or wider
    coarse = max(torch.finfo(leaf.dtype).eps for leaf, _ in leaves)
    exact = max(1e-4, 4 * torch.finfo(loss.dtype).eps, coarse)
    total = float(sum(part.sum() for part in parts))
    close = abs(total - float(loss.detach())) <= exact * size + 1e-9
    return close and abs(float(losses.detach().double().mean()) - total) <= max(1e-4, 4 * coarse) * size + 1e-9


class ExplainedLoss:
    """A user's loss, with the terms that it is a mean of where a call of a watched loss function shows them.

    Loss and score are what the user's function returns, so that nothing else depends on what is found here. Watching
    takes time with every operation of the model: it ends if the first batch shows no terms.

    Args:
        loss: see :data:`~lrf_lightning.solver.running.evaluation.LossFunction`.
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
            if not was_compiling(error):
                raise
            self._plain = True  # code that is compiled further down may not bear being watched
            return self.loss(model, batch)
        plain = output if isinstance(output, StepOutput) else StepOutput(output)
        if isinstance(plain.loss, Tensor) and plain.terms is None:
            calls = [call.arranged(size, given) for call in watch.calls]
            found = explanation(calls, plain.loss, size, widened=True)
            terms = None if found is None or not torch.isfinite(plain.loss).all() else found.terms(size)
            if terms is not None:
                self._found = True
                return replace(plain, terms=terms)
        self._plain = not self._found
        return output


def was_compiling(error: BaseException) -> bool:
    """Whether an error comes from torch's compiler."""
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
