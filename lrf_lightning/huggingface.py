"""Compressed models of the transformers library as folders in its layout.

The methods of the same names of a transformers model cannot be used: ``save_pretrained`` would write the factors, but
``from_pretrained`` would build dense layers, find no weights for them and leave them at random values with a warning.
The latter happens with the folders that are written here, too.

transformers itself is imported only here, when a function is called.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn

from lrf_lightning import safe_files
from lrf_lightning.safe_files import AnyPath
from lrf_lightning.saving.checkpoint import load_compressed, savable_model, save_compressed
from lrf_lightning.saving.compression_record import CheckpointError
from lrf_lightning.solver.solution import Solution

__all__ = ["from_pretrained", "save_pretrained"]

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"


def save_pretrained(source: Solution | nn.Module, path: AnyPath) -> Path | str:
    """Write ``config.json`` beside ``model.safetensors`` and ``compression.json``.

    Args:
        source: what :func:`lrf_lightning.compress` returned for a model of transformers, or such a model with low-rank
            layers; see :func:`lrf_lightning.save_compressed`.
        path: a folder, or the URL of one that fsspec understands.

    Returns:
        The folder; a URL as the string it was.

    Raises:
        CheckpointError: see :func:`lrf_lightning.save_compressed`.
        OSError: if a file cannot be written; the model stays in memory.
        TypeError: if ``source`` is neither of them, or the model has no configuration of the transformers library.
    """
    model: Any = savable_model(source)
    if not hasattr(getattr(model, "config", None), "to_json_string"):
        raise TypeError(
            f"{type(model).__name__} has no configuration of the transformers library; use "
            "lrf_lightning.save_compressed(result, path)"
        )
    folder = save_compressed(source, path)
    # all values, not only those that differ from the defaults, which may change
    text = _config(model).to_json_string(use_diff=False)
    safe_files.write_bytes(safe_files.join(path, CONFIG_FILE), text.encode())
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        text = generation.to_json_string(use_diff=False)
        safe_files.write_bytes(safe_files.join(path, GENERATION_FILE), text.encode())
    return folder


def _config(model: Any) -> Any:
    """The configuration with what the model's own ``save_pretrained`` would enter: its class and dtype."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if hasattr(model, "dtype"):  # not a user's own module around a configuration
        name = "dtype" if hasattr(config, "dtype") else "torch_dtype"  # before version 4.56
        setattr(config, name, str(model.dtype).removeprefix("torch."))
    return config


def from_pretrained(model_class: Any, path: AnyPath) -> nn.Module:
    """Build a compressed model from a folder that :func:`save_pretrained` wrote, in evaluation mode.

    Args:
        model_class: the class of the model, or one of transformers' classes such as ``AutoModelForCausalLM``.
        path: the folder, on the local disk.

    Raises:
        CheckpointError: if the folder has no configuration, or see :func:`lrf_lightning.load_compressed`.
    """
    from transformers import AutoConfig, GenerationConfig  # type: ignore[import-not-found,unused-ignore]

    if not safe_files.file_exists(safe_files.join(path, CONFIG_FILE)):
        raise CheckpointError(f"the folder {str(path)!r} holds no {CONFIG_FILE}, so no model of transformers")
    config = AutoConfig.from_pretrained(str(path))
    make = model_class.from_config if hasattr(model_class, "from_config") else model_class
    model: Any = load_compressed(lambda: make(config), path).eval()
    if safe_files.file_exists(safe_files.join(path, GENERATION_FILE)):
        model.generation_config = GenerationConfig.from_pretrained(str(path))
    return model  # type: ignore[no-any-return]
