"""The weights of the best checkpoint of a run."""

from __future__ import annotations

import inspect
import logging
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from lrf_lightning.best_checkpoint import best_checkpoint_path

__all__ = ["load_best_weights"]

logger = logging.getLogger(__name__)

METADATA = "meta.pt"  # where Lightning puts all that is not in the shards


def load_best_weights(trainer: Trainer, module: LightningModule) -> None:
    """Load the state dict of the best checkpoint into a module, without unpickling code but torch's own of shards.

    With ``fast_dev_run`` there are no checkpoints, and the weights stay.

    Args:
        trainer: the first of its checkpoint callbacks that watches a metric knows the file.
        module: a copy of the trained module.

    Raises:
        ValueError: if there is no best checkpoint, or it holds objects that cannot be loaded safely.
    """
    path = best_checkpoint_path(trainer)
    if not path and getattr(trainer, "fast_dev_run", False):
        logger.info("fast_dev_run writes no checkpoints; the last weights are compressed instead of the best ones.")
        return
    if not path:
        raise ValueError(
            "weights='best', but no best checkpoint was written; let a ModelCheckpoint with a monitor save one, or use "
            "weights='last'"
        )
    checkpoint = _load(trainer, path, module)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)


def _load(trainer: Trainer, path: str, module: LightningModule) -> dict[str, Any]:
    try:
        if isinstance(trainer.strategy, ModelParallelStrategy):  # would load into the live module
            return _load_whole(Path(path), module)
        if "weights_only" in inspect.signature(trainer.strategy.load_checkpoint).parameters:
            return trainer.strategy.load_checkpoint(path, weights_only=True)
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return checkpoint
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"the best checkpoint {path!r} holds objects that cannot be loaded without running code ({error}); "
            "save plain hyper-parameters (save_hyperparameters(ignore=[...])), or use weights='last'"
        ) from error


def _load_whole(path: Path, module: LightningModule) -> dict[str, Any]:
    """A checkpoint of FSDP2, in one file or a folder of shards, with whole weights like those of ``module``.

    Every process reads by itself.
    """
    # Lightning leaves out of the names that a module is compiled
    names = {name.replace("_orig_mod.", ""): name for name in module.state_dict()}
    if path.is_dir():
        checkpoint = _from_shards(path, module, names)
    else:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    state = {names.get(name, name): value for name, value in checkpoint["state_dict"].items()}
    return checkpoint | {"state_dict": state}


def _from_shards(path: Path, module: LightningModule, names: dict[str, str]) -> dict[str, Any]:
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import load

    state = module.state_dict()
    weights = {"state_dict": {name: state[own] for name, own in names.items()}}
    alone = {"no_dist": True} if "no_dist" in inspect.signature(load).parameters else {}  # torch 2.4 has it not
    planner = DefaultLoadPlanner(allow_partial_load=not module.strict_loading)
    load(weights, checkpoint_id=path, planner=planner, **alone)  # fills the tensors
    others: dict[str, Any] = torch.load(path / METADATA, map_location="cpu", weights_only=True)
    return others | weights
