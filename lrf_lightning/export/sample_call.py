"""A sample that says how a model is called: with which arguments, and which of their tensors have a batch dimension."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["Sample", "SampleCall", "find_sample"]

logger = logging.getLogger(__name__)

Sample = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


class SampleCall:
    """The arguments of one call of a model.

    The first dimension of the first tensor is the batch; tensors whose first dimension is as long have it too.

    Args:
        sample: a Tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.

    Raises:
        ValueError: if there is no tensor with a batch dimension in it.
    """

    def __init__(self, sample: Sample) -> None:
        self._by_name = isinstance(sample, Mapping)
        arguments = dict(sample) if isinstance(sample, Mapping) else sample
        arguments = tuple(arguments) if isinstance(arguments, (tuple, list)) else arguments
        if isinstance(arguments, Tensor):
            arguments = (arguments,)
        self._leaves, self._spec = pytree.tree_flatten(arguments)
        sizes = [len(tensor) for tensor in self.tensors() if tensor.dim()]
        if not sizes or not sizes[0]:
            raise ValueError(
                f"sample is a {type(sample).__name__} without a batch; give a Tensor (batch, ...), a tuple of "
                "positional or a dict of keyword arguments"
            )
        self.batch_size = sizes[0]
        self._batched = [
            isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == self.batch_size for leaf in self._leaves
        ]

    @property
    def args(self) -> tuple[Any, ...]:
        """The positional arguments."""
        return () if self._by_name else pytree.tree_unflatten(self._leaves, self._spec)

    @property
    def kwargs(self) -> dict[str, Any]:
        """The keyword arguments."""
        return pytree.tree_unflatten(self._leaves, self._spec) if self._by_name else {}

    def tensors(self) -> list[Tensor]:
        """All tensors, in the order of the arguments."""
        return [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]

    def resized(self, batch_size: int) -> SampleCall:
        """The same call with another number of samples: the first ones, all of them again and again if need be."""
        index = torch.arange(batch_size, device="cpu") % self.batch_size
        new = copy.copy(self)
        new.batch_size = batch_size
        new._leaves = [
            leaf[index.to(leaf.device)] if batched else leaf
            for leaf, batched in zip(self._leaves, self._batched, strict=True)
        ]
        return new

    def to(self, device: torch.device | str) -> SampleCall:
        """The same call with its tensors on a device."""
        new = copy.copy(self)
        new._leaves = [leaf.detach().to(device) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        return new

    def dynamic_shapes(self, batch: Any) -> Any:
        """``batch`` for the first dimension of every tensor that has it, in the form that ``torch.export`` wants."""
        return pytree.tree_unflatten([{0: batch} if batched else None for batched in self._batched], self._spec)


def find_sample(module: nn.Module, batches: Iterable[Any]) -> Sample | None:
    """What the forward of a LightningModule can be called with.

    That is its ``example_input_array``, or else the inputs of the first batch: its first entry, or of a mapping those
    entries that the forward has arguments for.

    Returns:
        None if that fails: no sample is worth the result of a solve.
    """
    example = getattr(module, "example_input_array", None)
    if example is not None:
        found: Sample = example
        return found
    try:
        batch = next(iter(batches))
        if isinstance(batch, Mapping):
            names = inspect.signature(module.forward).parameters
            return {name: value for name, value in batch.items() if name in names}
        return (batch[0] if isinstance(batch, (tuple, list)) else batch,)
    except Exception:  # user code
        logger.debug("Could not find a sample", exc_info=True)
        return None
