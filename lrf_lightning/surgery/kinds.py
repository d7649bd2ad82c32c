"""Which modules have a low-rank stand-in, and why a module that looks like one of them has none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from lrf_lightning.modules import (
    LowRankConv1d,
    LowRankConv2d,
    LowRankConv3d,
    LowRankConvTranspose1d,
    LowRankConvTranspose2d,
    LowRankConvTranspose3d,
    LowRankEmbedding,
    LowRankLinear,
    LowRankModule,
    LowRankTransposedLinear,
)

__all__ = [
    "CONVOLUTIONS",
    "Owner",
    "attention_objection",
    "is_matrix",
    "is_quantized",
    "kind_objection",
    "low_rank_type",
    "reads_transposed",
    "same_geometry",
    "weight_owners",
]

LOW_RANK_OF: dict[type[nn.Module], type[LowRankModule]] = {
    nn.Linear: LowRankLinear,
    nn.Conv1d: LowRankConv1d,
    nn.Conv2d: LowRankConv2d,
    nn.Conv3d: LowRankConv3d,
    nn.ConvTranspose1d: LowRankConvTranspose1d,
    nn.ConvTranspose2d: LowRankConvTranspose2d,
    nn.ConvTranspose3d: LowRankConvTranspose3d,
    nn.Embedding: LowRankEmbedding,
}

# what their instances have
ATTRIBUTES: dict[type[nn.Module], frozenset[str]] = {
    kind: frozenset(vars(kind(*([1] * (2 if kind in (nn.Linear, nn.Embedding) else 3)), device="meta")))
    for kind in LOW_RANK_OF
}

ATTENTION_ATTRIBUTES = frozenset(vars(nn.MultiheadAttention(1, 1, device="meta")))
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# of other libraries, with the forward of torch's linear layer in other words; by name, so that they are not imported
LINEAR = frozenset(
    {
        "timm.layers.linear.Linear",
        "torch_geometric.nn.dense.linear.Linear",
        "transformers.models.falcon.modeling_falcon.FalconLinear",
    }
)
# what others leave on any layer: transformers and timm their marks, the solver a forward that observes, torch what
# layer.compile() has made
MARKS = frozenset({"_is_hf_initialized", "_no_weight_decay", "_no_reinit", "forward", "_compiled_call_impl"})
# what a subclass may define without being another layer: how it is made, and what Python writes into every class
HARMLESS = frozenset(
    {"__init__", "reset_parameters", "extra_repr", "__repr__", "__constants__", "__doc__", "__module__", "__qualname__"}
    | {"__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__", "__parameters__"}
    | {"__static_attributes__", "__firstlineno__", "__orig_bases__", "__slots__"}
)
TRANSPOSED_LINEAR = "transformers.pytorch_utils.Conv1D"

Owner = tuple[str, str, nn.Module]  # name of the module, name of its parameter, the module


def low_rank_type(module: nn.Module) -> type[LowRankModule] | None:
    """The class that stands in for a dense module, None if there is none.

    Of subclasses only those have one that add nothing but another initialisation.
    """
    kind = type(module)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name == TRANSPOSED_LINEAR:
        return LowRankTransposedLinear
    if name in LINEAR:
        return LowRankLinear
    return next((LOW_RANK_OF[base] for base in kind.__mro__ if base in LOW_RANK_OF and _acts_as(module, base)), None)


def _acts_as(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a layer is no more than one of its base class, so that nothing can miss what another one lacks."""
    kind = type(module)
    if kind is base:
        return True
    classes = [cls for cls in kind.__mro__ if cls not in base.__mro__]
    changed = {
        name
        for cls in classes
        for name, value in vars(cls).items()
        if hasattr(base, name) or not isinstance(value, staticmethod)
    }
    return (
        changed <= HARMLESS
        and vars(module).keys() <= ATTRIBUTES[base] | MARKS
        and module._parameters.keys() <= {"weight", "bias"}
        and not module._buffers
        and not module._modules
    )


def kind_objection(module: nn.Module) -> str | None:
    """Why a module with a weight cannot be factorized, whatever it shares and wherever it hangs; None if it can."""
    if isinstance(module, LowRankModule):
        return "is low-rank already"
    if parametrize.is_parametrized(module):
        return "is parametrized (parametrize.remove_parametrizations makes it a plain layer)"
    if is_quantized(module):
        return "is quantized"
    kind = low_rank_type(module)
    if kind is None:
        return _unsupported(module)
    if "forward" in vars(module):
        return "has a forward of its own, which replaces that of its class"
    if getattr(module, "bias", None) is not None and module._parameters.get("bias") is None:
        return "its bias is no parameter (remove pruning first)"
    if "weight" not in module._parameters:
        return "its weight is computed from other parameters (remove weight norm, spectral norm or pruning first)"
    return weight_objection(module._parameters["weight"]) or kind.objection(module)


