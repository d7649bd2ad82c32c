"""Hydra callback that collects a multirun when it is done, see :mod:`lrf_lightning.sweeps.summary`."""

from __future__ import annotations

import logging
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

__all__ = ["SweepSummary"]

logger = logging.getLogger(__name__)


class SweepSummary(Callback):
    """Prints one table of all jobs and writes it with one picture into the folder of the sweep.

    Add it to an app with ``hydra.callbacks.sweep_summary._target_: lrf_lightning.sweeps.callback.SweepSummary``.
    """

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Collect the sweep; a failure is a warning."""
        from lrf_lightning.sweeps.summary import write_sweep

        folder = config.hydra.sweep.dir
        try:
            write_sweep(folder)
        except Exception as error:  # the jobs themselves are done
            logger.warning("The sweep in %s could not be summed up (%s: %s)", folder, type(error).__name__, error)
        else:
            logger.info("The table and the picture of the sweep are %s/sweep.csv and sweep.png", folder)
