"""A clock that lets extra work be done while it takes no more than its share of the time of a training."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping

from lightning.pytorch.utilities import rank_zero_warn

__all__ = ["Clock"]

logger = logging.getLogger(__name__)


class Clock:
    """Times pieces of work, decides which may be done, and never lets one fail the training.

    Args:
        shares: by the name of the work the largest time that it may take, over the time that passes without any of it.
        expected: seconds that work is taken for before it was done once, by its name.
        now: the time in seconds.

    Attributes:
        costs: seconds that each piece of work took the last time.
        taken: seconds that each piece of work took in all.
    """

    def __init__(
        self,
        shares: Mapping[str, float],
        expected: Mapping[str, float] | None = None,
        *,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.shares, self.expected, self.now = dict(shares), dict(expected or {}), now
        self.started = now()
        self.costs: dict[str, float] = {}
        self.taken: dict[str, float] = {}
        self._closed: set[str] = set()

    @property
    def spent(self) -> float:
        """Seconds that all work took."""
        return sum(self.taken.values())

    @property
    def elapsed(self) -> float:
        """Seconds that have passed without the work."""
        return self.now() - self.started - self.spent

    @property
    def share(self) -> float:
        """Time taken over the time that passed without it."""
        return self.spent / max(self.elapsed, 1e-9)

    def due(self, wanted: Iterable[str], *, grace: float = 0.0) -> list[str]:
        """What may be done now, if it takes as long as the last time.

        Args:
            wanted: names of work.
            grace: seconds that a piece of work may take whatever its share.
        """
        return [what for what in wanted if what not in self._closed and self._fits(what, grace)]

    def _fits(self, what: str, grace: float) -> bool:
        cost = self.costs.get(what, self.expected.get(what, 0.0))
        return cost <= grace or self.taken.get(what, 0.0) + cost <= self.shares[what] * self.elapsed

    def close(self, *what: str) -> None:
        """Never do it again."""
        self._closed |= set(what)

    def run(self, what: str, action: Callable[[], object]) -> None:
        """Do it and take its time; what fails is a warning, and is not done again."""
        if what in self._closed:
            return
        began = self.now()
        try:
            action()
        except Exception as error:  # user code, data of all kinds, memory: none of it shall cost the training
            logger.debug("Could not %s", what, exc_info=True)
            rank_zero_warn(f"RankMonitor could not {what} ({type(error).__name__}: {error}); it will not try again")
            self.close(what)
        finally:
            self.costs[what] = self.now() - began
            self.taken[what] = self.taken.get(what, 0.0) + self.costs[what]
