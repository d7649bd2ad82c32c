"""A compressed model on disk, and back, without pickle.

A folder holds two files. ``model.safetensors`` has the weights and, in its header, the whole description; it alone is
what is loaded, and it is replaced in one step, so a save that is killed leaves the old model or the new one.
``compression.json`` is the description again, for people and other tools. The format of Lightning's checkpoints is
served by :mod:`lrf_lightning.saving.lightning_checkpoint`; :func:`load_compressed` reads both.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from lrf_lightning import safe_files
from lrf_lightning.copies.model_copy import copied_model
from lrf_lightning.copies.uncompiled import is_compiled
from lrf_lightning.modules import LowRankModule
from lrf_lightning.safe_files import AnyPath
from lrf_lightning.saving.compression_record import CheckpointError, describe, describe_model, to_json
from lrf_lightning.saving.lightning_checkpoint import is_lightning_checkpoint, lightning_checkpoint, parse_checkpoint
from lrf_lightning.saving.module_versions import with_versions
from lrf_lightning.saving.shared_tensors import contradictions
from lrf_lightning.saving.structure_hook import (
    LowRankCheckpointMixin,
    follow_structure,
    register_structure_hook,
    splits_in,
)
from lrf_lightning.saving.weights_file import pack, read_header, unpack
from lrf_lightning.solver.solution import Solution
from lrf_lightning.surgery import low_rank_type, restore_dense_structure, set_structure
from lrf_lightning.surgery.kinds import LOW_RANK_OF
from lrf_lightning.surgery.module_hooks import settle_parameters

__all__ = [
    "CheckpointError",
    "LowRankCheckpointMixin",
    "lightning_checkpoint",
    "load_compressed",
    "read_metadata",
    "register_structure_hook",
    "restore_dense",
    "savable_model",
    "save_compressed",
]

logger = logging.getLogger(__name__)

MODEL_FILE, DESCRIPTION_FILE = "model.safetensors", "compression.json"
LISTED = 5  # names that a message lists at most


def save_compressed(source: Solution | nn.Module, path: AnyPath) -> Path | str:
    """Write ``model.safetensors`` and ``compression.json`` into a folder, which is created if need be.

    Args:
        source: what :func:`lrf_lightning.compress` returned, or a model with low-rank layers, such as one that
            :func:`load_compressed` returned and that was trained since then. The description of a model has no verdict.
        path: a folder, or the URL of one that fsspec understands.

    Returns:
        The folder; a URL as the string it was.

    Raises:
        CheckpointError: if an entry of the state dict cannot be stored without pickle, or a low-rank layer could not be
            loaded again.
        OSError: if a file cannot be written; the message names the cause. An older model in the folder is then still
            whole, and the new one stays in memory for another try.
        TypeError: if ``source`` is neither of them.
    """
    model = savable_model(source)
    record = describe(source) if isinstance(source, Solution) else describe_model(model)
    content, record = pack(model.state_dict(), record)
    try:
        safe_files.make_folder(path)
        safe_files.write_bytes(safe_files.join(path, MODEL_FILE), content)
        safe_files.write_bytes(safe_files.join(path, DESCRIPTION_FILE), to_json(record).encode())
    except OSError as error:
        text = f"{error.strerror or error}. The compressed model stays in memory; save it again where there is room"
        raise (OSError(text) if error.errno is None else OSError(error.errno, text)) from error
    return safe_files.normal(path)


def savable_model(source: Any) -> nn.Module:
    """The model of what :func:`save_compressed` is given.

    Raises:
        TypeError: if it has none that it could save.
    """
    if isinstance(source, Solution):
        return source.model
    what, remedy = f"is a {type(source).__name__}", ""
    if isinstance(source, nn.Module):
        if is_compiled(source):
            what, remedy = "is the result of torch.compile", "; give what was compiled, model._orig_mod"
        elif isinstance(source, LowRankModule):
            what, remedy = f"is a {type(source).__name__} itself", "; wrap it in a module"
        elif any(isinstance(module, LowRankModule) for module in source.modules()):
            return source
        else:
            what, remedy = f"is a {type(source).__name__} without low-rank layers", "; save it as any other model"
    raise TypeError(
        f"what is to be saved {what}; allowed are the result of compress and a model with low-rank layers{remedy}"
    )


def read_metadata(path: AnyPath) -> dict[str, Any]:
    """The description of a compressed model: ranks, certificate, frontier, settings and so on, without the weights.

    Numbers that JSON does not know are strings that ``float`` understands, such as ``"Infinity"``.

    Args:
        path: the folder, its ``model.safetensors``, or a ``compressed.ckpt``.

    Raises:
        CheckpointError: if there is none, or it is damaged, foreign or of a future version.
        OSError: if it cannot be read.
    """
    file = _model_file(path)
    content = safe_files.read_bytes(file)
    return parse_checkpoint(content, file)[1] if is_lightning_checkpoint(content) else read_header(content, file)


def load_compressed(model: nn.Module | Callable[[], nn.Module], path: AnyPath) -> nn.Module:
    """Rebuild a compressed model from a dense model of the same architecture and a file.

    The dense model is not touched; what is returned is a copy of it with the file's structure, weights and dtypes, on
    the devices and in the training mode of the dense model. Nothing in the file is executed.

    Args:
        model: a model of the architecture that was compressed, with any weights, or a class or function that makes
            one without arguments.
        path: the folder that ``save`` wrote, its ``model.safetensors``, a ``compressed.ckpt``, or a checkpoint of
            Lightning that a training of a compressed model wrote.

    Raises:
        CheckpointError: if there is no such file, it is truncated, foreign, of a future version or changed since it was
            written, or does not fit the model.
        OSError: if it cannot be read.
        TypeError: if ``model`` makes no module, or is the result of ``torch.compile``.
    """
    file = _model_file(path)
    content = safe_files.read_bytes(file)
    state, record = (parse_checkpoint if is_lightning_checkpoint(content) else unpack)(content, file)
    new = _fresh(model)
    _check_layers(new, record, file)
    try:
        if record["factorized"]:
            set_structure(new, record["ranks"], splits_in(state))
        else:  # nothing is low-rank, or the weights alone tell what is
            follow_structure(new, state)
    except ValueError as error:
        raise CheckpointError(f"{file} does not fit {type(new).__name__}: {error}") from error
    _check_entries(new, state, file)
    _take_dtypes(new, state)
    try:
        new.load_state_dict(with_versions(state, new))
    except RuntimeError as error:
        raise CheckpointError(f"{file} does not fit {type(new).__name__}: {error}") from error
    return new


def restore_dense(model: nn.Module) -> nn.Module:
    """A copy of a compressed model in which every pair of factors is multiplied to one dense layer again.

    It computes the same function up to rounding, for tools that need plain layers. Pruning, weight norm and spectral
    norm of factors are multiplied in, and end with them. The model itself is not touched.
    """
    dense = copied_model(model)
    if isinstance(dense, LowRankModule):
        settle_parameters(dense)
        return dense.to_dense()
    restore_dense_structure(dense)
    return dense


def _model_file(path: AnyPath) -> str:
    if safe_files.folder_exists(path):
        file = safe_files.join(path, MODEL_FILE)
        if not safe_files.file_exists(file):
            raise CheckpointError(f"the folder {str(path)!r} holds no {MODEL_FILE}, so no compressed model")
        return file
    if not safe_files.file_exists(path):
        raise CheckpointError(f"there is no file or folder {str(path)!r}")
    return str(path)


def _fresh(model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    if isinstance(model, nn.Module):
        if is_compiled(model):
            raise TypeError(
                "model is the result of torch.compile; give what was compiled, model._orig_mod, and compile what comes "
                "back"
            )
        return copied_model(model)
    made = model() if callable(model) else None
    if not isinstance(made, nn.Module):
        raise TypeError(f"model={model!r} is neither a module nor a class or function that makes one without arguments")
    return made


def _check_layers(model: nn.Module, record: Mapping[str, Any], file: str) -> None:
    """Compare the layers that are factorized in the file with those of the dense model."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, layer in record["factorized"].items():
        module, shape = modules.get(name), tuple(layer["shape"])
        if module is None or isinstance(modules[name.rpartition(".")[0]], nn.MultiheadAttention):
            continue  # the projections of packed attention are no layers of their own
        weight = getattr(module, "weight", None)
        lazy = isinstance(weight, UninitializedParameter)
        own_shape = tuple(weight.shape) if isinstance(weight, Tensor) and not lazy else None
        kind = layer["kind"] if isinstance(module, LowRankModule) else _kind(module)
        if (kind, own_shape) != (layer["kind"], shape):
            raise CheckpointError(
                f"{file} does not fit {type(model).__name__}: its layer {name!r} is a {kind} with a weight of shape "
                f"{own_shape}, in the file it was a {layer['kind']} with a weight of shape {shape}"
            )


