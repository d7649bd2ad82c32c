"""A compressed model as a Lightning checkpoint, and back, without running code.

The file is what ``Trainer.save_checkpoint`` would write, with these differences: the weights are the compressed ones,
hyper-parameters and other entries are plain containers, no states of callbacks, optimizers and schedulers are in it
(they refer to dense parameters and would not load), and there are our own entries: the description under
``lrf_lightning`` and the optimizers' state of untouched parameters. ``Trainer.save_checkpoint`` itself would let
callbacks put other weights into the file, averaged dense ones for instance.
"""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lrf_lightning import safe_files
from lrf_lightning.safe_files import AnyPath
from lrf_lightning.saving.compression_record import CheckpointError, check_record, describe, describe_state, to_json
from lrf_lightning.saving.optimizer_state import OPTIMIZERS_KEY, collect_optimizer_states
from lrf_lightning.saving.plain_data import plain
from lrf_lightning.saving.structure_hook import ranks_in
from lrf_lightning.saving.weights_file import hash_tensors
from lrf_lightning.solver.solution import Solution

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["check_loaded", "is_lightning_checkpoint", "lightning_checkpoint", "parse_checkpoint"]

logger = logging.getLogger(__name__)

RECORD_KEY = "lrf_lightning"
# what a damaged or malicious archive makes the restricted loader raise
LOAD_ERRORS = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
)


def lightning_checkpoint(trainer: Trainer, pl_module: LightningModule, result: Solution, path: AnyPath) -> Path | str:
    """Write a checkpoint for ``Trainer.test/validate/predict/fit(ckpt_path=...)``; to be called on all processes.

    Args:
        trainer: the trainer of the fit that has ended.
        pl_module: the module that it trained.
        result: the solution, whose model is a compressed copy of the module.
        path: the file, or the URL of one.

    Returns:
        The file; a URL as the string it was.

    Raises:
        CheckpointError: if the state dict holds something that cannot be loaded without unpickling code.
        OSError: if the file cannot be written; an older file of the same name is then still whole.
    """
    try:
        _write(trainer, _assemble(trainer, pl_module, result), path)
    finally:
        trainer.strategy.barrier()  # the others must not wait for ever for a process that could not write
    return safe_files.normal(path)


def is_lightning_checkpoint(content: bytes) -> bool:
    """Whether the content of a file is a zip archive, as torch writes them."""
    return content[:4] == b"PK\x03\x04"


def parse_checkpoint(content: bytes, source: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state dict and the record of a checkpoint's content.

    A checkpoint that a training of a compressed model wrote has no description of it; its record says the ranks only.

    Raises:
        CheckpointError: if the content is truncated, holds code, is no compressed checkpoint, is of a future version,
            or its weights have another hash.
    """
    checkpoint = _load(content, source)
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(checkpoint, dict) or RECORD_KEY not in checkpoint:
        ranks = ranks_in(state) if isinstance(state, dict) else {}
        if state and ranks:
            return state, describe_state(ranks)
        raise CheckpointError(
            f"{source} holds no compressed model: it has no entry {RECORD_KEY!r} and no factors; load it with the "
            "dense model"
        )
    record = check_record(checkpoint[RECORD_KEY], source)
    if not isinstance(state, dict):
        raise CheckpointError(f"{source} is damaged: it has no state_dict")
    _check_hash(state, record, source)
    return state, record


def check_loaded(checkpoint: Mapping[str, Any], *, weights: bool = True) -> None:
    """Check a checkpoint that Lightning has loaded; one without a compressed model is fine.

    Args:
        checkpoint: its content.
        weights: whether the weights must be those that were written.

    Raises:
        CheckpointError: if it holds a compressed model of a future version, a damaged description or other weights.
    """
    if RECORD_KEY in checkpoint:
        record = check_record(checkpoint[RECORD_KEY], "the checkpoint")
        if weights:
            _check_hash(checkpoint["state_dict"], record, "the checkpoint")


def _check_hash(state: Mapping[str, Any], record: Mapping[str, Any], source: str) -> None:
    found = hash_tensors(state)
    if found != record["weights_hash"]:
        raise CheckpointError(
            f"the weights in {source} were changed after it was written: their hash is {found[:12]}..., "
            f"the description says {record['weights_hash'][:12]}..."
        )


def _assemble(trainer: Trainer, pl_module: LightningModule, result: Solution) -> dict[str, Any]:
    weights = result.model.state_dict()
    with _state_dict_replaced(trainer.strategy, result.model):
        checkpoint: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(weights_only=True)
    if sorted(ranks_in(checkpoint["state_dict"]).values()) != sorted(ranks_in(weights).values()):
        # the module's on_save_checkpoint has put other weights in
        checkpoint["state_dict"] = weights
    dropped: list[str] = []
    state = checkpoint.pop("state_dict")
    for name, value in state.items():
        if not isinstance(value, Tensor):
            state[name] = _plain_extra_state(value, name)
    for key in [key for key in checkpoint if key.endswith("hparams_type")]:
        del checkpoint[key]  # the class of a container that is a dict from here on
    checkpoint = {key: plain(value, key, dropped) for key, value in checkpoint.items()}
    checkpoint = {key: value for key, value in checkpoint.items() if key not in dropped}
    if dropped:
        logger.warning("The compressed checkpoint leaves out %s, which have no plain form", ", ".join(dropped))
    record = {**describe(result), "weights_hash": hash_tensors(state), "dropped": dropped}
    return {
        **checkpoint,
        "state_dict": state,
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
        RECORD_KEY: json.loads(to_json(record)),
        OPTIMIZERS_KEY: collect_optimizer_states(trainer, pl_module, result.model),
    }


@contextmanager
def _state_dict_replaced(strategy: Any, model: nn.Module) -> Iterator[None]:
    """Let Lightning dump these weights, so that the module's ``on_save_checkpoint`` sees the compressed ones."""
    strategy.lightning_module_state_dict = model.state_dict
    try:
        yield
    finally:
        del strategy.lightning_module_state_dict


def _plain_extra_state(value: Any, name: str) -> Any:
    dropped: list[str] = []
    result = plain(value, name, dropped)
    if dropped:
        raise CheckpointError(f"{dropped[0]!r} in the state dict cannot be loaded without unpickling code")
    return result


def _write(trainer: Trainer, checkpoint: dict[str, Any], path: AnyPath) -> None:
    from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

    if type(trainer.strategy.checkpoint_io) is not TorchCheckpointIO:
        trainer.strategy.save_checkpoint(checkpoint, os.fspath(path))
    elif trainer.is_global_zero:
        # Lightning's own writer moves the file over from another folder, which may be another disk
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        safe_files.make_folder(safe_files.parent(path))
        safe_files.write_bytes(path, buffer.getvalue())


def _load(content: bytes, source: str) -> Any:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = archive.namelist()
        if any(name.endswith("/constants.pkl") for name in names):
            # versions of torch before 2.6 would run such an archive in spite of weights_only
            raise CheckpointError(f"{source} is a TorchScript archive, no checkpoint")
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except LOAD_ERRORS as error:
        raise CheckpointError(
            f"{source} is damaged or truncated, or it holds more than plain data, which is not loaded: {error}"
        ) from error
