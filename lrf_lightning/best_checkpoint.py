"""The checkpoint callback that knows the best weights of a run.

``Trainer.checkpoint_callback`` is the first one in the list, which may be one that saves every few epochs and watches
no metric. Without a metric ``ModelCheckpoint`` takes its latest file for the best one.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

__all__ = ["best_checkpoint_callback", "best_checkpoint_path"]


def best_checkpoint_callback(trainer: Trainer) -> Any:
    """The first checkpoint callback that watches a metric and keeps files by it, None if there is none."""
    for callback in trainer.checkpoint_callbacks:
        if getattr(callback, "monitor", None) is not None and getattr(callback, "save_top_k", None) != 0:
            return callback
    return None


def best_checkpoint_path(trainer: Trainer) -> str:
    """The best checkpoint that was written so far, an empty string if there is none."""
    return getattr(best_checkpoint_callback(trainer), "best_model_path", "") or ""
