"""Whole copies of modules whose weights ``fully_shard`` (FSDP2) has spread over the processes.

Every process gets the whole weights, one after the other, in the memory of its CPU; the module itself stays sharded.
Training with FSDP2 mostly saves the memory of gradients, optimizer states and activations, which a compression does not
need: what must fit on every device are two copies of the weights and the statistics of ``memory_gib``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

__all__ = ["copied", "is_spread", "whole_weights"]

# what torch's composable interfaces leave on a module
LEFT_BEHIND = "__composable_api"
HOOKS = "_hooks"  # how the dictionaries of a module's hooks end
HOME = "torch.distributed.fsdp", "torch.distributed._composable"


def is_spread(tensor: Tensor) -> bool:
    """Whether every process may hold a part of a tensor only, a ``DTensor``."""
    return hasattr(tensor, "full_tensor")


def whole_weights(module: nn.Module) -> dict[int, Tensor]:
    """The whole parameters and buffers that belong to those that are spread, by the latter's ``id``, on the CPU.

    All processes must call it. A weight that several layers share is gathered once.
    """
    child: Any
    for child in module.modules():
        if _is_sharded(child):
            child.reshard()  # after a forward pass the root may hold whole weights for a while
    tensor: Any
    found: dict[int, Tensor] = {}
    for child in module.modules():
        for tensor in (*child._parameters.values(), *child._buffers.values()):
            if tensor is not None and is_spread(tensor) and id(tensor) not in found:
                whole = tensor.detach().full_tensor().to("cpu", copy=True)
                is_parameter = isinstance(tensor, nn.Parameter)
                found[id(tensor)] = nn.Parameter(whole, tensor.requires_grad) if is_parameter else whole
    return found


def copied(module: LightningModule, memo: dict[int, Any]) -> LightningModule:
    """A deep copy in which modules that ``fully_shard`` has changed are of their original class, without its hooks.

    Args:
        module: the module.
        memo: what stands in for some objects, by their ``id``, as in :func:`copy.deepcopy`; :func:`whole_weights` for
            spread ones.
    """
    memo = dict(memo)
    changed = [child for child in module.modules() if _is_sharded(child) or any(map(_is_hook_of_fsdp, _hooks(child)))]
    # all of them first, since attributes may refer to any of them
    memo |= {id(child): object.__new__(_original_class(child)) for child in changed}
    for child in changed:
        memo[id(child)].__dict__.update(copy.deepcopy(_own_attributes(child), memo))
    return copy.deepcopy(module, memo)


def _own_attributes(module: nn.Module) -> dict[str, Any]:
    """What was in a module before it was sharded."""
    kept: dict[str, Any] = {}
    for name, value in module.__dict__.items():
        if name.startswith(LEFT_BEHIND):
            continue
        if name.endswith(HOOKS) and isinstance(value, dict):
            value = type(value)((key, hook) for key, hook in value.items() if not _is_hook_of_fsdp(hook))
        kept[name] = value
    return kept


def _hooks(module: nn.Module) -> Iterator[Any]:
    for name, value in module.__dict__.items():
        if name.endswith(HOOKS) and isinstance(value, dict):
            yield from value.values()


def _is_hook_of_fsdp(hook: Any) -> bool:
    function = getattr(hook, "hook", hook)  # torch wraps some
    return str(getattr(function, "__module__", "")).startswith(HOME)


def _original_class(module: nn.Module) -> type[nn.Module]:
    """The class that ``fully_shard`` has mixed its own into, if it did."""
    if not _is_sharded(module):
        return type(module)
    return next(base for base in type(module).__bases__ if base is not _sharded_class())


def _is_sharded(module: nn.Module) -> bool:
    own = _sharded_class()
    return own is not None and isinstance(module, own)


def _sharded_class() -> type[Any] | None:
    """None where torch is built without it."""
    if not torch.distributed.is_available():
        return None
    try:
        from torch.distributed.fsdp import FSDPModule
    except ImportError:  # before torch 2.6
        from torch.distributed._composable.fsdp import FSDPModule  # type: ignore[attr-defined]
    return FSDPModule
