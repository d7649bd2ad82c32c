"""Models in which nothing is compiled by ``torch.compile``."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

__all__ = ["UncompiledModule", "is_compiled", "uncompile_children"]


class UncompiledModule(nn.Module):
    """Stands in for the result of ``torch.compile`` in a copy, with the same names of parameters, and runs eagerly.

    Hooks on layers are not seen by code that was compiled before they were set, and every candidate of the solver
    would be compiled anew.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module
        self.training = module.training

    def __getattr__(self, name: str) -> Any:
        """Look further in the module, as a compiled module does."""
        if name == "_orig_mod":
            return self.__dict__["_modules"]["_orig_mod"]
        if name.startswith("__"):  # a copy made by the inner module's own __deepcopy__ would lose this one
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._orig_mod, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        return self._orig_mod(*args, **kwargs)


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is what ``torch.compile`` made of another one."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")  # importing it takes seconds
    return compiler is not None and isinstance(module, compiler.OptimizedModule)


def uncompile_children(model: nn.Module) -> None:
    """Replace compiled modules within a model by :class:`UncompiledModule`."""
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child is not None and is_compiled(child):
                module._modules[name] = UncompiledModule(child.get_submodule("_orig_mod"))
