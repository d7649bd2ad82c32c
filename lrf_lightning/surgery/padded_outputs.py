"""What ``nn.TransformerEncoder`` does at padded positions when it runs on nested tensors, for one that cannot.

In evaluation mode and without gradients torch packs a batch with a padding mask into a nested tensor and pads the
result with zeros. A model that reads those positions, in a mean over all of them for instance, depends on it. Split
attention takes no nested tensors, so its encoder computes padded positions like others, and they are set to zero
afterwards, compiled and exported too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["imitate_nested_tensors", "use_nested_tensors"]


class _ZeroPadding:
    """Forward hook of an encoder's last layer, before the norm.

    It asks what ``nn.TransformerEncoder.forward`` asks, but not whether fused paths are allowed and whether it is
    compiled: the results of a model shall not depend on that.
    """

    def __init__(self, mask_check: bool) -> None:
        self.mask_check = mask_check

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
        mask: Tensor | None = kwargs.get("src_key_padding_mask")
        plain = kwargs.get("src_mask") is None and output.dim() == 3
        differentiable = torch.is_grad_enabled() and output.requires_grad
        if mask is None or not plain or layer.training or torch.is_autocast_enabled() or differentiable:
            return output
        padded = mask if mask.dtype == torch.bool else mask != 0
        if self.mask_check:
            padded = padded & (padded[:, 1:] >= padded[:, :-1]).all()  # nested tensors are padded at the end alone
        return output.masked_fill(padded[:, :, None], 0.0)


def imitate_nested_tensors(encoder: nn.TransformerEncoder) -> None:
    """Keep an encoder from nested tensors, and let its results be as if it used them where it did."""
    if getattr(encoder, "use_nested_tensor", False) and len(encoder.layers):
        encoder.use_nested_tensor = False
        hook = _ZeroPadding(getattr(encoder, "mask_check", True))
        encoder.layers[-1].register_forward_hook(hook, with_kwargs=True, prepend=True)


def use_nested_tensors(encoder: nn.TransformerEncoder) -> None:
    """Undo :func:`imitate_nested_tensors`."""
    if not len(encoder.layers):
        return
    last = encoder.layers[-1]
    for key, hook in list(last._forward_hooks.items()):
        if isinstance(hook, _ZeroPadding):
            del last._forward_hooks[key]
            last._forward_hooks_with_kwargs.pop(key, None)
            encoder.use_nested_tensor = True
