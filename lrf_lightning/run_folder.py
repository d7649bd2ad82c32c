"""The folder of one run, in which nothing of an earlier run lies."""

from __future__ import annotations

import os
from functools import reduce
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lrf_lightning import safe_files

__all__ = ["run_folder"]


def run_folder(trainer: Trainer) -> Path | str:
    """Where the first logger keeps the files of this run, or the trainer's root folder without a logger.

    A URL, which loggers and the root folder may have, stays a string.

    ``trainer.log_dir`` is the same folder for all runs of most loggers, ``WandbLogger`` among them. As for the
    checkpoints of ``ModelCheckpoint``, the run's name and version are added here. All processes must call this; they
    get the answer of the first one, which alone knows the version of a run.
    """
    loggers = trainer.loggers
    if not loggers or isinstance(loggers[0], (CSVLogger, TensorBoardLogger)):
        return safe_files.path_or_url(trainer.log_dir or trainer.default_root_dir)
    return safe_files.path_or_url(trainer.strategy.broadcast(_own_folder(trainer) if trainer.is_global_zero else ""))


def _own_folder(trainer: Trainer) -> str:
    first = trainer.loggers[0]
    folder = os.fspath(first.save_dir or trainer.default_root_dir)
    version = first.version if first.version is None or isinstance(first.version, str) else f"version_{first.version}"
    return reduce(safe_files.join, (str(part) for part in (first.name, version) if part), folder)
