"""Replace layers by name, so that everything that shares a module or a weight stays consistent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from lrf_lightning.modules import LowRankModule, SplitAttention
from lrf_lightning.surgery.extras import carry_extras
from lrf_lightning.surgery.kinds import LOW_RANK_OF, attention_objection, kind_objection, low_rank_type, weight_owners
from lrf_lightning.surgery.module_hooks import carry_hooks, settle_parameters
from lrf_lightning.surgery.padded_outputs import imitate_nested_tensors, use_nested_tensors
from lrf_lightning.surgery.references import refer_to
from lrf_lightning.surgery.tied_keys import rename_tied_keys

__all__ = ["factorized", "prepare", "replace_module", "restore_dense_structure", "set_structure", "settle"]

ENCODERS = (nn.TransformerEncoder, nn.TransformerEncoderLayer)


def factorized(
    dense: nn.Module,
    left: Tensor,  # (groups, output side, rank)
    right: Tensor,  # (groups, rank, input side)
    *,
    split: int | None = None,
) -> LowRankModule:
    """A low-rank layer with these factors and the bias, dtype, device, mode and ``requires_grad`` of ``dense``.

    ``split`` is the order of the factors of a convolution, see :mod:`lrf_lightning.modules.conv`.

    Raises:
        ValueError: if a factor's shape does not fit, or the layer's kind is not supported.
    """
    kind = low_rank_type(dense)
    if kind is None:
        raise ValueError(f"a {type(dense).__name__} cannot be factorized; {_supported()} can")
    new = kind.like(dense, left.shape[-1], split=split)
    new.set_factors(left, right)
    bias = dense._parameters.get("bias")
    new.set_bias(None if bias is None else bias.detach())
    _copy_flags(dense, new)
    return new


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` wherever the module called ``name`` hangs in the tree (a shared module hangs in several places).

    Other modules that share the weight of a dense layer, or the factors of a low-rank one, get layers that share those
    of ``new``. An attention module is split when the name is that of one of its projections.

    Raises:
        ValueError: if ``name`` is empty or names no module.
    """
    if isinstance(new, LowRankModule):
        _split(model, _attentions_of(model, [name]))
    modules = dict(model.named_modules(remove_duplicate=False))
    if not name or name not in modules:
        raise ValueError(f"the model has no replaceable module named {name!r}")
    old = modules[name]
    if old is new:
        return
    twins = _twins(model, old) if isinstance(old, LowRankModule) or isinstance(new, LowRankModule) else []
    bias = old._parameters.get("bias")
    if bias is not None and new._parameters.get("bias") is not None and len(weight_owners(model)[id(bias)]) > 1:
        new.register_parameter("bias", bias)  # other layers have it too
    _put(model, old, new)
    for twin in twins:
        _put(model, twin, _tied(twin, old, new))
    if twins:
        rename_tied_keys(model)


def set_structure(model: nn.Module, ranks: Mapping[str, int], splits: Mapping[str, int] | None = None) -> None:
    """Give the named layers uninitialised factors of the given ranks, and make all other low-rank layers dense.

    Layers that already have the wanted rank and order are kept as they are. Meant to be followed by
    ``load_state_dict``.

    Args:
        model: the model.
        ranks: rank by name.
        splits: order of the factors by name, of convolutions whose kernel is not whole in the right factor.

    Raises:
        ValueError: if a name is missing from the model, its layer is of an unsupported type, or a rank does not fit.
    """
    _split(model, _attentions_of(model, ranks))
    for name, rank in ranks.items():
        module = dict(model.named_modules(remove_duplicate=False)).get(name)
        if module is None:
            raise ValueError(f"the model has no module named {name!r}, which the rank map gives rank {rank}")
        split = (splits or {}).get(name)
        if isinstance(module, LowRankModule):
            if (module.rank, module.split) == (rank, split):
                continue
            module = _dense(module)
        kind = low_rank_type(module)
        if kind is None:
            raise ValueError(
                f"module {name!r} is a {type(module).__name__}; a rank can be given to {_supported()} only"
            )
        reason = kind_objection(module)
        if reason and not _on_meta(module):  # a layer on the meta device is about to be loaded
            raise ValueError(f"module {name!r} cannot be given rank {rank}: {reason}")
        try:
            new = kind.like(module, rank, split=split)
        except ValueError as error:
            raise ValueError(f"module {name!r}: {error}") from error
        _copy_flags(module, new)
        replace_module(model, name, new)
    restore_dense_structure(model, keep=ranks)


