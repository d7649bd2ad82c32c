"""Observe the inputs and output gradients of layers while a model runs, and leave nothing behind.

Gradients are taken with respect to the outputs of the observed layers, never with respect to weights: parameters are
frozen for the time being, and the graph starts at the first observed layer. That makes the pass cheaper than a training
step and lets frozen layers be observed too.

Modules that share a weight are observed as one layer, under one name.

Checkpointed parts of a model run again during the backward pass. Observers of gradients are called again as well, since
with ``use_reentrant=True`` only the second call has a graph; :func:`goes_back` tells them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = [
    "HeldGradients",
    "first_tensor",
    "frozen_parameters",
    "goes_back",
    "in_function_transform",
    "observe_gradients",
    "observe_inputs",
]

OnGradient = Callable[[Tensor], None]
Key = TypeVar("Key")
OnForward = Callable[[Key, Tensor, Tensor], "OnGradient | None"]
OnInput = Callable[[Key, Tensor], None]
Layers = Mapping[Key, "nn.Module | Sequence[nn.Module]"]


@dataclass
class HeldGradients:
    """Gradients that wait for their scale: in float16 small ones vanish unless the loss is multiplied with something.

    Attributes:
        half: whether an observed output is in float16.
        calls: the observers of gradients, each with the one it shall be given.
    """

    half: bool = False
    calls: list[tuple[OnGradient, Tensor]] = field(default_factory=list)


@contextmanager
def observe_gradients(layers: Layers[Key], on_forward: OnForward[Key]) -> Iterator[HeldGradients]:
    """Call ``on_forward(name, input, output)`` at every call of a layer, and its result with the output's gradient.

    Both tensors are detached. What runs downstream gets a copy of the output, so that an in-place activation does not
    change the observed one. Where several modules share a weight, outputs are observed as if all of them had the bias
    of the first.

    Yields what is held back where an output is in float16, instead of being handed to the observers.

    Args:
        layers: module, or modules that share a weight, by name.
        on_forward: observer; the callable it returns, if any, is given the gradient.
    """
    held = HeldGradients()

    def hook(name: Key, first: nn.Module) -> Callable[[nn.Module, Any, Any, Any], Tensor]:
        def observe(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            on_gradient = on_forward(name, first_tensor(name, args, kwargs), _as_if(first, module, output.detach()))
            if on_gradient is None:
                return output
            held.half |= output.dtype == torch.float16
            if not output.requires_grad:
                output.requires_grad_()

            def receive(grad: Tensor) -> None:
                if held.half:
                    held.calls.append((on_gradient, grad.detach()))
                else:
                    on_gradient(grad.detach())

            output.register_hook(receive)  # type: ignore[no-untyped-call]
            return output.clone()

        return observe

    handles = [
        # before hooks of the user, which may change the output
        module.register_forward_hook(hook(name, modules[0]), with_kwargs=True, prepend=True)
        for name, modules in _sequences(layers)
        for module in modules
    ]
    try:
        yield held
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def observe_inputs(layers: Layers[Key], on_input: OnInput[Key]) -> Iterator[None]:
    """Call ``on_input(name, input)`` before every call of a layer.

    Args:
        layers: module, or modules that share a weight, by name.
        on_input: observer.
    """

    def hook(name: Key) -> Callable[[nn.Module, Any, Any], None]:
        def observe(module: nn.Module, args: Any, kwargs: Any) -> None:
            on_input(name, first_tensor(name, args, kwargs))

        return observe

    handles = [
        module.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, modules in _sequences(layers)
        for module in modules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def goes_back() -> bool:
    """Whether a backward pass is running in this thread, so that a module that is called now was called before."""
    # what torch.utils.checkpoint asks itself
    return bool(torch._C._current_graph_task_id() != -1)


def in_function_transform() -> bool:
    """Whether torch.func transforms what runs so that tensors must not leave it: by more than one ``grad``."""
    functorch = torch._C._functorch
    levels = functorch.get_interpreter_stack() or ()
    return len(levels) > 1 or any(level.key() != functorch.TransformType.Grad for level in levels)


@contextmanager
def frozen_parameters(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let no parameter of the modules ask for a gradient, and restore every flag afterwards."""
    flags = {parameter: parameter.requires_grad for module in modules for parameter in module.parameters()}
    for parameter in flags:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def _sequences(layers: Layers[Key]) -> Iterator[tuple[Key, Sequence[nn.Module]]]:
    for name, modules in layers.items():
        yield name, [modules] if isinstance(modules, nn.Module) else modules


def first_tensor(name: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The layer's input, which some models pass by keyword."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value.detach()
    raise TypeError(f"layer {name!r} was called without a tensor")


def _as_if(first: nn.Module, module: nn.Module, output: Tensor) -> Tensor:
    """The output of ``module`` with the bias of ``first``, which shares its weight."""
    ours, theirs = module._parameters.get("bias"), first._parameters.get("bias")
    if module is first or ours is theirs:
        return output
    trailing = (1,) * len(module.kernel_size) if isinstance(module, nn.modules.conv._ConvNd) else ()
    for bias, sign in ((ours, -1), (theirs, 1)):
        if bias is not None:
            output = output + sign * bias.detach().reshape(-1, *trailing)
    return output
