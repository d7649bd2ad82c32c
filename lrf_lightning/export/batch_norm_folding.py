"""Put batch norm into the layer before it, for inference.

In evaluation mode batch norm multiplies every channel by ``weight / sqrt(running_var + eps)`` and adds a constant. A
linear map before it can do both: the scale goes into the rows of the weight, of a low-rank layer into the rows of the
left factor (the right one does not see the channels of the output), the constant into the bias. The arithmetic is
:func:`torch.nn.utils.fuse_conv_bn_weights`.

A batch norm is only folded where the graph of a call, traced by ``torch.fx``, proves that it alone reads the layer's
output, and that nothing else uses either of them or their parameters.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections import Counter
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from lrf_lightning.copies.model_copy import copied_model
from lrf_lightning.export.sample_call import Sample, SampleCall
from lrf_lightning.modules import (
    LowRankConv1d,
    LowRankConv2d,
    LowRankConv3d,
    LowRankConvTranspose1d,
    LowRankConvTranspose2d,
    LowRankConvTranspose3d,
    LowRankLinear,
    LowRankModule,
)
from lrf_lightning.surgery.kinds import weight_owners
from lrf_lightning.surgery.structure import replace_module

__all__ = ["fold_batch_norms"]

logger = logging.getLogger(__name__)

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# dimensions of a batch of the outputs; batch norm takes the second one for the channels
DIMENSIONS: dict[type[nn.Module], int] = {
    nn.Linear: 2,
    LowRankLinear: 2,
    nn.Conv1d: 3,
    nn.Conv2d: 4,
    nn.Conv3d: 5,
    LowRankConv1d: 3,
    LowRankConv2d: 4,
    LowRankConv3d: 5,
    nn.ConvTranspose1d: 3,
    nn.ConvTranspose2d: 4,
    nn.ConvTranspose3d: 5,
    LowRankConvTranspose1d: 3,
    LowRankConvTranspose2d: 4,
    LowRankConvTranspose3d: 5,
}
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def fold_batch_norms(model: nn.Module, sample: Sample) -> nn.Module:
    """A copy of a model in which batch norm is part of the layer before it, wherever that changes nothing.

    Outputs are equal up to rounding. Folded are plain ``nn.BatchNorm1d/2d/3d`` and ``nn.SyncBatchNorm`` after linear
    layers, convolutions and transposed convolutions, dense or low-rank, replaced by ``nn.Identity``. Batch norms with
    hooks, without running statistics, or of a subclass stay. If the model cannot be traced, for instance because its
    forward branches on values, nothing is folded and a warning gives the reason.

    Args:
        model: a model in evaluation mode; it is not touched.
        sample: what it is called with: a Tensor, a tuple of positional or a dict of keyword arguments. Arguments that
            are left out have their defaults in the trace as well.

    Returns:
        The copy, for inference only: it can neither be trained on as before nor loaded by ``load_compressed``.

    Raises:
        ValueError: if the model or one of its batch norms is in training mode, or the sample holds no batch.
    """
    return fold(model, SampleCall(sample))[0]


def fold(model: nn.Module, call: SampleCall) -> tuple[nn.Module, list[str]]:
    """See :func:`fold_batch_norms`; also returns the names of the batch norms that were folded."""
    norms = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    training = [name for name, module in norms if module.training]
    if model.training or training:
        raise ValueError(
            f"{training[0] if training else 'the model'} is in training mode, in which batch norm depends on the "
            "batch; call model.eval() first"
        )
    new = copied_model(model)
    if not norms:
        return new, []
    try:
        graph = _trace(copied_model(new), call)  # stand-ins may stay in attributes
    # the model's own code may raise anything when it is called with stand-ins
    except Exception as error:
        warnings.warn(
            f"batch norms are not folded, since {type(model).__name__} cannot be traced ({type(error).__name__}: "
            f"{error})",
            stacklevel=3,
        )
        return new, []
    pairs = _with_expected_inputs(copied_model(new), call, _pairs(new, graph))
    for layer_name, norm_name in pairs:
        _put_into(new.get_submodule(layer_name), new.get_submodule(norm_name))
        replace_module(new, norm_name, nn.Identity().eval())
    names = [norm_name for _, norm_name in pairs]
    logger.debug("Folded %d of %d batch norms: %s", len(names), len(norms), ", ".join(names))
    return new, names


class _Tracer(fx.Tracer):
    """Sees a low-rank layer, and any subclass of batch norm, as one call."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (LowRankModule, nn.modules.batchnorm._BatchNorm)) or super().is_leaf_module(
            m, module_qualified_name
        )


