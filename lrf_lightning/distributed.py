"""Processes that solve together: what is summed, gathered and agreed upon between them.

Batches are dealt out whole: batch i belongs to process i modulo the number of processes. Sums run in float64, so a
solve gives the same ranks whatever that number is. Every piece of work that may fail on one process alone is done
inside :meth:`Processes.together`, which lets all of them end with the cause named instead of waiting for each other.
"""

from __future__ import annotations

import atexit
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

__all__ = ["ALONE", "PeerError", "Processes", "assigned", "current_processes"]


T = TypeVar("T")

PULSE = 1.0  # seconds


class PeerError(RuntimeError):
    """Another process failed or was lost; the message says which one, where and why, as far as it is known."""


@dataclass(frozen=True)
class Processes:
    """A group of processes, or one alone.

    Attributes:
        rank: number of this process.
        size: number of processes.
        group: their process group, None for the default one.
        device: where tensors travel: a CUDA device with NCCL, else the CPU.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def index(self, position: int) -> int:
        """Number among all batches of this process's batch at ``position``."""
        return position * self.size + self.rank

    def share(self, count: int) -> int:
        """How many of the first ``count`` batches are this process's."""
        return len(range(self.rank, count, self.size))

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace float64 tensors by their sums over all processes, in place."""
        if self.size == 1:
            return
        for tensor in tensors:
            moved = tensor.to(self.device)
            with _named("a sum"):
                dist.all_reduce(moved, group=self.group)
            if moved is not tensor:
                tensor.copy_(moved)

    def broadcast_(self, tensors: Sequence[Tensor], source: int) -> None:
        """Replace tensors by those of the process ``source``, in place."""
        if self.size == 1:
            return
        for tensor in tensors:
            moved = tensor.to(self.device).contiguous()
            with _named("a broadcast"):
                dist.broadcast(moved, self._global(source), group=self.group)
            tensor.copy_(moved)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in order, on every process; tensors must be on the CPU."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _named("an exchange"), self._at_device():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def of_first(self, value: T) -> T:
        """The value of the first process, on every process; tensors must be on the CPU."""
        if self.size == 1:
            return value
        values = [value]
        with _named("a broadcast"), self._at_device():
            dist.broadcast_object_list(values, self._global(0), group=self.group)
        return values[0]

    def interleaved(self, values: Sequence[Any]) -> list[Any]:
        """The per-batch values of all processes in the order of the batches."""
        rounds = itertools.zip_longest(*self.gather(list(values)), fillvalue=_MISSING)
        return [value for values in rounds for value in values if not isinstance(value, _Missing)]

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Run work without collectives; if it fails on any process, it fails on all.

        Raises:
            PeerError: on the processes where the work itself did not fail.
        """
        if self.size == 1:
            yield
            return
        error: BaseException | None = None
        try:
            yield
        except BaseException as caught:  # the others must not wait for a process that was interrupted either
            error = caught
        self._meet(what, error, ended=True)

    def patiently(self, what: str, work: Callable[[], T]) -> T:
        """Do long work without collectives, and let the other processes know meanwhile that it is still going on.

        A process that waits in a collective for another one's decompositions would run into the group's timeout. So
        the work runs in a thread, and all processes meet every second until the last one is done.

        Raises:
            PeerError: on the processes where the work itself did not fail.
        """
        if self.size == 1:
            return work()

        def at_device() -> T:
            with self._at_device():  # every thread has its own current device
                return work()

        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(at_device)
            while True:
                error: BaseException | None = None
                try:
                    wait([future], PULSE)
                    if future.done():
                        error = future.exception()
                except BaseException as caught:
                    error = caught
                if self._meet(what, error, ended=future.done()):
                    return future.result()

    def _meet(self, what: str, error: BaseException | None, *, ended: bool) -> bool:
        """Whether all processes have ended their work; raises if it failed on one of them."""
        reports = self.gather((ended, None if error is None else f"{type(error).__name__}: {error}"))
        if error is not None:
            raise error
        for rank, (_, message) in enumerate(reports):
            if message is not None:
                raise PeerError(f"process {rank} failed in {what}: {message}")
        return all(done for done, _ in reports)

    def agree(self, values: Mapping[str, str], hint: str) -> None:
        """Check that all processes hold the same texts by the same names.

        Args:
            values: what to compare, by what it is called.
            hint: how a difference comes about, and what to do about it.

        Raises:
            PeerError: on all processes, if one differs.
        """
        first, *others = self.gather(dict(values))
        for rank, other in enumerate(others, start=1):
            for name in {**first, **other}:
                mine, theirs = first.get(name, "nothing"), other.get(name, "nothing")
                if mine != theirs:
                    raise PeerError(f"{name} differs: {mine} on process 0, {theirs} on process {rank}. {hint}")

    def _at_device(self) -> AbstractContextManager[Any]:
        """Objects travel on the current device with NCCL, which no two processes may share."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Say what it means if a collective fails: a process was killed, or did not come within the group's timeout."""
    try:
        yield
    except RuntimeError as error:
        raise PeerError(
            f"another process was lost, or did not come within the timeout of the process group, during {what}: {error}"
        ) from error


class _Missing:
    """Fills the last round of a deal that did not go up; recognised by type, since it may have travelled."""


_MISSING = _Missing()

ALONE = Processes()


def current_processes(device: torch.device) -> Processes:
    """All processes of the default group, or this one alone if there is no group.

    Args:
        device: device of the model; collectives of NCCL run there, or on the current one for a model on the CPU.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return ALONE
    _group_ends_before_python()
    return Processes(dist.get_rank(), dist.get_world_size(), None, _travelling(device))


def _travelling(device: torch.device) -> torch.device:
    """Where tensors travel: on the CPU if the group can, else, as with NCCL, on the model's GPU or the current one."""
    if "cpu:" in dist.get_backend_config():
        return torch.device("cpu")
    return device if device.type == "cuda" else torch.device("cuda", torch.cuda.current_device())


@functools.cache
def _group_ends_before_python() -> None:
    """End the process group when the program ends, as Lightning does for NCCL only.

    A thread of gloo frees the tensors of the last collective and asks Python to free their wrappers. If Python is
    being taken down at that moment, the process is aborted ("terminate called without an active exception").
    """
    atexit.register(_end_group)


def _end_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def assigned(costs: Iterable[float], processes: int) -> list[int]:
    """The process that does each task: the longest task first, always to the one with the least work (Graham 1969).

    Args:
        costs: estimated time of every task, in any unit.
        processes: how many there are.
    """
    owners: dict[int, int] = {}
    load = [0.0] * processes
    for task, cost in sorted(enumerate(costs), key=lambda item: -item[1]):
        owners[task] = load.index(min(load))
        load[owners[task]] += cost
    return [owners[task] for task in range(len(owners))]
