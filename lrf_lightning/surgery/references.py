"""What refers to a layer besides the tree of modules: attributes, lists, tuples, dictionaries and closures."""

from __future__ import annotations

from torch import nn

from lrf_lightning.copies.held_functions import rebound

__all__ = ["refer_to"]

TORCHS_OWN = frozenset(vars(nn.Module()))


def refer_to(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Let all attributes of the modules of a model that refer to one module refer to another one instead.

    Some models run their layers from a list, such as ``self.laterals[::-1]``, beside the names that they are registered
    under. Lists and dictionaries are changed in place.
    """
    memo = {id(old): new}
    for module in list(model.modules()):
        own = vars(module)
        for name in own.keys() - TORCHS_OWN:
            value = rebound(own[name], memo)
            if value is not own[name]:
                own[name] = value