def _trace(model: nn.Module, call: SampleCall) -> fx.Graph:
    """The graph of this call; what is no tensor and what is left out is a constant in it."""
    bound = inspect.signature(model.forward).bind(*call.args, **call.kwargs)
    given = dict(bound.arguments)
    bound.apply_defaults()
    tensors = {name for name, value in given.items() if not _is_constant(value)}
    constants = {
        name: value
        for name, value in bound.arguments.items()
        if name not in tensors and not (isinstance(value, (tuple, dict)) and not value)  # *args and **kwargs
    }
    return _Tracer().trace(model, concrete_args=constants or None)


def _is_constant(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _pairs(model: nn.Module, graph: fx.Graph) -> list[tuple[str, str]]:
    """Names of layers and of the batch norms that alone follow them."""
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    owners = weight_owners(model)
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}

    def only_called(name: str, module: nn.Module) -> bool:
        """Called once, from one place, and otherwise neither used nor watched."""
        shared = any(len(owners[id(parameter)]) > 1 for parameter in module.parameters(recurse=False))
        return calls[name] == 1 and places[id(module)] == 1 and not shared and name not in read and not _watched(module)

    def seen_between(layer_name: str, norm_name: str) -> bool:
        """Whether someone's hook on a module around one of both sees what passes from the one to the other."""
        return any(_watched(model.get_submodule(name)) for name in _around(layer_name) ^ _around(norm_name))

    found = []
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and len(node.args) == 1 else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        layer_name, norm_name = str(before.target), str(node.target)
        layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
        apart = only_called(layer_name, layer) and only_called(norm_name, norm)
        if _fit(layer, norm) and apart and not seen_between(layer_name, norm_name):
            found.append((layer_name, norm_name))
    return found


def _fit(layer: nn.Module, norm: nn.Module) -> bool:
    """Whether these kinds can be made one."""
    if type(norm) not in BATCH_NORMS or norm.running_mean is None or norm.running_var is None:
        return False
    if type(layer) in TRANSPOSED and layer.groups != 1:
        return False  # torch's function takes the groups of a transposed weight for one
    weight = "left_factor" if isinstance(layer, LowRankModule) else "weight"
    if type(layer) not in DIMENSIONS or weight not in layer._parameters:
        return False
    if "forward" in vars(layer) or "forward" in vars(norm):
        return False
    channels = layer.out_features if hasattr(layer, "out_features") else layer.out_channels
    return bool(channels == norm.num_features)


def _around(name: str) -> set[str]:
    """Names of the modules that hold a module."""
    parts = name.split(".")
    return {".".join(parts[:count]) for count in range(1, len(parts))}


def _watched(module: nn.Module) -> bool:
    """Whether someone's hook sees or changes what goes in or comes out."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _with_expected_inputs(model: nn.Module, call: SampleCall, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs whose batch norm gets a batch of the layer's outputs: after a linear layer a (batch, features) one.

    Batch norm also takes (batch, length, features) and would norm over the length.
    """
    dims: dict[str, int] = {}

    def watch(name: str) -> Any:
        return lambda _, inputs: dims.update({name: inputs[0].dim()})

    hooks = [model.get_submodule(norm).register_forward_pre_hook(watch(norm)) for _, norm in pairs]
    try:
        with torch.no_grad():
            model(*call.args, **call.kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return [(layer, norm) for layer, norm in pairs if dims.get(norm) == DIMENSIONS[type(model.get_submodule(layer))]]


def _put_into(layer: nn.Module, norm: nn.Module) -> None:
    key = "left_factor" if isinstance(layer, LowRankModule) else "weight"
    fused: Any = fuse_conv_bn_weights
    weight, bias = fused(
        getattr(layer, key),
        layer.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
        transpose=type(layer) in TRANSPOSED,
    )
    layer.register_parameter(key, weight)
    layer.register_parameter("bias", bias)