def _unsupported(module: nn.Module) -> str:
    """Names the class, in full where a layer of torch has the same name, or the parameters of what is no layer."""
    kind = type(module)
    plain = [name for name, parameter in module._parameters.items() if is_matrix(parameter)]
    if plain and not any("weight" in name for name in plain):
        shown = ", ".join(plain[:4]) + (f" and {len(plain) - 4} more" if len(plain) > 4 else "")
        return f"holds plain parameters ({shown}) instead of layers, which is not supported"
    torch_names = {known.__name__ for known in LOW_RANK_OF}
    name = f"{kind.__module__}.{kind.__qualname__}" if kind.__name__ in torch_names else kind.__name__
    return f"{name} is not supported"


def is_matrix(parameter: Tensor | None) -> bool:
    """Whether a parameter has a size above 1 in two dimensions at least, or might have: lazy ones have no size yet."""
    if parameter is None:
        return False
    return isinstance(parameter, UninitializedParameter) or sum(size > 1 for size in parameter.shape) >= 2


def weight_objection(weight: Tensor | None) -> str | None:
    """Why a weight cannot be factorized, None if it is a plain dense floating-point parameter."""
    if weight is None or isinstance(weight, UninitializedParameter):
        return "its weight is not initialised"
    if type(weight) is not nn.Parameter or type(weight.data) is not torch.Tensor:
        return f"its weight is a {type(weight if type(weight) is not nn.Parameter else weight.data).__name__}"
    if weight.is_meta or weight.layout != torch.strided or not weight.is_floating_point():
        return f"its weight is not a dense floating-point tensor ({weight.layout}, {weight.dtype}, {weight.device})"
    return None


def attention_objection(attention: nn.MultiheadAttention, owners: dict[int, list[Owner]]) -> str | None:
    """Why an ``nn.MultiheadAttention`` cannot be split into projections, None if it can."""
    if type(attention) is not nn.MultiheadAttention:
        return f"{type(attention).__name__} is not supported"
    out_proj = attention.out_proj
    if reason := _instance_objection(attention):
        return reason
    if parametrize.is_parametrized(attention) or parametrize.is_parametrized(out_proj):
        return "is parametrized"
    weights = [attention.in_proj_weight]
    if attention.in_proj_weight is None:
        weights = [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
    if not isinstance(out_proj, nn.Linear) or "weight" not in out_proj._parameters:
        return f"its out_proj is a {type(out_proj).__name__}"
    for weight in (*weights, out_proj.weight):
        if reason := weight_objection(weight):
            return reason
    for parameter in attention.parameters():
        if len(owners.get(id(parameter), ())) > 1:
            return "its parameters are shared with another module"
    return None


def _instance_objection(attention: nn.MultiheadAttention) -> str | None:
    """Whether somebody has put something on the instance that a split one would lack."""
    out_proj = attention.out_proj
    if "forward" in vars(attention) or "forward" in vars(out_proj):
        return "has a forward of its own, which replaces that of its class"
    own = (vars(attention).keys() | attention._buffers.keys()) - ATTENTION_ATTRIBUTES - MARKS
    names = sorted(own or out_proj._buffers)
    return f"has attributes of its own ({', '.join(names[:3])})" if names else None


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is one of torch's quantized layers, whose weight is packed and no parameter."""
    return ".quantized" in type(module).__module__ and hasattr(type(module), "weight")


def weight_owners(model: nn.Module) -> dict[int, list[Owner]]:
    """All modules that hold a parameter, by the parameter's identity."""
    owners: dict[int, list[Owner]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((name, key, module))
    return owners


def reads_transposed(first: nn.Module, second: nn.Module) -> bool:
    """Whether layers that share a weight do so as embedding and output layer: inputs of one, outputs of the other."""
    return {type(first), type(second)} == {nn.Embedding, nn.Linear}


def same_geometry(first: nn.Module, second: nn.Module) -> bool:
    """Whether two dense layers read their weight in the same way, so that their rows mean the same."""
    names = "kernel_size stride padding output_padding dilation groups padding_mode"

    def geometry(module: nn.Module) -> list[Any]:
        return [getattr(module, name, None) for name in names.split()]

    return type(first) is type(second) and geometry(first) == geometry(second)
