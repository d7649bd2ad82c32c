"""Hydra callback that collects a multirun when it is done, see :mod:`lrf_lightning.sweeps.summary`."""

from __future__ import annotations

import atexit
import logging
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

__all__ = ["SweepSummary"]

logger = logging.getLogger(__name__)


class SweepSummary(Callback):
    """Prints one table of all jobs and writes it with one picture into the folder of the sweep.

    After a job has failed, Hydra's sweepers raise its error instead of ending the multirun. The other jobs are then
    summed up when the process that has started them ends.

    Add it to an app with ``hydra.callbacks.sweep_summary._target_: lrf_lightning.sweeps.callback.SweepSummary``.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Provide for an end by an error, in this process only: launchers run jobs in others too."""
        import lrf_lightning.sweeps.plot
        import lrf_lightning.sweeps.summary  # noqa: F401 - what may start threads cannot be imported during an exit

        self._folder = Path(config.hydra.sweep.dir).absolute()
        atexit.register(self._after_failure)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Collect the sweep; a failure is a warning."""
        atexit.unregister(self._after_failure)
        _sum_up(config.hydra.sweep.dir)

    def _after_failure(self) -> None:
        if any(self._folder.glob("*/.hydra/overrides.yaml")):  # none where the very first config is wrong
            _sum_up(self._folder)


def _sum_up(folder: str | Path) -> None:
    from lrf_lightning.sweeps.summary import write_sweep

    try:
        write_sweep(folder)
    except Exception as error:  # the jobs themselves are done
        logger.warning("The sweep in %s could not be summed up (%s: %s)", folder, type(error).__name__, error)
    else:
        logger.info("The table and the picture of the sweep are %s/sweep.csv and sweep.png", folder)
