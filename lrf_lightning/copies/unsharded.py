"""Whole copies of modules whose weights ``fully_shard`` (FSDP2) has spread over the processes.

Every process gets the whole weights, one after the other, in the memory of its CPU; the module itself stays sharded.
Training with FSDP2 mostly saves the memory of gradients, optimizer states and activations, which a compression does not
need; what must fit on every device is what must fit with DDP, about half a dozen copies of the weights.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

__all__ = ["copied", "is_spread", "whole_weights"]

# what torch's composable interfaces leave on a module
LEFT_BEHIND = "__composable_api"
HOME = "torch.distributed.fsdp", "torch.distributed._composable"
# what a LightningModule never gives to its copies
TRAINER = {"_trainer", "_fabric"}
# what a compiled module holds besides the module, which is all that is needed of it
COMPILED = "dynamo_ctx", "forward", "__call__"


def is_spread(tensor: Tensor) -> bool:
    """Whether every process may hold a part of a tensor only, a ``DTensor``."""
    return hasattr(tensor, "full_tensor")


def whole_weights(module: nn.Module) -> tuple[dict[int, Tensor], Exception | None]:
    """The whole parameters and buffers that belong to those that are spread, by the latter's ``id``, on the CPU.

    All processes must call it. A weight that several layers share is gathered once. A process that runs out of memory
    goes on to take part, so that the others need not wait for it; what happened is returned beside the weights.
    """
    child: Any
    for child in module.modules():
        if _is_sharded(child):
            child.reshard()  # after a forward pass the root may hold whole weights for a while
    tensor: Any
    found: dict[int, Tensor] = {}
    failure: Exception | None = None
    for child in module.modules():
        for tensor in (*child._parameters.values(), *child._buffers.values()):
            if tensor is None or not is_spread(tensor) or id(tensor) in found:
                continue
            # weights that are kept on the CPU are gathered by the backend of the device
            whole = tensor.detach().to(tensor.device_mesh.device_type).full_tensor()
            found[id(tensor)] = torch.empty(0)
            if failure is None:
                try:
                    found[id(tensor)] = _like(tensor, whole.to("cpu", copy=True))
                except Exception as error:
                    failure = error
                    found = dict.fromkeys(found, torch.empty(0))
    return found, failure


def _like(tensor: Tensor, whole: Tensor) -> Tensor:
    return nn.Parameter(whole, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else whole


def copied(module: LightningModule, memo: dict[int, Any]) -> LightningModule:
    """A deep copy in which modules that ``fully_shard`` has changed are of their original class, without its hooks.

    Args:
        module: the module.
        memo: what stands in for some objects, by their ``id``, as in :func:`copy.deepcopy`; :func:`whole_weights` for
            spread ones. What is copied is entered.
    """
    changed = [child for child in module.modules() if _is_changed(child)]
    # all of them first, since attributes may refer to any of them
    memo |= {id(child): object.__new__(_original_class(child)) for child in changed}
    for child in changed:
        memo[id(child)].__dict__.update(copy.deepcopy(_own_attributes(child), memo))
    return copy.deepcopy(module, memo)


def _is_changed(module: nn.Module) -> bool:
    """Whether a module cannot be copied as it is, or its copy would still call the processes together."""
    if isinstance(module, OptimizedModule) and _is_changed(module._orig_mod):
        return True  # asks the module in it how it is copied
    hooks = (hook for name in _hook_names() for hook in module.__dict__[name].values())
    return _is_sharded(module) or any(map(_is_of_fsdp, hooks))


def _own_attributes(module: nn.Module) -> dict[str, Any]:
    """What was in a module before it was sharded."""
    kept = {
        name: value
        for name, value in module.__dict__.items()
        if not name.startswith(LEFT_BEHIND) and not _is_of_fsdp(value)
    }
    for name in COMPILED if isinstance(module, OptimizedModule) else ():
        kept.pop(name, None)
    kept |= dict.fromkeys(TRAINER & set(kept))
    # other dictionaries say by a hook's number how it is called
    removed = {key for name in _hook_names() for key, hook in kept[name].items() if _is_of_fsdp(hook)}
    for name in _hook_names():
        kept[name] = type(kept[name])((key, hook) for key, hook in kept[name].items() if key not in removed)
    return kept


def _hook_names() -> list[str]:
    """Names of the dictionaries in which a module keeps its hooks, or something about them, by their numbers."""
    return [name for name, value in nn.Module().__dict__.items() if "_hooks" in name and isinstance(value, dict)]


def _is_of_fsdp(value: Any) -> bool:
    """Whether a hook or a wrapped method is one of FSDP2's."""
    function = getattr(value, "hook", value)  # torch wraps some hooks
    function = getattr(function, "__func__", function)
    if not callable(function):
        return False
    names = (getattr(function, "__module__", None), getattr(function, "__globals__", {}).get("__name__"))
    return any(isinstance(name, str) and name.startswith(HOME) for name in names)


def _original_class(module: nn.Module) -> type[nn.Module]:
    """The class that ``fully_shard`` has mixed its own into, if it did."""
    own = _sharded_class()
    return next(kind for kind in type(module).__mro__ if own is None or not issubclass(kind, own))


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
