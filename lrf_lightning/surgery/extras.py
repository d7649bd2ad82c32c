"""What users have put on a layer stays with the place in the model when the layer is replaced."""

from __future__ import annotations

from torch import nn

from lrf_lightning.modules import LowRankModule
from lrf_lightning.surgery.kinds import ATTRIBUTES, MARKS

__all__ = ["carry_extras"]

CARRIED = "_extras"  # where a low-rank layer notes their names


def carry_extras(old: nn.Module, new: nn.Module) -> None:
    """Give a layer the attributes, buffers, parameters and modules that are not of the class of the one it replaces."""
    if not isinstance(old, LowRankModule) and not isinstance(new, LowRankModule):
        return
    names = _extras(old)
    for name in names:
        for kind in ("_parameters", "_buffers", "_modules"):
            if name in vars(old)[kind]:
                vars(new)[kind][name] = vars(old)[kind][name]
        if name in old._non_persistent_buffers_set:
            new._non_persistent_buffers_set.add(name)
        if name in vars(old):
            vars(new)[name] = vars(old)[name]
    if names and isinstance(new, LowRankModule):
        vars(new)[CARRIED] = names


def _extras(layer: nn.Module) -> tuple[str, ...]:
    if isinstance(layer, LowRankModule):
        return tuple(vars(layer).get(CARRIED, ()))
    base = next((base for base in type(layer).__mro__ if base in ATTRIBUTES), None)
    if base is None:
        return ()
    inside = (layer._parameters.keys() - {"weight", "bias"}) | layer._buffers.keys() | layer._modules.keys()
    return tuple(sorted((vars(layer).keys() - ATTRIBUTES[base] - MARKS) | inside))
