"""Things that are done one after the other, of which a failure costs none of the others, on several processes."""

from __future__ import annotations

import logging
from collections.abc import Callable

from lightning.pytorch.utilities import rank_zero_warn

from lrf_lightning.distributed import PeerError, Processes

__all__ = ["Attempts"]

logger = logging.getLogger(__name__)

KEPT = "the compressed model is kept in the callback's attribute result"


class Attempts:
    """What one process tried to do; at the end all of them learn what failed anywhere, and why.

    Nothing is raised before :meth:`settle`, since the other processes would wait in vain for one that has left.

    Args:
        strict: whether a failure ends the attempts and is raised at the end; otherwise it is a warning.
    """

    def __init__(self, *, strict: bool) -> None:
        self.strict = strict
        self._failures: dict[str, BaseException] = {}

    def run(self, what: str, action: Callable[[], object], *, together: bool = False) -> None:
        """Try to do one thing.

        Args:
            what: what is done, for messages, as in "could not write the report".
            action: what to do.
            together: whether all processes must be there; then it is done after a failure too.
        """
        if self.strict and self._failures and not together:
            return
        try:
            action()
        except (Exception, KeyboardInterrupt) as error:
            self._failures[what] = error
            if not self.strict:
                logger.error("Could not %s", what, exc_info=error)

    def settle(self, processes: Processes) -> None:
        """Report what failed on any process; to be called on all of them.

        Raises:
            BaseException: the first failure of this process, if strict.
            PeerError: if strict, on the processes where nothing failed, naming what failed elsewhere.
        """
        own = [f"{what} ({type(error).__name__}: {error})" for what, error in self._failures.items()]
        try:
            reports = processes.gather(own)
        except PeerError as error:  # one was killed; what was written is there
            reports = [[*own, f"wait for the other processes ({error})"]]
        if self.strict and self._failures:
            raise next(iter(self._failures.values()))
        for rank, failures in enumerate(reports):
            place = f" on process {rank}" if processes.size > 1 and len(reports) > 1 else ""
            for failure in failures:
                message = f"LowRankCompression could not {failure}{place}; {KEPT}"
                if self.strict:
                    raise PeerError(message)
                rank_zero_warn(message)
