"""A sample that says how a model is called: with which arguments, and which of their tensors have a batch dimension."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Sample", "SampleCall"]

Sample = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


class SampleCall:
    """The arguments of one call of a model.

    Args:
        sample: a Tensor, a tuple or list of positional arguments, or a mapping of keyword arguments. The first
            dimension of the first tensor in it is the batch.

    Raises:
        ValueError: if there is no tensor with a batch dimension in it.
    """

    def __init__(self, sample: Sample) -> None:
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        if isinstance(sample, Mapping):
            self.kwargs = dict(sample)
        else:
            self.args = tuple(sample) if isinstance(sample, (tuple, list)) else (sample,)
        sizes = [len(tensor) for tensor in self.tensors() if tensor.dim()]
        if not sizes or not sizes[0]:
            raise ValueError(
                f"sample is a {type(sample).__name__} without a batch; give a Tensor (batch, ...), a tuple of "
                "positional or a dict of keyword arguments"
            )
        self.batch_size = sizes[0]

    def tensors(self) -> list[Tensor]:
        """All tensors, in the order of the arguments."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def resized(self, batch_size: int) -> SampleCall:
        """The same call with another number of samples: the first ones, all of them again and again if need be."""
        index = torch.arange(batch_size) % self.batch_size
        return self._mapped(lambda tensor: tensor[index.to(tensor.device)] if self._is_batch(tensor) else tensor)

    def to(self, device: torch.device | str) -> SampleCall:
        """The same call with its tensors on a device."""
        return self._mapped(lambda tensor: tensor.detach().to(device))

    def dynamic_shapes(self, batch: Any) -> Any:
        """``batch`` for the first dimension of every tensor that has it, in the form that ``torch.export`` wants."""
        return pytree.tree_map(
            lambda leaf: {0: batch} if isinstance(leaf, Tensor) and self._is_batch(leaf) else None,
            self.kwargs if self.kwargs else self.args,
        )

    def _is_batch(self, tensor: Tensor) -> bool:
        return tensor.dim() > 0 and len(tensor) == self.batch_size

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> SampleCall:
        args, kwargs = pytree.tree_map(
            lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, (self.args, self.kwargs)
        )
        return SampleCall(kwargs if kwargs else args)
