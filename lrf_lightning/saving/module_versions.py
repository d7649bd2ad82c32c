"""Versions of modules in a state dict, which torch keeps in an attribute that copies and files of other formats lose.

Some classes ask for their version while they load, as torchvision's MNASNet and torch's batch norm do.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["with_versions", "without_prefix"]


def with_versions(state: Mapping[str, Any], model: nn.Module) -> OrderedDict[str, Any]:
    """A copy of a state dict with its versions, or with those of a model that wrote its like, where it has none."""
    return _with(state, getattr(state, "_metadata", None) or getattr(model.state_dict(), "_metadata", None))


def without_prefix(state: Mapping[str, Any], prefix: str) -> OrderedDict[str, Any]:
    """The entries behind a prefix such as ``"model."``, or all behind ``""``, with their versions if there are any."""
    versions = getattr(state, "_metadata", None)
    if versions is not None and prefix:
        outer = prefix.rstrip(".")
        versions = {
            name[len(prefix) :]: value for name, value in versions.items() if name == outer or name.startswith(prefix)
        }
    return _with({name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}, versions)


def _with(state: Mapping[str, Any], versions: Any) -> OrderedDict[str, Any]:
    found: Any = OrderedDict(state)
    if versions is not None:
        found._metadata = versions
    result: OrderedDict[str, Any] = found
    return result
