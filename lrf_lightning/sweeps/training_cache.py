"""Train once for all jobs of a sweep that ask for the same training.

The trained weights are kept under a key of everything that decides them: what the caller names (the config without
what comes after the training), the content of the initial weights, the training data (size, and the content of some
samples), a checkpoint to start from, the source files of the model and the data, and the versions of Python, torch
and Lightning. A job that finds its key loads the weights instead of training; one that needs a training that another
job is busy with waits for it. So a changed setting never meets wrong weights; what cannot be seen, such as a file
that a data set reads later on, is for the caller to name.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import platform
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any

import lightning
import numpy
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lrf_lightning import random_state
from lrf_lightning.best_checkpoint import best_checkpoint_callback
from lrf_lightning.best_effort import best_effort
from lrf_lightning.fingerprint import UnknownContentError, fingerprint
from lrf_lightning.sweeps.calibration_cache import locked

__all__ = ["fit_once", "source_files"]

logger = logging.getLogger(__name__)

SAMPLES = 64  # of the training data whose content is in the key
WEIGHTS, METRICS, BEST = "weights.pt", "metrics.json", "best.ckpt"


def fit_once(
    trainer: Trainer,
    module: LightningModule,
    datamodule: LightningDataModule,
    *,
    folder: str | PathLike[str],
    settings: Any,
    sources: Iterable[Path] = (),
    ckpt_path: str | Path | None = None,
) -> bool:
    """``trainer.fit``, or the weights that the same fit has left in a folder.

    After weights were loaded, the trainer knows the data and the best checkpoint, and its ``callback_metrics`` are
    those of the training; but no hook of a fit has run. With several processes the trainer always fits.

    Args:
        trainer: a trainer that has not run yet.
        module: with its initial weights.
        datamodule: its ``prepare_data`` and ``setup`` are called once more, for the key.
        folder: where trainings are kept; it is created if need be.
        settings: plain values that decide the training, in nested containers.
        sources: files of code that decide it.
        ckpt_path: checkpoint to go on from.

    Returns:
        Whether the weights were loaded instead of trained.
    """
    if trainer.world_size > 1:
        logger.info("Trainings are not shared when several processes train together.")
        trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt_path)
        return False
    try:
        key = _key(trainer, module, datamodule, settings, sources, ckpt_path)
    except UnknownContentError as error:
        logger.warning("The training is not shared: %s.", error)
        trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt_path)
        return False
    entry = Path(folder) / f"training-{key}"
    with ExitStack() as stack:
        stack.enter_context(locked(entry))
        if not entry.is_dir():
            # the lock is given back as soon as the weights are there, before what other callbacks do at the end
            keep = _Keep(entry, stack.pop_all())
            trainer.callbacks.insert(0, keep)  # type: ignore[attr-defined]
            try:
                trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt_path)
            finally:
                trainer.callbacks.remove(keep)  # type: ignore[attr-defined]
                keep.lock.close()
            return False
    _load(entry, trainer, module, datamodule)
    logger.info("The trained weights are taken from %s.", entry)
    return True


class _Weights(Callback):
    """Loads weights once the hooks that may build the model have run."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.load_state_dict(torch.load(self.file, map_location="cpu", weights_only=True))


def source_files(names: Iterable[str]) -> list[Path]:
    """The Python files of the packages that classes and functions come from, but for installed ones.

    Args:
        names: qualified names, such as ``recipes.digits.DigitsNet``.
    """
    found: set[Path] = set()
    for name in names:
        file = getattr(sys.modules.get(name.split(".")[0]), "__file__", None)
        paths = list(getattr(sys.modules.get(name.split(".")[0]), "__path__", []))
        for path in [*paths, *([file] if file and not paths else [])]:
            if "site-packages" not in Path(path).parts:
                found |= set(Path(path).rglob("*.py")) if Path(path).is_dir() else {Path(path)}
    return sorted(found)


class _Keep(Callback):
    """Writes the weights as soon as the fit is done, before other callbacks change or use them."""

    def __init__(self, entry: Path, lock: ExitStack) -> None:
        self.entry, self.lock = entry, lock

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not getattr(trainer, "interrupted", False):
            best_effort("keep the trained weights for other jobs", lambda: _store(self.entry, trainer, pl_module))
        self.lock.close()


