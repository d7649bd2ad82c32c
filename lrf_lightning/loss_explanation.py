"""Which calls of loss functions a loss consists of.

:func:`explanation` compares the means of calls with what a step returned: that finds the loss that is one mean.
:func:`combination` finds sums of several calls, weighted ones too, and means that a step takes itself, over a mask for
instance: it asks autograd for the derivatives of the loss by the calls' results. Where the loss is the sum of all
results times their derivatives, it is a linear function of them, so every row's part in it is known.

:class:`ExplainedLoss` finds the terms of a user's own ``loss(model, batch)``.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrf_lightning.loss_calls import LossCall, LossCalls
from lrf_lightning.solver.batch_contents import batch_size, tensors
from lrf_lightning.solver.evaluation import LossFunction, StepOutput
from lrf_lightning.solver.loss_terms import LossTerms

__all__ = ["Combination", "ExplainedLoss", "combination", "explanation"]


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


@dataclass(frozen=True)
class Combination:
    """A loss that is a sum over the rows of several calls, or a mean that a step has taken itself.

    Attributes:
        losses: per sample, shape (batch,), differentiable.
        terms: what they are sums of.
        calls: those that contribute.
    """

    losses: Tensor
    terms: LossTerms
    calls: Sequence[LossCall]


def combination(calls: Iterable[LossCall], loss: Tensor, size: int) -> Combination | None:
    """How a loss is made of traced calls; None if it is no linear function of their rows, or rows fit no sample.

    Args:
        calls: of ``LossCalls(traced=True)``.
        loss: shape (), the mean over the batch.
        size: samples in the batch.
    """
    calls = [call for call in calls if call.result.requires_grad]
    if not (calls and loss.requires_grad):
        return None
    try:
        slopes = torch.autograd.grad(loss, [call.result for call in calls], retain_graph=True, allow_unused=True)
        used = [(call, slope) for call, slope in zip(calls, slopes, strict=True) if slope is not None]
        parts = [call.weighted(size, slope * call.share * size) for call, slope in used]
    except Exception:  # what was called in a function transform or a compiled region cannot be called again
        return None
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or not known:
        return None
    rows, weights = (torch.cat(values, 1) for values in zip(*known, strict=True))
    losses = rows.sum(1)
    parts_of_loss = [
        (slope.double() * call.result.detach().double()).masked_fill(slope == 0, 0) for call, slope in used
    ]
    total = torch.stack([part.sum() for part in parts_of_loss]).sum()[None]
    # rows are taken in single precision or wider, results may be rounded more coarsely
    coarse = max(torch.finfo(call.result.dtype).eps for call, _ in used)
    exact = _agrees(total, loss, torch.finfo(loss.dtype).eps) and _agrees(losses, loss, coarse)
    broken = not torch.isfinite(loss) and not torch.isfinite(losses).all()
    if not (exact or broken):
        return None
    return Combination(losses, LossTerms.weighted(rows, weights), [call for call, _ in used])


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
