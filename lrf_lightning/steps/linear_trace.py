"""What a step makes of some chosen tensors, as long as it is linear in them.

Autograd could tell as well, but gradients are not recorded in an evaluation, and to record them there would show: what
a step keeps would hold graphs, in-place operations on leaves would fail, and ``numpy()`` too. So every sum, product,
mean, choice of entries or change of shape that gets a chosen tensor, or what came of one, is taken a second time with
a *shadow* of it, whose graph nobody else sees. Whatever else gets one, a square or a comparison, makes a tensor
*tainted*: what comes of that is no linear function of the chosen ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["LinearTrace"]

# names of torch's functions, of tensors' methods and of operators
SUMS = frozenset(
    """
    add add_ __add__ __radd__ __iadd__ sub sub_ subtract rsub __sub__ __rsub__ __isub__ neg negative __neg__ positive
    sum nansum mean cumsum stack cat concat concatenate hstack vstack where masked_select masked_fill masked_fill_ take
    __getitem__ __setitem__ select narrow index_select gather unbind split chunk diagonal flip roll reshape reshape_as
    view view_as flatten ravel squeeze unsqueeze expand expand_as repeat tile permute transpose t movedim atleast_1d
    clone contiguous to float double half bfloat16 type type_as cpu cuda
    """.split()  # noqa: SIM905
)
PRODUCTS = frozenset("mul mul_ multiply __mul__ __rmul__ __imul__ dot inner mv matmul __matmul__ __rmatmul__".split())  # noqa: SIM905
QUOTIENTS = frozenset("div div_ divide true_divide __truediv__ __itruediv__".split())  # noqa: SIM905
# they only look at the shape
INDEPENDENT = frozenset("zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones".split())  # noqa: SIM905


class LinearTrace:
    """Shadows of tensors, and the calls that make more of them."""

    def __init__(self) -> None:
        self._known: Any = WeakTensorKeyDictionary()  # the shadow by tensor, None if it is tainted

    def start(self, tensor: Tensor) -> Tensor | None:
        """Choose a tensor and return the leaf of its shadow, None if it has none.

        That is so inside of a function transform, for integers, and for what was made of other chosen tensors.
        """
        if tensor in self._known:
            return None
        try:
            with torch.inference_mode(False), torch.enable_grad():
                leaf = tensor.detach().clone().requires_grad_()
                self._known[tensor] = leaf.clone()  # a leaf cannot be changed in place
        except RuntimeError:
            return None
        return leaf

    def shadow_of(self, tensor: Tensor) -> Tensor | None:
        """The shadow, None if the tensor depends on no chosen one or is tainted."""
        shadow: Tensor | None = self._known.get(tensor)
        return shadow

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call a function as it is, and with shadows where arguments have them."""
        if not len(self._known):
            return function(*args, **kwargs)
        if not any(tensor in self._known for tensor in _tensors((*args, *kwargs.values()))):
            return function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        changes = name in {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"} or (
            name.endswith("_") and not name.endswith("__")
        )
        # first, because the function may change its arguments
        shadow = self._shadow(function, args, kwargs, changes) if self._is_linear(name, args, kwargs) else None
        result = function(*args, **kwargs)
        if name not in INDEPENDENT:
            made = list(_tensors((args[0] if changes and args else result,)))
            shadows = list(_tensors((shadow,)))
            for i, tensor in enumerate(made):
                self._known[tensor] = shadows[i] if len(shadows) == len(made) and shadows[i].requires_grad else None
        return result

    def _is_linear(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether a function is linear in the tensors with a shadow, and no argument is tainted."""
        tensors = list(_tensors((*args, *kwargs.values())))
        followed = [tensor for tensor in tensors if tensor in self._known]
        if kwargs.get("out") is not None or any(self._known[tensor] is None for tensor in followed):
            return False
        if name in SUMS:
            return True
        # a factor that depends on the model is not constant
        constant = not any(tensor.requires_grad for tensor in tensors if tensor not in self._known)
        if name in QUOTIENTS:
            return constant and len(followed) == 1 and args[0] is followed[0]
        return name in PRODUCTS and constant and len(followed) == 1

    def _shadow(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], changes: bool
    ) -> Any:
        """What the function makes of shadows; its plain arguments are not changed."""
        try:
            with torch.inference_mode(False), torch.enable_grad():
                taken = [self._taken(value, copy=changes and i == 0) for i, value in enumerate(args)]
                result = function(*taken, **{key: self._taken(value) for key, value in kwargs.items()})
                return taken[0] if changes else result
        except Exception:  # then nothing is known about the result
            return None

    def _taken(self, value: Any, *, copy: bool = False) -> Any:
        if isinstance(value, Tensor):
            shadow = self.shadow_of(value)
            # tensors of inference mode cannot be part of a graph
            plain = value.clone() if copy or value.is_inference() else value
            return plain if shadow is None else shadow
        if type(value) in (list, tuple):
            return type(value)(self._taken(item) for item in value)
        return value


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    """Tensors among values, and in lists and tuples among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)) and value and not isinstance(value[0], (int, float, str)):
            yield from _tensors(value)
