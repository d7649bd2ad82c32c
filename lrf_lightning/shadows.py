"""How tensors depend on some chosen ones, in a graph of its own.

Autograd could tell as well, but gradients are not recorded in an evaluation, and to record them there would show: what
a step keeps would hold graphs, in-place operations on leaves would fail, and ``numpy()`` too. So every function that
gets a chosen tensor, or what came of one, is called a second time with a *shadow* of it, whose graph nobody else sees.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["Shadows", "is_linear"]

# functions of autograd that are linear in each argument, divisors left out; products of two tensors are noticed by
# their derivatives, which require a gradient
_NAMES = """
AccumulateGrad Add Addcmul Addmm Addmv Alias AsStrided Bmm Cat Clone Copy CopyBackwards CopySlices Cumsum Diagonal Div
Dot Expand Gather Index IndexAdd IndexPut IndexSelect Lift MaskedFill MaskedSelect Mean Mm Mul Mv Nansum Neg Permute
Repeat Reshape ReshapeAlias Rsub Scatter ScatterAdd Select Slice Split Squeeze Stack Sub Sum T ToCopy Transpose Unbind
UnsafeView Unsqueeze View Where
"""
LINEAR = frozenset(_NAMES.split())


class Shadows:
    """Shadows of tensors by identity, and the calls that make more of them."""

    def __init__(self) -> None:
        self._pairs: dict[int, tuple[Tensor, Tensor]] = {}  # both, since the number of a lost tensor is given anew

    def start(self, tensor: Tensor) -> Tensor | None:
        """Choose a tensor and return the leaf of its shadow, None where there can be no graph."""
        try:
            with torch.inference_mode(False), torch.enable_grad():
                leaf = tensor.detach().clone().requires_grad_()
                self._pairs[id(tensor)] = tensor, leaf.clone()  # a leaf cannot be changed in place
        except RuntimeError:  # inside of a function transform, or a tensor of integers
            return None
        return leaf

    def of(self, tensor: Tensor) -> Tensor | None:
        """The shadow of a tensor, None if it depends on no chosen one."""
        pair = self._pairs.get(id(tensor))
        return None if pair is None else pair[1]

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call a function as it is, and its shadow where an argument has one."""
        if not self._pairs:
            return function(*args, **kwargs)
        given, structure = tree_flatten((args, dict(kwargs)))
        shadows = [self.of(value) if isinstance(value, Tensor) else None for value in given]
        if all(shadow is None for shadow in shadows):
            return function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        changes = name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
        shadow: Any = None
        if name != "backward" and kwargs.get("out") is None:
            try:  # first, because the function may change its arguments
                with torch.inference_mode(False), torch.enable_grad():
                    others = [v.clone() if changes and isinstance(v, Tensor) else v for v in given]
                    taken = [other if own is None else own for own, other in zip(shadows, others, strict=True)]
                    shadow_args, shadow_kwargs = tree_unflatten(taken, structure)
                    shadow = function(*shadow_args, **shadow_kwargs)
                    shadow = shadow_args[0] if changes else shadow
            except Exception:  # then nothing is known about the result
                shadow = None
        result = function(*args, **kwargs)
        self._note(args[0] if changes and args else result, shadow)
        return result

    def _note(self, result: Any, shadow: Any) -> None:
        found, shadows = tree_flatten(result)[0], tree_flatten(shadow)[0]
        if len(found) != len(shadows):
            shadows = [None] * len(found)
        for one, own in zip(found, shadows, strict=True):
            if isinstance(one, Tensor):
                self._pairs.pop(id(one), None)
                if isinstance(own, Tensor) and own.requires_grad:
                    self._pairs[id(one)] = one, own


def is_linear(shadow: Tensor) -> bool:
    """Whether a graph holds nothing but sums, products, means, choices of entries and changes of shape."""
    waiting, seen = [shadow.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if re.sub(r"Backward\d*$", "", node.name().rpartition("::")[2]) not in LINEAR:
            return False
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
    return True
