"""Finish runs of W&B in processes that are forked, as ``ddp_notebook`` and ``ddp_fork`` do.

Such a process ends without the exit handlers of Python, on which W&B relies to send what it still holds: without a call
of ``finish`` nothing of the run would be left. The handlers of :mod:`multiprocessing` do run.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing import util
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger

from lrf_lightning.best_effort import best_effort

__all__ = ["finish_before_exit"]


def finish_before_exit(trainer: Trainer) -> None:
    """Let this process finish the runs that it has opened when it ends; in processes that were not forked do nothing.

    Can be called repeatedly. It comes after the ``teardown`` of all callbacks and loggers.
    """
    if multiprocessing.parent_process() is None or not trainer.is_global_zero:
        return
    sinks = [sink for sink in trainer.loggers if isinstance(sink, WandbLogger)]
    if sinks:
        util.Finalize(None, _finish, (sinks,), exitpriority=0)


def _finish(sinks: list[WandbLogger]) -> None:
    failed = sys.exc_info()[0] is not None  # the handlers run while the process's exception is on its way
    for sink in sinks:
        run: Any = sink._experiment
        # a run of the process that was left behind is its own business; a second call of finish does nothing
        if run is not None and getattr(run, "_init_pid", None) == os.getpid():
            best_effort("finish the run of W&B", lambda: run.finish(exit_code=int(failed)))  # noqa: B023 (called at once)
