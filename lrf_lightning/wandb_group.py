"""The runs of one Hydra multirun as one group of W&B."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["grouped_by_sweep"]

VARIABLE = "WANDB_RUN_GROUP"


@contextmanager
def grouped_by_sweep() -> Iterator[None]:
    """Meanwhile, runs that are opened without a group belong to one that is named after the folder of the sweep.

    Outside of a multirun nothing changes, and a group that the user chose, as ``WANDB_RUN_GROUP`` or as the argument
    ``group`` of the ``WandbLogger``, is respected.
    """
    group = _sweep()
    if group is None or os.environ.get(VARIABLE):
        yield
        return
    os.environ[VARIABLE] = group
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)


def _sweep() -> str | None:
    """The last two parts of the sweep's folder, such as ``digits/2030-01-31_12-00-00``; None outside of a multirun."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return "/".join(Path(HydraConfig.get().sweep.dir).absolute().parts[-2:])