def _store(entry: Path, trainer: Trainer, module: LightningModule) -> None:
    """Write a folder whole or not at all."""
    temporary = entry.with_name(f".{entry.name}.{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        torch.save(module.state_dict(), temporary / WEIGHTS)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        (temporary / METRICS).write_text(json.dumps(metrics))
        best = getattr(_best_callback(trainer), "best_model_path", "")
        if best and Path(best).is_file():
            shutil.copyfile(best, temporary / BEST)
        os.replace(temporary, entry)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _best_callback(trainer: Trainer) -> Any:
    """The callback that is asked for the best checkpoint; where none watches a metric, the one that Lightning asks."""
    return best_checkpoint_callback(trainer) or trainer.checkpoint_callback


def _load(entry: Path, trainer: Trainer, module: LightningModule, datamodule: LightningDataModule) -> None:
    callback = _best_callback(trainer)
    if (entry / BEST).is_file() and callback is not None:
        callback.best_model_path = str(entry / BEST)
    weights = _Weights(entry / WEIGHTS)
    trainer.callbacks.insert(0, weights)  # type: ignore[attr-defined]
    try:
        trainer.validate(module, datamodule=datamodule, verbose=False)  # tells the trainer its data
    finally:
        trainer.callbacks.remove(weights)  # type: ignore[attr-defined]
    metrics = json.loads((entry / METRICS).read_text())
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})


def _key(
    trainer: Trainer,
    module: LightningModule,
    datamodule: LightningDataModule,
    settings: Any,
    sources: Iterable[Path],
    ckpt_path: str | Path | None,
) -> str:
    checkpoint = None if ckpt_path is None else Path(ckpt_path)
    if checkpoint is not None and not checkpoint.is_file():
        raise UnknownContentError(f"ckpt_path={str(checkpoint)!r} is no file whose content could be told")
    before, datamodule.trainer = datamodule.trainer, trainer  # as in a fit
    try:
        with random_state.preserved():
            datamodule.prepare_data()
            datamodule.setup("fit")
            data = _data_content(datamodule.train_dataloader())
    except UnknownContentError:
        raise
    except Exception as error:  # the user's own code; the fit will say it again, or bear it
        raise UnknownContentError(f"the training data cannot be looked at ({type(error).__name__}: {error})") from error
    finally:
        datamodule.trainer = before
    return fingerprint(
        [platform.python_version(), str(torch.__version__), lightning.__version__],
        trainer.strategy.root_device.type,
        settings,
        module,
        [(path.name, path.read_bytes()) for path in sources],
        None if checkpoint is None else checkpoint.read_bytes(),
        data,
    )


def _data_content(loaders: Any) -> Any:
    """Sizes and some samples of what the loaders draw from, in the structure that the datamodule gives them."""
    if isinstance(loaders, Mapping):
        return {name: _data_content(loader) for name, loader in loaders.items()}
    if isinstance(loaders, (list, tuple)):
        return [_data_content(loader) for loader in loaders]
    dataset = loaders.dataset if isinstance(loaders, DataLoader) else loaders
    return list(_samples(dataset))


def _samples(dataset: Any) -> Iterator[Any]:
    random_state.seed_all(0)  # samples may be augmented
    try:
        count = len(dataset)
    except TypeError:
        yield from itertools.islice(dataset, SAMPLES)
        return
    yield count
    for index in sorted({round(i * (count - 1) / (SAMPLES - 1)) for i in range(SAMPLES)} if count else ()):
        yield _plain(dataset[index])


def _plain(sample: Any) -> Any:
    """Images and other objects that arrays can be made of, as their content."""
    if hasattr(sample, "__array_interface__") and not isinstance(sample, Tensor):
        return numpy.asarray(sample)
    if isinstance(sample, (list, tuple)):
        return [_plain(item) for item in sample]
    if isinstance(sample, Mapping):
        return {name: _plain(item) for name, item in sample.items()}
    return sample