def _kind(module: nn.Module) -> str:
    """Name of the class, or of torch's layer that it does the same as and that a low-rank layer becomes again."""
    stand_in = low_rank_type(module)
    return next((kind.__name__ for kind, low in LOW_RANK_OF.items() if low is stand_in), type(module).__name__)


def _check_entries(model: nn.Module, state: Mapping[str, Any], file: str) -> None:
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    extra = sorted(name for name in state if name not in own)
    wrong = [
        f"{name} is {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if isinstance(tensor, Tensor) and isinstance(state.get(name), Tensor) and not _has_shape_of(tensor, state[name])
    ]
    problems = [
        f"{what}: {', '.join(names[:LISTED])}{', ...' if len(names) > LISTED else ''} ({len(names)} in all)"
        for what, names in (("missing tensors", missing), ("extra tensors", extra), ("wrong shapes", wrong))
        if names
    ]
    if problems:
        raise CheckpointError(f"{file} does not fit {type(model).__name__}; {'; '.join(problems)}")
    if any(isinstance(tensor, Tensor) and tensor.is_meta for tensor in own.values()):
        raise CheckpointError(
            f"{type(model).__name__} has tensors on the meta device; give them memory with model.to_empty(device='cpu')"
        )
    for first, second in contradictions(model, state):
        raise CheckpointError(
            f"{file} does not fit {type(model).__name__}: {first!r} and {second!r} differ in the file and are one "
            "tensor in the model; build the model with weights that are not tied, such as tie_word_embeddings=False"
        )


def _has_shape_of(own: Tensor, stored: Tensor) -> bool:
    """A lazy layer takes any shape."""
    return isinstance(own, (UninitializedParameter, UninitializedBuffer)) or own.shape == stored.shape


def _take_dtypes(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Cast in place, before loading, so that parameters that are shared stay shared."""
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
                continue
            if isinstance(tensor, Tensor) and isinstance(state[name], Tensor) and tensor.dtype != state[name].dtype:
                tensor.data = tensor.data.to(state[name].dtype)
