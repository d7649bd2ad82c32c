"""Call one step of a LightningModule outside of a Trainer's loop, and leave no trace of the call.

While the step runs, ``log`` and ``log_dict`` of the module and its children are shadowed, so that nothing reaches the
trainer; metrics are reset before it and do not ask other processes, and optimizers and schedulers that it asks for do
not step. Whatever the step writes to attributes of the module (lists of outputs, states of metrics) is undone, because
such outputs would hold the graph of every batch and could not be copied with the module. What is changed in place
(buffers, frozen parameters, tensors in attributes, generators) is restored by the solver, after every evaluation.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torchmetrics import Metric, MetricCollection

from lrf_lightning.steps.linear_trace import LinearTrace
from lrf_lightning.steps.loss_calls import LossCall, LossCalls

__all__ = ["StepRecord", "run_step"]

BATCH = 1  # the index of every batch
STEPS = frozenset({"step", "zero_grad", "load_state_dict", "add_param_group", "toggle_model"})


@dataclass(frozen=True)
class StepRecord:
    """What one step did.

    Attributes:
        returned: its result.
        logged: the values it logged by name; the metric object that was asked for is computed.
        calls: the watched loss functions that it called.
        batch_size: what it told ``log`` about the size of the batch, None for nothing.
        trace: what was made of the calls' results, None if they were not traced.
    """

    returned: Any
    logged: dict[str, Any]
    calls: list[LossCall]
    batch_size: int | None = None
    trace: LinearTrace | None = None


def run_step(
    module: LightningModule,
    step: str,
    batch: Any,
    *,
    compute: Callable[[Mapping[str, Any]], str | None] | None = None,
    traced: bool = False,
) -> StepRecord:
    """Call a step with one batch.

    Args:
        module: the module; its attributes are as they were on return.
        step: name of the method, such as ``"validation_step"``.
        batch: passed on as it is, with the indices where the step asks for them.
        compute: picks the name of a logged metric object whose value is wanted.
        traced: see :class:`~lrf_lightning.steps.loss_calls.LossCalls`.
    """
    logged: dict[str, Any] = {}
    sizes: list[int] = []
    method = getattr(module, step)  # looked up first: a compiled step is an attribute of the instance
    metrics = _kept_in_containers(module)
    with _undone([*module.modules(), *metrics]), LossCalls(traced=traced) as watch:
        _shadow_log(module, logged, sizes)
        _shadow_optimizers(module)
        for metric in [*(m for m in module.modules() if isinstance(m, Metric)), *metrics]:
            metric.reset()
            # the step may run on one process alone, and its value is that of its own batch
            metric.__dict__.update(sync_on_compute=False, dist_sync_on_step=False, _to_sync=False)
        returned = method(batch, *_indices(method))
        name = compute(logged) if compute else None
        if name is not None and isinstance(logged[name], Metric):
            with torch.no_grad():
                logged[name] = logged[name].compute()
    return StepRecord(returned, logged, watch.calls, sizes[0] if sizes else None, watch.trace)


def _indices(method: Callable[..., Any]) -> list[int]:
    """What to pass for every argument after the batch that has to be given, ``batch_idx`` always.

    Loader 0, but batch 1: on batch 0 steps draw pictures and write files.
    """
    parameters = list(inspect.signature(method).parameters.values())
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return [BATCH]
    others = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][1:]
    required = sum(p.default is p.empty for p in others)
    count = max(required, int(bool(others) and others[0].name == "batch_idx"))
    return [BATCH, *[0] * (count - 1)][:count]


def _shadow_log(module: LightningModule, logged: dict[str, Any], sizes: list[int]) -> None:
    """Let ``log`` and ``log_dict`` write into ``logged``, until the instances' attributes are restored."""

    def log(name: str, value: Any, *_: Any, batch_size: int | None = None, **__: Any) -> None:
        logged[name] = value
        sizes.extend([] if batch_size is None else [int(batch_size)])

    def log_dict(dictionary: Mapping[str, Any], *_: Any, batch_size: int | None = None, **__: Any) -> None:
        sizes.extend([] if batch_size is None else [int(batch_size)])
        if isinstance(dictionary, MetricCollection):
            logged.update(dictionary.items(keep_base=False, copy_state=True))
        else:
            logged.update(dictionary)

    shadows: dict[str, Any] = {"log": log, "log_dict": log_dict}
    trainer = getattr(module, "_trainer", None)
    if trainer is not None and trainer.world_size > 1:
        shadows["all_gather"] = _refuse_to_gather
    for child in module.modules():
        if isinstance(child, LightningModule):
            child.__dict__.update(shadows)


def _refuse_to_gather(*_: Any, **__: Any) -> None:
    """Processes do not run the same number of batches, so that they would wait for each other for ever."""
    raise RuntimeError(
        "the step gathers from other processes (all_gather), which do not run it at the same time here; compress on "
        "one process (train=false), or pass loss=a callable (module, batch) that does not gather"
    )


def _shadow_optimizers(module: LightningModule) -> None:
    """Let ``optimizers`` and ``lr_schedulers`` give ones that do not step, until the attributes are restored.

    A step at the right moment is the trainer's affair; here the trainer only lends itself to the module.
    """
    for name in ("optimizers", "lr_schedulers"):

        def looked_up(*args: Any, name: str = name, **kwargs: Any) -> Any:
            found = getattr(type(module), name)(module, *args, **kwargs)
            several = isinstance(found, (list, tuple))
            return [_Idle(one) for one in found] if several else None if found is None else _Idle(found)

        module.__dict__[name] = looked_up


class _Idle:
    """An optimizer or a scheduler whose attributes can be read, and which does not step."""

    def __init__(self, real: Any) -> None:
        self.__dict__["_real"] = real

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # what kind of scheduler it is may be asked for
        return type(self._real)

    def __getattr__(self, name: str) -> Any:
        return _nothing if name in STEPS else getattr(self._real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Nothing is set."""


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _kept_in_containers(module: nn.Module) -> list[Metric]:
    """Metrics in plain lists and dictionaries, which are no submodules."""
    found = {id(m): m for child in module.modules() for value in child.__dict__.values() for m in _metrics_in(value)}
    known = {id(child) for child in module.modules()}
    return [metric for key, metric in found.items() if key not in known]


def _metrics_in(value: Any, depth: int = 3) -> Iterator[Metric]:
    if isinstance(value, Metric):
        yield value
    elif depth and isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _metrics_in(item, depth - 1)


@contextmanager
def _undone(modules: list[nn.Module]) -> Iterator[None]:
    """Restore attributes of all modules but torch's own, and the contents of their containers."""
    own = [m for m in modules if not type(m).__module__.startswith("torch.nn")]
    saved = [(m, dict(m.__dict__), [restore for v in m.__dict__.values() for restore in _restorers(v)]) for m in own]
    try:
        yield
    finally:
        for changed, attributes, restorers in saved:
            changed.__dict__.clear()
            changed.__dict__.update(attributes)
            for restore in restorers:
                restore()


def _restorers(value: Any, depth: int = 3) -> Iterator[Callable[[], None]]:
    if depth == 0 or not isinstance(value, (list, dict, set, deque)):
        return
    yield _restorer(value)
    if not isinstance(value, set):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _restorers(item, depth - 1)


def _restorer(container: Any) -> Callable[[], None]:
    contents = list(container.items()) if isinstance(container, dict) else list(container)

    def restore() -> None:
        container.clear()
        (container.update if isinstance(container, (dict, set)) else container.extend)(contents)

    return restore
