"""Seed the global random number generators for a while, and put them back."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["preserved", "seed_all", "seeded", "set_states", "states"]


def seed_all(seed: int) -> None:
    """Seed the generators of Python, NumPy, torch on the CPU, and CUDA where it runs already."""
    random.seed(seed)
    numpy = _numpy()
    if numpy is not None:
        numpy.random.seed(seed % 2**32)
    # torch.manual_seed would also leave a seed for a CUDA that starts later, which could not be taken back
    torch.default_generator.manual_seed(seed)
    if _cuda_runs():
        torch.cuda.manual_seed_all(seed)


def states() -> list[Any]:
    """The states of all generators, for :func:`set_states`."""
    numpy = _numpy()
    return [
        random.getstate(),
        None if numpy is None else numpy.random.get_state(),
        torch.get_rng_state(),
        torch.cuda.get_rng_state_all() if _cuda_runs() else None,
    ]


def set_states(found: list[Any]) -> None:
    """Put all generators back into states that :func:`states` gave."""
    python, array, cpu, cuda = found
    random.setstate(python)
    numpy = _numpy()
    if numpy is not None and array is not None:
        numpy.random.set_state(array)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)


@contextmanager
def preserved() -> Iterator[None]:
    """Restore all generators afterwards, also after an exception."""
    before = states()
    try:
        yield
    finally:
        set_states(before)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run with seeded generators and restore them afterwards."""
    with preserved():
        seed_all(seed)
        yield


def _cuda_runs() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _numpy() -> Any:
    # torch works without NumPy, and imports it where it is installed
    return sys.modules.get("numpy")
