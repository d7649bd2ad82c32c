"""Carry the state of optimizers, such as moments, over to the training of the compressed model.

Optimizers are built anew for the compressed model. What they knew about parameters that the compression did not touch
is kept in the checkpoint by name and given back; factors start without a state, and so does everything after a training
with FSDP2, whose states are spread over the processes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lrf_lightning.copies.unsharded import is_spread

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["OPTIMIZERS_KEY", "collect_optimizer_states", "drop_replaced_parameters", "restore_optimizer_states"]

OPTIMIZERS_KEY = "lrf_lightning_optimizers"


def collect_optimizer_states(trainer: Trainer, module: LightningModule, compressed: nn.Module) -> list[dict[str, Any]]:
    """The state of every optimizer for the parameters whose name, shape and value the compressed model still has.

    Args:
        trainer: its optimizers hold parameters of ``module``.
        module: the module that was trained.
        compressed: the compressed copy of it.

    Returns:
        Per optimizer ``{"optimizer": class name, "state": {parameter name: its state}}``, tensors on the CPU. A state
        that is not made of tensors and numbers per parameter (L-BFGS) is left out.
    """
    left = dict(compressed.named_parameters())
    names = {
        id(parameter): name for name, parameter in module.named_parameters() if _untouched(parameter, left.get(name))
    }
    return [
        {
            "optimizer": type(optimizer).__name__,
            "state": {
                names[id(parameter)]: {key: _stored(value) for key, value in state.items()}
                for parameter, state in optimizer.state.items()
                if id(parameter) in names and all(isinstance(v, (Tensor, int, float)) for v in state.values())
            },
        }
        for optimizer in trainer.optimizers
    ]


def drop_replaced_parameters(trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Leave out of a checkpoint what optimizers know about parameters that the live module no longer has.

    Their numbers would not go up when a fit resumes. Optimizers and schedulers then start as they do from
    ``compressed.ckpt``. Nothing changes where the optimizers hold parameters of the module only.

    Args:
        trainer: its optimizers were made before layers of the module were replaced.
        module: the live module.
        checkpoint: what is about to be saved, changed in place.
    """
    present = {id(parameter) for parameter in module.parameters()}
    held = [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
    if not all(id(parameter) in present for parameter in held):
        checkpoint |= {
            "optimizer_states": [],
            "lr_schedulers": [],
            OPTIMIZERS_KEY: collect_optimizer_states(trainer, module, module),
        }


def restore_optimizer_states(trainer: Trainer, module: LightningModule) -> None:
    """Give optimizers what the checkpoint that a fit resumes from kept for them; to be called in ``on_fit_start``.

    Optimizers that are of another class than those of the checkpoint start without a state.
    """
    # Lightning keeps the checkpoint until the training state is restored, which comes after on_fit_start
    saved = trainer._checkpoint_connector._loaded_checkpoint.get(OPTIMIZERS_KEY, [])
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for optimizer, entry in zip(trainer.optimizers, saved, strict=False):
        if type(optimizer).__name__ == entry["optimizer"]:
            _fill(optimizer, entry["state"], names)


def _fill(optimizer: torch.optim.Optimizer, saved: dict[str, Any], names: dict[int, str]) -> None:
    content = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in content["param_groups"] for number in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        state = saved.get(names.get(id(parameter), ""))
        if state:
            content["state"][number] = state
    optimizer.load_state_dict(content)  # casts and moves to the parameters' dtypes and devices


def _untouched(before: nn.Parameter, after: nn.Parameter | None) -> bool:
    return (
        after is not None
        and not is_spread(before)
        and after.shape == before.shape
        and bool(torch.equal(after.detach().to(before.device, before.dtype), before.detach()))
    )


def _stored(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value
