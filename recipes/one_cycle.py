"""The optimizer of the recipes that train."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler

__all__ = ["one_cycle"]


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
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=int(module.trainer.estimated_stepping_batches)
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