def restore_dense_structure(model: nn.Module, keep: Mapping[str, int] | None = None) -> None:
    """Replace low-rank layers by dense ones that compute the same function, except those named in ``keep``.

    A layer that shares its factors with one of those is kept too.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    kept = {id(modules[name].left_factor) for name in keep or () if isinstance(modules.get(name), LowRankModule)}
    for name in modules:
        module = dict(model.named_modules(remove_duplicate=False)).get(name)
        if isinstance(module, LowRankModule) and id(module.left_factor) not in kept:
            replace_module(model, name, _dense(module))
    settle(model)


def prepare(model: nn.Module) -> None:
    """Split every ``nn.MultiheadAttention`` that can be split, so that its projections are layers.

    The parameters of what is split are copied. :func:`settle` is the way back.
    """
    owners = weight_owners(model)
    _split(
        model,
        [
            module
            for name, module in model.named_modules()
            if name and isinstance(module, nn.MultiheadAttention) and attention_objection(module, owners) is None
        ],
    )


def settle(model: nn.Module) -> None:
    """Put ``nn.MultiheadAttention`` back where no projection is low-rank.

    Inside an ``nn.TransformerEncoder`` or ``nn.TransformerEncoderLayer`` with any low-rank layer all attention modules
    stay split: their fused inference path would read the weights of its layers instead of calling them.
    """
    low_rank = [
        name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, LowRankModule)
    ]
    needed = {id(module) for module in _attentions_of(model, low_rank)}
    for module in list(model.modules()):
        if isinstance(module, SplitAttention) and id(module) not in needed:
            _put(model, module, module.to_packed())
    _set_nested_tensors(model)


def _attentions_of(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """The attention modules, split or not, that must be split when layers of these names are low-rank."""
    attentions = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, (nn.MultiheadAttention, SplitAttention))
    ]
    if not attentions:
        return []
    modules = dict(model.named_modules(remove_duplicate=False))
    scopes = {name for name, _ in attentions} | {name for name, m in modules.items() if isinstance(m, ENCODERS)}
    used = {scope for scope in scopes for name in names if _inside(name, scope)}
    found = {id(module): module for name, module in attentions if any(_inside(name, s) or name == s for s in used)}
    return list(found.values())


def _inside(name: str, scope: str) -> bool:
    return scope == "" or name.startswith(f"{scope}.")


def _split(model: nn.Module, attentions: Iterable[nn.Module]) -> None:
    """Split these attention modules; those that are split already are passed over.

    Raises:
        ValueError: if one cannot be split.
    """
    packed = [module for module in attentions if isinstance(module, nn.MultiheadAttention)]
    if not packed:
        return
    owners = weight_owners(model)
    for module in packed:
        reason = attention_objection(module, owners)
        if reason is not None and not _on_meta(module):
            raise ValueError(f"an attention module cannot be split into its projections: {reason}")
        _put(model, module, SplitAttention.from_packed(module))
    _set_nested_tensors(model)


def _set_nested_tensors(model: nn.Module) -> None:
    """Switch nested tensors off in encoders with split attention, which cannot take them, and on again without."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            split = any(isinstance(inner, SplitAttention) for inner in module.modules())
            (imitate_nested_tensors if split else use_nested_tensors)(module)


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module wherever another one hangs, with the hooks of that and with what users have put on it."""
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[child_name] = new
    carry_hooks(old, new)
    carry_extras(old, new)
    refer_to(model, old, new)


def _twins(model: nn.Module, old: nn.Module) -> list[nn.Module]:
    """Other layers that share the weight of a dense layer or the factors of a low-rank one."""
    key = "left_factor" if isinstance(old, LowRankModule) else "weight"
    shared = old._parameters.get(key)
    if shared is None:
        return []
    return [
        module
        for module in model.modules()
        if module is not old
        and module._parameters.get(key) is shared
        and (isinstance(module, LowRankModule) or low_rank_type(module) is not None)
    ]


def _dense(layer: LowRankModule) -> nn.Module:
    """The dense layer that computes the same as a low-rank one that is about to be replaced."""
    settle_parameters(layer)  # a dense layer has no factors that a hook could compute
    return layer.to_dense()


def _tied(twin: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """What takes the place of ``twin``, which shares with ``old``, once ``new`` has taken the place of that."""
    made: nn.Module
    shared: tuple[str, ...]
    dense = _dense(twin) if isinstance(twin, LowRankModule) else twin
    if isinstance(new, LowRankModule):
        kind = low_rank_type(dense)
        assert kind is not None
        made = kind.like(dense, new.rank, split=new.split)
        shared = ("left_factor", "right_factor")
    else:
        made, shared = dense, ("weight",)
    for key in shared:
        made.register_parameter(key, new._parameters[key])
    bias = twin._parameters.get("bias")
    tied_bias = bias is not None and bias is old._parameters.get("bias")
    if "bias" in made._parameters:
        made.register_parameter("bias", new._parameters.get("bias") if tied_bias else bias)
    return made.train(twin.training)


def _copy_flags(dense: nn.Module, new: LowRankModule) -> None:
    """Give a low-rank layer the mode and the ``requires_grad`` of the dense one."""
    weight, bias = dense._parameters["weight"], dense._parameters.get("bias")
    for factor in (new.left_factor, new.right_factor):
        factor.requires_grad_(weight is None or weight.requires_grad)
    if new.bias is not None and bias is not None:
        new.bias.requires_grad_(bias.requires_grad)
    new.train(dense.training)


def _on_meta(module: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters())


def _supported() -> str:
    return ", ".join(kind.__name__ for kind in LOW_RANK_OF)
