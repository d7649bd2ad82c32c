"""Seed the global random number generators for a while, and put them back."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["preserved", "seed_all", "seeded"]


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


@contextmanager
def preserved() -> Iterator[None]:
    """Restore all generators afterwards, also after an exception."""
    numpy = _numpy()
    python, array, cpu = random.getstate(), numpy and numpy.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if _cuda_runs() else None
    try:
        yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(array)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


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
