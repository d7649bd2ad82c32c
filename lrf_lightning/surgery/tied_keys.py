"""Tell models of the transformers library which parameters they share once an embedding is factorized.

Its models keep a map from names of parameters to the names that they are tied to, such as ``lm_head.weight`` to
``transformer.wte.weight``. ``tie_weights``, which its Trainer calls, and ``save_pretrained`` look these names up.
Version 5 or later of transformers is served, where it is a map.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lrf_lightning.modules import LowRankModule

__all__ = ["rename_tied_keys"]

FACTORS = ("left_factor", "right_factor")


def rename_tied_keys(model: nn.Module) -> None:
    """Give the maps in a model the names of the factors where both layers are low-rank, and of the weight elsewhere."""
    owners: list[Any] = [module for module in model.modules() if isinstance(_keys(module), dict)]
    for module in owners:
        renamed = _renamed(dict(module.named_modules(remove_duplicate=False)), module._tied_weights_keys)
        if renamed != module._tied_weights_keys:
            module._tied_weights_keys = renamed  # of this model; that of its class stays
    for module in owners:
        if "all_tied_weights_keys" in module.__dict__:
            module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=True)


def _keys(module: nn.Module) -> Any:
    return getattr(module, "_tied_weights_keys", None)


def _renamed(modules: Mapping[str, nn.Module], keys: Mapping[str, str]) -> dict[str, str]:
    renamed: dict[str, str] = {}
    for target, source in keys.items():
        (target_name, _, target_key), (source_name, _, source_key) = target.rpartition("."), source.rpartition(".")
        if target_name in modules and source_name in modules and {target_key, source_key} <= {"weight", *FACTORS}:
            low_rank = all(isinstance(modules[name], LowRankModule) for name in (target_name, source_name))
            for key in FACTORS if low_rank else ("weight",):
                renamed[f"{target_name}.{key}"] = f"{source_name}.{key}"
        else:
            renamed[target] = source
    return renamed
