"""Where the steps of a LightningModule show its loss.

It is decided once, on the first batch, from the first of these that yields a loss:

1. the value under ``"loss"`` of a mapping that ``validation_step`` returns;
2. the one value that ``validation_step`` logs under a name such as ``val/loss``, since what else it returns may be a
   score;
3. what ``validation_step`` returns: a scalar tensor, or the first tensor of a tuple;
4. the one value that ``validation_step`` logs under another name with "loss" in it;
5. the result of the one loss function of ``torch.nn.functional`` that ``validation_step`` calls;
6. what ``training_step`` returns, unless the module optimises manually.
"""

from __future__ import annotations

import inspect
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lrf_lightning.solver.running.batch_contents import batch_size, own_copy, tensors
from lrf_lightning.solver.running.state import restored_state
from lrf_lightning.steps.loss_calls import LossCall
from lrf_lightning.steps.loss_explanation import Combination, combination, was_compiling
from lrf_lightning.steps.row_layout import Layout, row_layouts
from lrf_lightning.steps.step_record import StepRecord, run_step

__all__ = ["LossSource", "can_be_run", "combination_in", "find_source", "required_loss"]

logger = logging.getLogger(__name__)

LOSS_NAME = re.compile(r"((val|valid|validation|dev|eval)[/_.-])?loss", re.IGNORECASE)


@dataclass(frozen=True)
class LossSource:
    """Where the loss is found.

    Attributes:
        step: name of the method.
        place: ``returned``, ``call`` or the name of a logged value.
        combined: whether it is a sum of watched calls, so that they have to be traced.
        layouts: function and layout of the rows of every watched call, empty if they could not be found out; None as
            long as no batch had two samples.
    """

    step: str
    place: str
    combined: bool = False
    layouts: tuple[tuple[str, Layout], ...] | None = None

    def arranged(self, calls: Sequence[LossCall], size: int, batch: Iterable[Tensor]) -> list[LossCall]:
        """The calls of a step, with what is known about their rows; see :meth:`LossCall.arranged`."""
        batch = list(batch)
        return [call.arranged(size, batch, self._layout(calls, place)) for place, call in enumerate(calls)]

    def with_layouts(self, module: LightningModule, batch: Any, size: int) -> LossSource:
        """The same with the layouts of a batch of this size, if they are not known yet and can be found."""
        if self.layouts is not None or size < 2:
            return self
        return replace(self, layouts=_layouts(module, self.step, batch, size))

    def _layout(self, calls: Sequence[LossCall], place: int) -> Layout:
        """That of the call at the same place, or of all calls of the function where a step makes others at times."""
        names, known = [call.function.__name__ for call in calls], self.layouts or ()
        if names == [name for name, _ in known]:
            return known[place][1]
        of_function = {layout for name, layout in known if name == names[place]}
        return of_function.pop() if len(of_function) == 1 else "unknown"


def find_source(module: LightningModule, batch: Any) -> LossSource:
    """Find the first source of a loss; see the module's docstring for their order."""
    problems: list[str] = []
    cause: Exception | None = None
    for step in ("validation_step", "training_step"):
        if not can_be_run(module, step):
            problems.append(f"{step} is not defined" if not is_overridden(step, module) else f"{step} cannot be used")
            continue
        try:
            size, given = batch_size(batch), list(tensors(batch))
            record = _first_record(module, step, batch)
        except Exception as error:  # a step may depend on state that only training has: the other one is tried
            logger.debug("%s failed outside of a fit", step, exc_info=True)
            problems.append(f"{step} raised {type(error).__name__}: {error}")
            cause = error
            continue
        for place in _places(step, record):
            loss = _loss(record, LossSource(step, place), step == "training_step")
            if loss is not None and loss.requires_grad:
                if problems and is_overridden("validation_step", module):
                    rank_zero_warn(f"The loss is taken from {step} ({place}), since {'; '.join(problems)}")
                source = LossSource(step, place).with_layouts(module, batch, size)
                calls = source.arranged(record.calls, size, given)
                with torch.enable_grad():
                    found = combination_in(record, calls, loss, size, check=True)
                return replace(source, combined=found is not None and not found.is_mean)
        problems.append(f"{step} returned {_described(record.returned)}{_ambiguous(step, record)}")
    raise ValueError(
        f"no step of {type(module).__name__} gives a floating-point scalar loss that gradients flow through "
        f"({'; '.join(problems)}). Return the loss from validation_step, or pass loss=a callable (module, batch)"
    ) from cause


def _first_record(module: LightningModule, step: str, batch: Any) -> StepRecord:
    """A step with gradients everywhere, traced unless code that is compiled does not bear that."""
    with _grad_everywhere(module), warnings.catch_warnings():
        # torch says it once, of float(loss) for instance, which is harmless in a validation_step: it has no gradients
        warnings.filterwarnings("ignore", "Converting a tensor with requires_grad")
        try:
            return run_step(module, step, own_copy(batch), traced=True)
        except Exception as error:
            if not was_compiling(error):
                raise
            return run_step(module, step, own_copy(batch))


