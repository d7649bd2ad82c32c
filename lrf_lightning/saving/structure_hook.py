"""Let a model's structure follow the weights that are loaded into it.

A state dict says by its keys which layers are factorized (``X.left_factor`` and ``X.right_factor`` instead of
``X.weight``), and by their shapes with which rank and in which order. A hook that runs before ``load_state_dict``
visits the children gives a model that structure, whichever it had before: dense weights load into a compressed model,
compressed weights into a dense one, with the user's ordinary class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lrf_lightning.modules import LowRankModule, SplitAttention
from lrf_lightning.saving.shared_tensors import contradictions
from lrf_lightning.surgery import set_structure

__all__ = ["LowRankCheckpointMixin", "follow_structure", "ranks_in", "register_structure_hook", "splits_in"]

LEFT, RIGHT = ".left_factor", ".right_factor"


class LowRankCheckpointMixin:
    """Lets a LightningModule load compressed checkpoints everywhere, also where no callback is at work.

    That is ``load_from_checkpoint``, and the main process of strategies that spawn or fork, into which Lightning loads
    the weights of its workers. Stands before ``LightningModule`` among the bases::

        class Net(LowRankCheckpointMixin, LightningModule): ...

    Raises:
        TypeError: when a class is defined in which it stands after an ``nn.Module``.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if nn.Module in order and order.index(nn.Module) < order.index(LowRankCheckpointMixin):
            raise TypeError(
                f"class {cls.__name__}: LowRankCheckpointMixin has to stand before LightningModule among the bases"
            )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self, nn.Module):
            register_structure_hook(self)


def register_structure_hook(module: nn.Module) -> None:
    """Make ``module.load_state_dict`` give the module the structure of the weights that it loads.

    Can be called repeatedly. The hook is copied and pickled with the module. Optimizers that hold parameters of
    replaced layers have to be built anew, as Lightning does.
    """
    if not any(_function_of(hook) is _structure_hook for hook in module._load_state_dict_pre_hooks.values()):
        # the public method of this name does not exist before torch 2.5
        module._register_load_state_dict_pre_hook(_structure_hook, with_module=True)  # type: ignore[no-untyped-call]


def ranks_in(state_dict: Mapping[str, Any], prefix: str = "") -> dict[str, int]:
    """The rank of every factorized layer in a state dict, by the name of the module below ``prefix``."""
    ranks: dict[str, int] = {}
    for key, left in state_dict.items():
        if not (key.startswith(prefix) and key.endswith(LEFT) and isinstance(left, Tensor) and left.dim() >= 2):
            continue
        name = key[len(prefix) : -len(LEFT)]
        if f"{prefix}{name}{RIGHT}" in state_dict:
            ranks[name] = int(left.shape[1])
    return ranks


def splits_in(state_dict: Mapping[str, Any], prefix: str = "") -> dict[str, int]:
    """The order of those factorized convolutions in a state dict that have a kernel in the left factor, by name.

    Dimensions without a kernel say nothing: along them, both orders are the same.
    """
    found: dict[str, int] = {}
    for name in ranks_in(state_dict, prefix):
        first, last = (state_dict[f"{prefix}{name}{side}"].shape[2:] for side in (RIGHT, LEFT))
        if any(size > 1 for size in last):
            found[name] = max((axis + 1 for axis, size in enumerate(first) if size > 1), default=0)
    return found


def follow_structure(model: nn.Module, state_dict: Mapping[str, Any], prefix: str = "") -> None:
    """Give a model the structure of a state dict; layers of which the state dict says nothing stay as they are.

    Names that the model does not have are left to ``load_state_dict``, which reports them as unexpected.

    Raises:
        ValueError: if a layer cannot be factorized or its rank does not fit; the model may have changed in part.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    ranks = {name: rank for name, rank in ranks_in(state_dict, prefix).items() if _can_follow(modules, name)}
    splits = splits_in(state_dict, prefix)
    for name, module in modules.items():
        if isinstance(module, LowRankModule) and name not in ranks:
            parent = modules[name.rpartition(".")[0]]
            sites = [(name, module)] + ([(name.rpartition(".")[0], parent)] if _is_attention(parent) else [])
            if not any(_has_foreign_entries(state_dict, f"{prefix}{site}.", layer) for site, layer in sites):
                ranks[name] = module.rank
                splits |= {} if module.split is None else {name: module.split}
    set_structure(model, ranks, splits)


def _structure_hook(
    module: nn.Module,
    state_dict: Mapping[str, Any],
    prefix: str,
    _metadata: Any,
    _strict: bool,
    _missing: list[str],
    _unexpected: list[str],
    errors: list[str],
) -> None:
    """What is added to ``errors``, ``load_state_dict`` raises in the end together with what it finds itself."""
    follow_structure(module, state_dict, prefix)
    if not ranks_in(state_dict, prefix):
        return  # of dense weights it reports what is wrong itself
    errors += _misfits(module, state_dict, prefix)
    errors += [
        f"{first!r} and {second!r} differ in the weights that are loaded and are one tensor in the model; build the "
        "model with weights that are not tied"
        for first, second in contradictions(module, state_dict, prefix)
    ]


def _misfits(module: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
    """The low-rank layers whose factors have other shapes than those in a state dict."""
    found = []
    for name, layer in module.named_modules():
        if isinstance(layer, LowRankModule):
            pairs = [(layer._parameters.get(key[1:]), state_dict.get(f"{prefix}{name}{key}")) for key in (LEFT, RIGHT)]
            own, given = ([_shape(pair[side]) for pair in pairs] for side in (0, 1))
            if None not in own + given and own != given:
                found.append(
                    f"the factors of the layer {name!r}, a {type(layer).__name__}, have shapes {own[0]} and {own[1]}, "
                    f"in the weights that are loaded {given[0]} and {given[1]}; build the model with the sizes of the "
                    "one that was compressed"
                )
    return found


def _shape(tensor: Any) -> tuple[int, ...] | None:
    return tuple(tensor.shape) if isinstance(tensor, Tensor) else None


def _function_of(hook: Any) -> Any:
    return getattr(hook, "hook", hook)


def _can_follow(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Whether there is a module that may become low-rank; a user's own module may have parameters of the same names."""
    module = modules.get(name)
    if module is None:
        # the projections of packed attention are no modules yet
        return _is_attention(modules.get(name.rpartition(".")[0]))
    return isinstance(module, LowRankModule) or "left_factor" not in module._parameters


def _is_attention(module: nn.Module | None) -> bool:
    return isinstance(module, (nn.MultiheadAttention, SplitAttention))


def _has_foreign_entries(state_dict: Mapping[str, Any], start: str, module: nn.Module) -> bool:
    """Whether there are entries under a name that the module has not, such as the weight of a low-rank layer."""
    own = {f"{start}{key}" for key in module.state_dict()}
    return any(key.startswith(start) and key not in own for key in state_dict)
