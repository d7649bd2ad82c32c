"""Do what may fail without harm, such as writing a log."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import partial

__all__ = ["best_effort"]

logger = logging.getLogger(__name__)


def best_effort(what: str, action: Callable[[], object]) -> None:
    """Call ``action``; if it fails, warn that one could not ``what``, with the reason."""
    try:
        action()
    # loggers and file systems of all kinds raise errors of all kinds
    except Exception as error:
        logger.debug("Could not %s", what, exc_info=True)
        warn = _rank_zero_warn()
        warn(f"Compression: could not {what} ({type(error).__name__}: {error})")


def _rank_zero_warn() -> Callable[[str], object]:
    """That of Lightning, which :func:`lrf_lightning.compress` does not need."""
    try:
        from lightning.pytorch.utilities import rank_zero_warn
    except ImportError:
        return partial(warnings.warn, stacklevel=4)
    return rank_zero_warn
