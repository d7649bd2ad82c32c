"""Tensors that a model has under several names, and what a state dict says of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lrf_lightning.saving.weights_file import hash_tensors

__all__ = ["contradictions"]


def contradictions(model: nn.Module, state: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Pairs of names that are one tensor in a model and two different ones in a state dict.

    ``load_state_dict`` would go through them without a word, and the last one would win. They come about when a model
    whose embedding and output layer are two is loaded into one where they are tied.

    Args:
        model: its names are those of the state dict behind ``prefix``.
        state: what is about to be loaded; names that are missing in it are passed over.
        prefix: such as ``"model."``.
    """
    first: dict[int, str] = {}
    found = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        stored = state.get(f"{prefix}{name}")
        if isinstance(tensor, Tensor) and isinstance(stored, Tensor):
            other = first.setdefault(id(tensor), name)
            if other != name and _differ(stored, state[f"{prefix}{other}"]):
                found.append((other, name))
    return found


def _differ(one: Tensor, other: Tensor) -> bool:
    # of bytes, so that NaN equals itself
    return one is not other and hash_tensors({"": one}) != hash_tensors({"": other})
