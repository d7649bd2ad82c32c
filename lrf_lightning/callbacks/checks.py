"""Mistakes that :class:`~lrf_lightning.LowRankCompression` can tell before training starts."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.nn.parameter import UninitializedParameter

from lrf_lightning import safe_files
from lrf_lightning.best_checkpoint import best_checkpoint_callback
from lrf_lightning.callbacks.isolation import detached_copy, undisturbed
from lrf_lightning.data.loaders import has_loader
from lrf_lightning.export.files import FORMATS, missing_packages
from lrf_lightning.solver.devices import solver_device
from lrf_lightning.solver.running.batch_contents import to_device
from lrf_lightning.solver.running.evaluation import evaluation_mode
from lrf_lightning.solver.settings import Settings
from lrf_lightning.steps.loss_source import can_be_run
from lrf_lightning.steps.step_loss import Score, StepLoss
from lrf_lightning.surgery import find_layers

__all__ = [
    "check_arguments",
    "check_best_weights",
    "check_folder",
    "check_layers",
    "check_loss",
    "check_processes",
    "check_single_writer",
    "check_steps",
    "checked_formats",
]

REMEDY = (
    "Train without the callback and compress the checkpoint afterwards on one process or with DDP: "
    "python train.py train=false ckpt_path=CHECKPOINT +compress=..., or lrf_lightning.compress(model, ..., "
    "weights=CHECKPOINT)"
)
IN_SHARDS = "A checkpoint in shards first becomes one file:"
# how a folder of shards becomes one file
CONSOLIDATE: dict[type[Any], str] = {
    FSDPStrategy: "python -m lightning.pytorch.utilities.consolidate_checkpoint FOLDER",
    DeepSpeedStrategy: "lightning.pytorch.utilities.deepspeed.convert_zero_checkpoint_to_fp32_state_dict(FOLDER, FILE)",
}
SHARDED: tuple[type[Any], ...] = (*CONSOLIDATE, ModelParallelStrategy)


def check_arguments(
    *,
    loss: Any,
    score: Any,
    weights: Any,
    dirpath: Any,
    cache_dir: Any,
    loaders: Mapping[str, Any],
) -> None:
    """Check the types and choices of arguments that are not settings of the solver.

    Raises:
        MisconfigurationException: naming the argument, its value and what is allowed.
    """
    if weights not in ("last", "best"):
        near = get_close_matches(str(weights).lower(), ("last", "best"), n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise MisconfigurationException(f"weights={weights!r} is unknown, allowed are 'last', 'best'{hint}")
    if loss is not None and not callable(loss):
        raise MisconfigurationException(
            f"loss={loss!r} is no callable; give loss(module, batch) that returns a Tensor or a StepOutput, or None "
            "for the loss of the module's own steps"
        )
    if score is not None and not isinstance(score, str) and not callable(score):
        raise MisconfigurationException(
            f"score={score!r} is neither a callable score(module, batch) nor the name of a logged value, like 'val/acc'"
        )
    for name, folder, none in (("dirpath", dirpath, "the log folder"), ("cache_dir", cache_dir, "nothing to share")):
        if folder is not None and not isinstance(folder, (str, os.PathLike)):
            raise MisconfigurationException(f"{name}={folder!r} is no path; give a folder, or None for {none}")
    if dirpath is not None:
        try:
            safe_files.is_remote(dirpath)
        except (ImportError, ValueError) as error:
            raise MisconfigurationException(f"dirpath={str(dirpath)!r} cannot be used: {error}") from error
    for role, loader in loaders.items():
        if loader is not None and not isinstance(loader, str) and not hasattr(loader, "__iter__"):
            raise MisconfigurationException(
                f"{role}={loader!r} is no loader; give a DataLoader, an iterable of batches, the name of a method of "
                "the datamodule or the module, or None"
            )


def checked_formats(export: Any) -> tuple[str, ...]:
    """The formats of an export, once each; a single one may be given as a string.

    Raises:
        MisconfigurationException: if one is unknown, or a package that it needs is missing.
    """
    names = (export,) if isinstance(export, str) else export
    if not isinstance(names, (tuple, list)) or not all(name in FORMATS for name in names):
        raise MisconfigurationException(
            f"export={export!r} is no list of formats; allowed are {', '.join(map(repr, FORMATS))}"
        )
    missing = [package for name in dict.fromkeys(names) for package in missing_packages(name)]
    if missing:
        raise MisconfigurationException(
            f"export={export!r} needs {', '.join(missing)}; pip install 'lrf_lightning[export]'"
        )
    return tuple(dict.fromkeys(names))


def check_processes(trainer: Trainer, *, in_place: bool) -> None:
    """Refuse strategies whose processes do not all hold the whole model, and of which no whole copy can be made.

    Args:
        trainer: with its strategy.
        in_place: whether layers of the live module are to be replaced.

    Raises:
        MisconfigurationException: for such strategies, and for several processes without DDP or FSDP2.
    """
    for sharded, consolidate in CONSOLIDATE.items():
        if isinstance(trainer.strategy, sharded):
            raise MisconfigurationException(
                f"LowRankCompression does not support {type(trainer.strategy).__name__}, whose weights are spread over "
                f"devices. {REMEDY}. {IN_SHARDS} {consolidate}"
            )
    if isinstance(trainer.strategy, ModelParallelStrategy):
        size = trainer.strategy.device_mesh["tensor_parallel"].size()
        if size > 1:
            raise MisconfigurationException(
                f"LowRankCompression does not support ModelParallelStrategy(tensor_parallel_size={size}), only 1 "
                f"(FSDP2). {REMEDY}. {IN_SHARDS} {CONSOLIDATE[FSDPStrategy]}"
            )
        if in_place:
            raise MisconfigurationException(
                "in_place=True cannot replace layers whose weights are spread over devices (ModelParallelStrategy); "
                "use in_place=False and the attribute result.model, or the file that is written"
            )
    elif trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy):
        raise MisconfigurationException(
            f"LowRankCompression does not support {type(trainer.strategy).__name__} with several processes "
            f"(world_size={trainer.world_size}), only the DDP strategies and FSDP2. {REMEDY}"
        )


def check_best_weights(trainer: Trainer) -> None:
    """Ask for a checkpoint callback that can tell the best weights if they are wanted.

    Raises:
        MisconfigurationException: if there is none, none watches a metric, or those that do keep no file;
            ``fast_dev_run`` switches them off and is let through.
    """
    if getattr(trainer, "fast_dev_run", False) or best_checkpoint_callback(trainer) is not None:
        return
    callbacks = trainer.checkpoint_callbacks
    if not callbacks:
        raise MisconfigurationException(
            "weights='best' needs a ModelCheckpoint callback and there is none; add one with a monitor, such as "
            "ModelCheckpoint(monitor='val/loss'), or use weights='last'"
        )
    if all(getattr(callback, "monitor", None) is None for callback in callbacks):
        raise MisconfigurationException(
            "weights='best' needs a ModelCheckpoint callback that watches a metric, and none has a monitor; give one "
            "the name of a logged metric, such as ModelCheckpoint(monitor='val/loss'), or use weights='last'"
        )
    raise MisconfigurationException(
        "weights='best' needs a ModelCheckpoint callback that keeps its best file, and those with a monitor have "
        "save_top_k=0; give one save_top_k=1, or use weights='last'"
    )


def check_folder(directory: Path, *, create: bool) -> None:
    """Find out whether files can be written into a folder.

    Args:
        directory: the folder.
        create: whether to create it now; otherwise the nearest folder that exists is looked at.

    Raises:
        MisconfigurationException: if the folder cannot be created or written.
    """
    try:
        if create:
            directory.mkdir(parents=True, exist_ok=True)
        existing = next(folder for folder in (directory, *directory.absolute().parents) if folder.exists())
        # permissions alone do not tell: file systems can be read-only, and root passes every test
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise MisconfigurationException(
            f"dirpath={str(directory)!r} cannot be written: {error}. Give a folder that can, or save=False"
        ) from error


def check_single_writer(directory: Path | str, others: list[Path | str]) -> None:
    """Ask for separate folders if several callbacks write.

    Raises:
        MisconfigurationException: if another callback writes into the same folder.
    """
    if directory in others:
        raise MisconfigurationException(
            f"two LowRankCompression callbacks write into {str(directory)!r}; give each of them its own dirpath="
        )


def check_steps(module: LightningModule) -> None:
    """Ask for a step that can be run for its loss.

    Raises:
        MisconfigurationException: if the module has no ``validation_step`` and its ``training_step`` would train.
    """
    if not any(can_be_run(module, step) for step in ("validation_step", "training_step")):
        manual = " optimises manually" if not module.automatic_optimization else "'s training_step cannot be run alone"
        raise MisconfigurationException(
            f"LowRankCompression: {type(module).__name__}{manual} and has no validation_step, so its loss is not "
            "known. Define validation_step, or pass loss=a callable (module, batch)"
        )


def check_loss(
    trainer: Trainer, module: LightningModule, batch: Any, *, score: str | Score | None, loaders: Mapping[str, Any]
) -> None:
    """Look for loss and score on a first batch, with copies of both, as the compression does after the training.

    What is not found is warned about only, since a step may need what only a training makes, and the splits may have
    loaders of their own, which usually yield batches of the same kind; they are not touched, because workers would be
    started and iterators used up. Nothing is done for lazy weights, and for sharded ones, where a backward pass would
    have to follow.

    Args:
        trainer: in its sanity check.
        module: the module, before training.
        batch: of the validation data, on the module's device.
        score: see :class:`~lrf_lightning.steps.step_loss.StepLoss`.
        loaders: what was given for the splits, by name.
    """
    lazy = any(isinstance(parameter, UninitializedParameter) for parameter in module.parameters())
    if lazy or isinstance(trainer.strategy, ModelParallelStrategy):
        return
    with undisturbed(trainer):
        try:
            copies = detached_copy(module), copy.deepcopy(batch)
        except Exception:  # the user's types
            return
        device = solver_device(module.device)
        try:
            with evaluation_mode(copies[0].to(device)):
                StepLoss(trainer, score=score)(copies[0], to_device(copies[1], device))
        except Exception as error:
            own = all(loader is not None or has_loader(trainer, module, role) for role, loader in loaders.items())
            unless = ", unless the loaders of its splits yield batches of another kind" if own else ""
            rank_zero_warn(
                f"LowRankCompression tried the first validation batch and may fail after the training{unless}: {error}"
            )


def check_layers(module: LightningModule, settings: Settings) -> None:
    """Warn if no layer can be factorized; models that are built in ``configure_model`` are not known yet.

    Raises:
        MisconfigurationException: if a pattern in ``include`` or ``exclude`` matches no module.
    """
    if is_overridden("configure_model", module):
        return
    try:
        candidates, skipped = find_layers(module, **settings.layer_choice)
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error
    if not candidates:
        reasons = "; ".join(f"{item.name}: {item.reason}" for item in skipped[:3]) or "it has no weight matrices"
        rank_zero_warn(
            f"LowRankCompression finds no layer of {type(module).__name__} that can be factorized ({reasons}); "
            "the model will be left unchanged"
        )
