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
    """Meanwhile, the environment variable ``WANDB_RUN_GROUP`` is named after the folder of the sweep.

    W&B itself reads it only once in a process, so it is better handed to a ``WandbLogger`` as
    ``group: ${oc.env:WANDB_RUN_GROUP,null}``. Outside of a multirun nothing changes, and what the user set stays.
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
    from hydra.utils import to_absolute_path

    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return "/".join(Path(to_absolute_path(HydraConfig.get().sweep.dir)).parts[-2:])
