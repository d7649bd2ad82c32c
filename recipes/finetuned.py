"""Your own trained model and data, given by import paths; nothing is trained.

``python train.py recipe=finetuned "ckpt_path='FILE'" module=my.project.Module datamodule=my.project.Data``

Arguments of ``__init__`` come from the hyperparameters in a checkpoint of Lightning;
``+model.arguments.NAME=VALUE`` and ``+data.arguments.NAME=VALUE`` add to them or replace them. The file may also hold
nothing but weights, as ``torch.save(model.state_dict(), FILE)`` or safetensors write them.
"""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from hydra.utils import get_class
from lightning.pytorch import LightningDataModule, LightningModule

from lrf_lightning.saving.given_weights import with_weights

__all__ = ["load_datamodule", "load_module"]

Kind = TypeVar("Kind", LightningModule, LightningDataModule)


def load_module(
    module: str, checkpoint: str | None, arguments: Mapping[str, Any] | None = None, *, trusted: bool = False
) -> LightningModule:
    """The trained module.

    Args:
        module: import path of its class.
        checkpoint: file of its weights.
        arguments: of its ``__init__``.
        trusted: whether code in the file may run, which pickled objects among the hyperparameters need.

    Raises:
        ImportError: if there is no such class.
        OSError: if the file cannot be read.
        TypeError: if the class is no LightningModule, or arguments do not suit it.
        ValueError: if the file holds more than plain data and is not trusted, or its weights do not fit.
    """
    kind = _class("module", module, LightningModule)
    if _is_lightning(checkpoint, trusted):
        return _loaded(kind, checkpoint, arguments, "model", trusted)
    return with_weights(_built(kind, arguments, "model"), checkpoint)  # type: ignore[return-value]


def load_datamodule(
    datamodule: str, checkpoint: str | None, arguments: Mapping[str, Any] | None = None, *, trusted: bool = False
) -> LightningDataModule:
    """The data; see :func:`load_module`, whose errors are raised here too."""
    kind = _class("datamodule", datamodule, LightningDataModule)
    if _is_lightning(checkpoint, trusted):
        return _loaded(kind, checkpoint, arguments, "data", trusted)
    return _built(kind, arguments, "data")


def _class(name: str, path: str, base: type[Kind]) -> type[Kind]:
    try:
        found = get_class(path)
    except Exception as error:  # Hydra wraps whatever the module raises
        raise ImportError(
            f"{name}={path} cannot be imported ({' '.join(str(error).split())}); give package.module.Class; Python "
            "looks in the folder of train.py, among the installed packages, and in the folders that PYTHONPATH names"
        ) from error
    if not issubclass(found, base):
        raise TypeError(f"{name}={path} is no {base.__name__} of lightning.pytorch, but a {found.__mro__[1].__name__}")
    return found


def _is_lightning(file: str | None, trusted: bool) -> bool:
    """Whether a file is a checkpoint of Lightning rather than bare weights."""
    if not file:
        raise ValueError("the trained weights are missing; add ckpt_path=FILE")
    with Path(file).open("rb") as stream:
        if stream.read(9)[8:] == b"{":  # safetensors
            return False
    try:
        content = torch.load(file, map_location="cpu", weights_only=not trusted)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"ckpt_path={file} holds more than plain data, which is not loaded because it could run code. If you "
            f"trust the file, add trusted=true ({str(error).splitlines()[0]})"
        ) from error
    return isinstance(content, Mapping) and "pytorch-lightning_version" in content


def _loaded(kind: type[Kind], file: str | None, arguments: Mapping[str, Any] | None, node: str, trusted: bool) -> Kind:
    # older versions of Lightning load local files without restrictions, and this one is known to be harmless or trusted
    known = "weights_only" in inspect.signature(kind.load_from_checkpoint).parameters
    options = {"weights_only": not trusted} if known else {}
    with _argument_errors(kind, node):
        return kind.load_from_checkpoint(file, map_location="cpu", **options, **(arguments or {}))


def _built(kind: type[Kind], arguments: Mapping[str, Any] | None, node: str) -> Kind:
    with _argument_errors(kind, node):
        return kind(**(arguments or {}))


@contextmanager
def _argument_errors(kind: type, node: str) -> Iterator[None]:
    """Say how to give the arguments that a class misses."""
    try:
        yield
    except TypeError as error:
        names = ", ".join(name for name in inspect.signature(kind.__init__).parameters if name != "self")
        raise TypeError(
            f"{kind.__name__} could not be built: {error}. What is not among the hyperparameters in the file is given "
            f"by +{node}.arguments.NAME=VALUE; the names are {names or '(none)'}"
        ) from error
