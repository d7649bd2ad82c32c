"""Work on a copy of a LightningModule while the trainer, the flags of torch and all random states stay as they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor, nn

from lrf_lightning import random_state
from lrf_lightning.copies.model_copy import copied_model
from lrf_lightning.copies.uncompiled import uncompile_children
from lrf_lightning.copies.unsharded import copied
from lrf_lightning.matmul_precision import matmul_precision

__all__ = ["detached_copy", "undisturbed"]

COMPILED_METHODS = ("forward", "training_step", "validation_step", "test_step", "predict_step")


def detached_copy(module: LightningModule, whole: Mapping[int, Tensor] | None = None) -> LightningModule:
    """A deep copy without the trainer, in which nothing is compiled and no weight is spread over processes.

    Tensors that hang on a graph (losses that a step has left in an attribute) are copied without it, since torch
    refuses to copy them otherwise. Attributes that cannot be copied at all, such as locks and open files, are shared,
    and so is a trainer that hangs in another attribute; see :mod:`~lrf_lightning.copies.model_copy`.

    Args:
        module: the module.
        whole: what stands in for weights that are spread over processes, see
            :func:`~lrf_lightning.copies.unsharded.whole_weights`.
    """
    memo: dict[int, Any] = dict(whole or {})
    if module._compiler_ctx is not None:
        memo[id(module._compiler_ctx)] = None
    mesh = getattr(module, "_device_mesh", None)
    if mesh is not None:
        memo[id(mesh)] = None
    # the live module's data is the user's, and steps may write into it
    new = copied_model(module, memo, data=False, copier=copied)
    new.trainer = None
    if module._compiler_ctx is not None:
        # these attributes would still call the original's compiled methods
        for name in COMPILED_METHODS:
            new.__dict__.pop(name, None)
    for child in list(new.modules()):
        _forget_original(child)
    uncompile_children(new)
    return new


def _forget_original(module: nn.Module) -> None:
    """Take out of a copied module what still points at the original."""
    module.__dict__.pop("_compiled_call_impl", None)
    # those of wandb.watch log the weights of whatever runs
    for key in [key for key, hook in module._forward_hooks.items() if _module_of(hook).split(".")[0] == "wandb"]:
        del module._forward_hooks[key]
    if isinstance(module, LightningModule):
        module._metric_attributes = None  # names by the identity of the original's metrics


def _module_of(function: Any) -> str:
    return str(getattr(function, "__module__", None) or "")


@contextmanager
def undisturbed(trainer: Trainer) -> Iterator[None]:
    """Let code run that may draw random numbers, log through the trainer and set flags; undo all of it afterwards.

    Meanwhile the trainer says that it validates, its loggers write nothing, gradients are enabled, and operations
    without a deterministic version warn instead of raising.
    """
    stage, loggers, metrics = trainer.state.stage, trainer.loggers, dict(trainer.callback_metrics)
    with random_state.preserved(), _preserved_flags(), torch.inference_mode(False), torch.enable_grad():
        try:
            trainer.loggers = [DummyLogger()] if loggers else []
            trainer.state.stage = RunningStage.VALIDATING
            if torch.are_deterministic_algorithms_enabled():
                torch.use_deterministic_algorithms(True, warn_only=True)
            yield
        finally:
            trainer.state.stage, trainer.loggers = stage, loggers
            trainer.callback_metrics.clear()
            trainer.callback_metrics.update(metrics)


@contextmanager
def _preserved_flags() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    choices, dtype = (cudnn.deterministic, cudnn.benchmark), torch.get_default_dtype()
    precision = matmul_precision()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        cudnn.deterministic, cudnn.benchmark = choices
        torch.set_default_dtype(dtype)
        if precision is not None and matmul_precision() != precision:
            torch.set_float32_matmul_precision(precision)
