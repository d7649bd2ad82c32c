"""The optimizer of the recipes that train."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler

__all__ = ["one_cycle"]


class OneCycle(torch.optim.lr_scheduler.OneCycleLR):
    """A cycle that says why a training cannot be prolonged, instead of failing at the first step too many."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint ends.

        Raises:
            ValueError: if its training was planned to be shorter.
        """
        planned = state_dict["total_steps"]
        if planned < self.total_steps:
            raise ValueError(
                f"the checkpoint comes from a training of {planned} steps, at whose end the learning rate is 0, and "
                f"cannot be prolonged to {self.total_steps}. Go on with the trainer.max_epochs that it was begun with, "
                "or train anew, without ckpt_path"
            )
        super().load_state_dict(state_dict)


def one_cycle(
    module: LightningModule, parameters: Any, learning_rate: float, weight_decay: float
) -> OptimizerLRScheduler:
    """AdamW whose learning rate rises and falls once over the whole training.

    Args:
        module: in a trainer, which knows the number of steps.
        parameters: of the optimizer, or groups of them.
        learning_rate: its largest value.
        weight_decay: share of the weights that a step takes away, per unit of the learning rate.
    """
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    scheduler = OneCycle(optimizer, learning_rate, total_steps=int(module.trainer.estimated_stepping_batches))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
