"""Weights that exist already: a state dict, or a file with one, as torch, Lightning and safetensors write them.

Files are read without unpickling code. The names in a state dict may have something in front that the model's have
not: ``module.`` from DDP, ``_orig_mod.`` from ``torch.compile``, or the attribute of a LightningModule.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from torch import Tensor, nn

from lrf_lightning import random_state, safe_files
from lrf_lightning.copies.model_copy import copied_model
from lrf_lightning.safe_files import AnyPath
from lrf_lightning.saving.lightning_checkpoint import LOAD_ERRORS
from lrf_lightning.saving.module_versions import without_prefix
from lrf_lightning.saving.structure_hook import follow_structure
from lrf_lightning.saving.weights_file import is_compressed, unpack

__all__ = ["Weights", "with_weights"]

Weights = Mapping[str, Any] | AnyPath


def with_weights(model: nn.Module, weights: Weights) -> nn.Module:
    """A copy of a model with other weights.

    Args:
        model: it is not touched.
        weights: a state dict, a checkpoint with one under ``state_dict``, or the path or URL of a file with either.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the file holds more than plain data, there is no state dict in it, or it does not fit the model.
    """
    source = "weights" if isinstance(weights, Mapping) else f"weights={str(weights)!r}"
    state = weights if isinstance(weights, Mapping) else _read(weights, source)
    inner = state.get("state_dict")
    state = inner if isinstance(inner, Mapping) else state
    prefix = _prefix(model, state, source)
    new = copied_model(model)
    own = without_prefix(state, prefix)
    try:
        with random_state.preserved():  # layers draw weights when they are made
            follow_structure(new, own)
        _add_other_names(new, own)
        new.load_state_dict(own)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{source} does not fit {type(model).__name__}: {error}") from error
    return new


def _add_other_names(model: nn.Module, state: MutableMapping[str, Any]) -> None:
    """Add the names that are missing of tensors that have several, of which transformers writes one."""
    tensors = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    known = {id(tensor): name for name, tensor in tensors.items() if name in state}
    state.update({name: state[known[id(t)]] for name, t in tensors.items() if name not in state and id(t) in known})


def _read(path: AnyPath, source: str) -> Mapping[str, Any]:
    content = safe_files.read_bytes(path)
    try:
        if content[8:9] == b"{":
            return unpack(content, source)[0] if is_compressed(content) else parse_tensors(content)
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (SafetensorError, *LOAD_ERRORS) as error:
        raise ValueError(
            f"{source} is damaged, or it holds more than plain data, which is not loaded. If you trust it, read it "
            f"with torch.load(path, weights_only=False) and give weights=checkpoint['state_dict'] ({error})"
        ) from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{source} holds a {type(found).__name__}, no state dict")
    return found


def _prefix(model: nn.Module, state: Mapping[str, Any], source: str) -> str:
    """What stands in front of the model's names in a state dict; most of its names must be found behind it."""
    names = set(model.state_dict())
    found: Counter[str] = Counter()
    for key in state:
        parts = str(key).split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in names:
                found[".".join([*parts[:start], ""])] += 1
    if found[""] == len(names):
        return ""
    ranked = found.most_common(2)
    if not ranked or not ranked[0][1]:
        raise ValueError(
            f"{source} does not fit {type(model).__name__}: it has no name like {next(iter(names), '')!r}, only "
            f"{', '.join(repr(str(key)) for key in list(state)[:3])}, ..."
        )
    if len(ranked) == 2 and ranked[0][1] == ranked[1][1]:
        raise ValueError(
            f"{source} fits {type(model).__name__} behind both {ranked[0][0]!r} and {ranked[1][0]!r}; give a state "
            "dict with the names of one of them"
        )
    return ranked[0][0]