def _layouts(module: LightningModule, step: str, batch: Any, size: int) -> tuple[tuple[str, Layout], ...]:
    """How the rows of the losses that a step calls belong to samples, beside the names of the functions."""
    dtypes = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
    if torch.is_autocast_enabled(module.device.type):
        dtypes.add(torch.get_autocast_dtype(module.device.type))

    names: list[str] = []

    def rows_of(batch: Any) -> list[Tensor | None]:
        with restored_state(module):
            calls = run_step(module, step, own_copy(batch)).calls
        if not names:  # the batch as it is comes first
            names.extend(call.function.__name__ for call in calls)
        return [_rows(call) for call in calls]

    with torch.no_grad():
        rounding = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
        return tuple(zip(names, row_layouts(rows_of, batch, size, rounding), strict=False))


def _rows(call: LossCall) -> Tensor | None:
    try:
        return call.rows
    except Exception:  # what was called in a function transform cannot be called again
        return None


def _places(step: str, record: StepRecord) -> Iterator[str]:
    if step != "validation_step":
        yield "returned"
        return
    names = _logged_losses(record)
    exact = [name for name in names if LOSS_NAME.fullmatch(name)]
    named = isinstance(record.returned, Mapping)
    if named:
        yield "returned"
    if len(exact) == 1:
        yield f"logged {exact[0]}"
    if not named:
        yield "returned"
    if len(names) == 1 and not exact:
        yield f"logged {names[0]}"
    elif not names and len(record.calls) == 1:
        yield "call"


def _logged_losses(record: StepRecord) -> list[str]:
    return [name for name, value in record.logged.items() if "loss" in name.lower() and isinstance(value, Tensor)]


def _ambiguous(step: str, record: StepRecord) -> str:
    """What to add to a message where a step logs several losses."""
    names = _logged_losses(record) if step == "validation_step" else []
    return f" and logged {', '.join(names)}, of which none is the loss as a whole" if len(names) > 1 else ""


def _loss(record: StepRecord, source: LossSource, vector: bool) -> Tensor | None:
    """The loss at a source, None if what is there is no loss; a vector counts only where it cannot be a prediction.

    One number may have the shape (1,); the tensor is returned as it is, so that it can be found among the traced ones.
    """
    value: Any
    if source.place == "call":
        value = record.calls[0].result if len(record.calls) == 1 else None
    elif source.place.startswith("logged "):
        value = record.logged.get(source.place.removeprefix("logged "))
    else:
        value = record.returned
        if isinstance(value, Mapping):
            value, vector = value.get("loss"), True
        elif isinstance(value, (tuple, list)):
            value = next((item for item in value if isinstance(item, Tensor)), None)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    is_number = value.numel() == 1 and value.dim() <= 1
    return value if is_number or (vector and value.dim() == 1) else None


def required_loss(record: StepRecord, source: LossSource) -> Tensor:
    """The loss of a batch, from where it was found for the first one.

    Raises:
        ValueError: if there is none.
    """
    # layers that are observed may lie outside of the graph of a frozen model, so a gradient is not asked for again
    loss = _loss(record, source, True)
    if loss is None:
        raise ValueError(
            f"{source.step} gave a loss ({source.place}) for the first batch, but for this one it returned "
            f"{_described(record.returned)}; it must give a loss for every batch, or pass loss="
        )
    return loss


def combination_in(
    record: StepRecord, calls: list[LossCall], loss: Tensor, size: int, *, check: bool = False
) -> Combination | None:
    """The watched calls that a loss is a sum of, None if it is no such sum or was not traced.

    Args:
        record: of the step.
        calls: its calls of loss functions, arranged by samples.
        loss: what the step gave.
        size: samples in the batch.
        check: see :func:`~lrf_lightning.steps.loss_explanation.combination`.
    """
    if record.trace is None or loss.numel() != 1:
        return None
    return combination(calls, loss.reshape(()), record.trace.shadow_of(loss), size, check=check)


@contextmanager
def _grad_everywhere(module: nn.Module) -> Iterator[None]:
    """Let all floating-point parameters ask for gradients, so that a loss can show that it depends on them."""
    flags = {p: p.requires_grad for p in module.parameters() if p.is_floating_point()}
    try:
        for parameter in flags:
            parameter.requires_grad_(True)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def can_be_run(module: LightningModule, step: str) -> bool:
    """Whether a module has a step that can be called with a batch and does not train."""
    if not is_overridden(step, module):
        return False
    # a manual training_step would step the optimizers, which hold the trained weights
    manual = step == "training_step" and not module.automatic_optimization
    return not manual and "dataloader_iter" not in inspect.signature(getattr(module, step)).parameters


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        grad = "" if value.requires_grad else " without gradient"
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}{grad}"
    if isinstance(value, Mapping):
        return f"a mapping with the keys {sorted(map(str, value))}"
    return "nothing" if value is None else f"a {type(value).__name__}"
