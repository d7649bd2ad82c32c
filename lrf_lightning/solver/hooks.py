"""Observe the inputs and output gradients of layers while a model runs, and leave nothing behind.

Gradients are taken with respect to the outputs of the observed layers, never with respect to weights: parameters are
frozen for the time being, and the graph starts at the first observed layer. That makes the pass cheaper than a training
step and lets frozen layers be observed too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["frozen_parameters", "observe_gradients", "observe_inputs"]

OnGradient = Callable[[Tensor], None]
OnForward = Callable[[str, Tensor, Tensor], "OnGradient | None"]
OnInput = Callable[[str, Tensor], None]


@contextmanager
def observe_gradients(layers: Mapping[str, nn.Module], on_forward: OnForward) -> Iterator[None]:
    """Call ``on_forward(name, input, output)`` at every call of a layer, and its result with the output's gradient.

    Both tensors are detached. What runs downstream gets a copy of the output, so that an in-place activation does not
    change the observed one.
    """

    def hook(name: str) -> Callable[[nn.Module, Any, Any], Tensor]:
        def observe(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            on_gradient = on_forward(name, inputs[0].detach(), output.detach())
            if on_gradient is None:
                return output
            if not output.requires_grad:
                output.requires_grad_()

            def receive(grad: Tensor) -> None:
                on_gradient(grad.detach())

            output.register_hook(receive)  # type: ignore[no-untyped-call]
            return output.clone()

        return observe

    handles = [module.register_forward_hook(hook(name)) for name, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def observe_inputs(layers: Mapping[str, nn.Module], on_input: OnInput) -> Iterator[None]:
    """Call ``on_input(name, input)`` before every call of a layer."""

    def hook(name: str) -> Callable[[nn.Module, Any], None]:
        def observe(module: nn.Module, inputs: Any) -> None:
            on_input(name, inputs[0].detach())

        return observe

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
