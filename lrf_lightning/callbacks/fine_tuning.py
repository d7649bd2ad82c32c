"""What goes wrong, unnoticed or with an obscure error, where a fit starts from a compressed checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lrf_lightning.modules import LowRankModule

__all__ = ["check_averages", "check_optimizers"]

LISTED = 4  # names that a message lists at most


def check_averages(trainer: Trainer, module: LightningModule) -> None:
    """Refuse copies of the module in which other callbacks average weights, if they were made before it got factors.

    They are made in ``setup``, when callbacks are not told yet which checkpoint the fit starts from.

    Raises:
        MisconfigurationException: if there is one.
    """
    factors = {name for name, _ in _factors(module)}
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        for average in _averages(callback):
            if isinstance(average, type(module)) and not factors <= dict(average.named_parameters()).keys():
                raise MisconfigurationException(
                    f"{type(callback).__name__} has copied {type(module).__name__} before the checkpoint gave it "
                    "low-rank layers, so that the weights of the two do not fit. Fit a module that has them from the "
                    f"start: trainer.fit(lrf_lightning.load_compressed(module, {str(trainer.ckpt_path)!r}), ..., "
                    "ckpt_path=...)"
                )


def check_optimizers(trainer: Trainer, module: LightningModule) -> None:
    """Warn of factors that would stay as they are, because optimizers choose their parameters by other names."""
    held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, factor in _factors(module) if factor.requires_grad and id(factor) not in held]
    if missing:
        shown = ", ".join(missing[:LISTED]) + (f" and {len(missing) - LISTED} more" if len(missing) > LISTED else "")
        rank_zero_warn(
            f"LowRankCompression: no optimizer has {shown}, so these are not trained. Low-rank layers have parameters "
            "left_factor and right_factor instead of weight; where configure_optimizers of "
            f"{type(module).__name__} chooses parameters by name, let it choose those, too, or set requires_grad=False"
        )


def _factors(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, layer in module.named_modules():
        if isinstance(layer, LowRankModule):
            for key in ("left_factor", "right_factor"):
                factor = layer._parameters.get(key)  # pruning computes it from another one
                if factor is not None:
                    yield f"{name}.{key}", factor


def _averages(callback: Callback) -> Iterator[nn.Module]:
    """The models that Lightning's callbacks, or others with torch's class, average the weights of a module in.

    Other modules, such as the teacher of a distillation, may well be dense.
    """
    for value in vars(callback).values():
        if isinstance(value, AveragedModel):
            yield value.module
        elif isinstance(value, nn.Module) and isinstance(callback, StochasticWeightAveraging):
            yield value
