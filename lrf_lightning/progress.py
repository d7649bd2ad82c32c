"""Progress bars for the long stages of a solve."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

__all__ = ["stage_progress"]

logger = logging.getLogger(__name__)

StageProgress = Callable[[str, int, int], None]


@contextmanager
def stage_progress(*, enabled: bool = True, console: Console | None = None) -> Iterator[StageProgress]:
    """Yield a callable ``progress(stage, done, total)`` that draws one bar per stage.

    Args:
        enabled: whether bars are drawn; the stages are logged at level INFO either way.
        console: where to draw; standard error by default. A console that is no terminal shows the bars once, at the
            end.
    """
    bars = Progress(
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console or Console(stderr=True),
        disable=not enabled,
    )
    tasks: dict[str, TaskID] = {}

    def finish(stage: str) -> None:
        """A stage without a known length, or one that ended early, is shown as complete once the next one starts."""
        task = next(task for task in bars.tasks if task.id == tasks[stage])
        done = max(int(task.completed), 1)
        bars.update(tasks[stage], total=done, completed=done)
        bars.stop_task(tasks[stage])

    def progress(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            logger.info("Compression: %s", stage)
            for earlier in tasks:
                finish(earlier)
            tasks[stage] = bars.add_task(stage, total=total or None)
        bars.update(tasks[stage], completed=done, total=total or None)

    with bars:
        yield progress
        for stage in tasks:
            finish(stage)
