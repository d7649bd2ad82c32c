"""The hooks that users have registered on a layer stay with the place in the model when the layer is replaced."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = ["carry_hooks", "settle_parameters"]

# those of a call; hooks on state dicts know the names of a layer's parameters, which another kind of layer has not
HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)
# whether backward hooks are those of register_full_backward_hook
FULL = "_is_full_backward_hook"


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give a module the hooks that are called around the forward and backward pass of the one it replaces.

    Both hold the same dictionaries from then on, so that the handle of a hook removes it from whichever is in use. A
    module that has hooks of its own keeps those.

    Hooks that compute a parameter are never met: dense layers that have them are not replaced, see
    :func:`~lrf_lightning.surgery.kinds.kind_objection`, and low-rank layers lose them before.
    """
    if not any(new.__dict__[name] for name in HOOKS):
        new.__dict__.update({name: old.__dict__[name] for name in (*HOOKS, FULL)})


def settle_parameters(layer: nn.Module) -> None:
    """Make plain parameters of those that pruning, weight norm or spectral norm compute before every call.

    They get the values that they would have in the next call in evaluation mode, and the hooks that computed them are
    gone.
    """
    for hook in reversed(list(layer._forward_pre_hooks.values())):  # one may compute what an earlier one reads
        if isinstance(hook, prune.BasePruningMethod):
            prune.remove(layer, hook._tensor_name)  # type: ignore[no-untyped-call]
        elif isinstance(hook, WeightNorm):
            remove_weight_norm(layer, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(layer, hook.name)
