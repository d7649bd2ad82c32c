"""Many compressed models of one original in little memory: only what differs from the original is kept, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lrf_lightning import random_state
from lrf_lightning.copies.model_copy import copied_model
from lrf_lightning.modules import LowRankModule
from lrf_lightning.solver.ranks.allocation import RanksKey, ranks_key
from lrf_lightning.solver.result import LayerResult
from lrf_lightning.surgery import prepare, set_structure

__all__ = ["PointModels"]


@dataclass(frozen=True)
class _Kept:
    """Ranks and orders of all low-rank layers, the tensors that the original has not, and the records of the layers."""

    ranks: dict[str, int]
    splits: dict[str, int]
    changed: dict[str, Tensor]
    layers: list[LayerResult]


class PointModels:
    """Compressed models by the ranks that an allocation gave them.

    Args:
        dense: the original, prepared; it is not copied.
    """

    def __init__(self, dense: nn.Module) -> None:
        self.dense = dense
        self._kept: dict[RanksKey, _Kept] = {}

    def keep(self, allocation: Mapping[str, int], model: nn.Module, layers: Sequence[LayerResult]) -> None:
        """Remember a model that was made from the original, and what became of its layers."""
        low_rank = {name: module for name, module in model.named_modules() if isinstance(module, LowRankModule)}
        ranks = {name: module.rank for name, module in low_rank.items()}
        splits = {name: module.split for name, module in low_rank.items() if module.split is not None}
        original = self.dense.state_dict()
        changed = {
            name: value.detach().to("cpu", copy=True)
            for name, value in model.state_dict().items()
            if isinstance(value, Tensor) and not _same(value, original.get(name))
        }
        self._kept[ranks_key(allocation)] = _Kept(ranks, splits, changed, list(layers))

    def build(self, allocation: Mapping[str, int]) -> nn.Module:
        """A new model like the one that was kept, on the device of the original.

        Raises:
            KeyError: if none was kept with these ranks.
        """
        kept = self._kept[ranks_key(allocation)]
        model = copied_model(self.dense)
        with random_state.preserved():  # new layers draw weights first
            set_structure(model, kept.ranks, kept.splits)
            prepare(model)  # attention whose projections are all dense was put back, but is split in what was kept
        state = {**self.dense.state_dict(), **kept.changed}
        # low-rank layers are made anew, with a bias that holds nothing yet; load_state_dict could run a hook of the
        # callback, which puts attention without low-rank layers back
        with torch.no_grad():
            for name, value in model.state_dict().items():
                if isinstance(value, Tensor):
                    value.copy_(state[name])
        return model

    def layers(self, allocation: Mapping[str, int]) -> list[LayerResult]:
        """The records of the layers of a kept model.

        Raises:
            KeyError: if none was kept with these ranks.
        """
        return list(self._kept[ranks_key(allocation)].layers)


def _same(value: Tensor, original: object) -> bool:
    return (
        isinstance(original, Tensor)
        and value.shape == original.shape
        and value.dtype == original.dtype
        and torch.equal(value, original)
    )
