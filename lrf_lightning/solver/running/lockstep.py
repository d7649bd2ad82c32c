"""Run several forward passes side by side and stop all of them at the same layer.

To fit layer after layer to the inputs that it really sees, every layer would need a pass of its own over the data,
which makes the cost quadratic in the depth. Instead each batch has its own run, a function in a thread, that pauses at
every watched layer until it is told to go on. One run works at a time, so nothing is concurrent: threads only keep the
stacks of half-finished passes. The memory is that of the activations that are alive at one layer, for all batches.

A thread starts with torch's default modes; the gradient mode, the inference mode, autocast, the default device and the
current CUDA device and stream of the caller are carried over. Every run also has random states of its own, those of the
moment it was made, so that two runs made at the same moment draw the same numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from lrf_lightning import random_state

__all__ = ["Run", "pause", "runs", "unlocked"]

_current = threading.local()
LOCKS = (type(threading.Lock()), type(threading.RLock()), threading.Semaphore)


class _Cancelled(BaseException):
    """Unwinds a paused run; no ``except Exception`` of the user's code may stop it."""


def pause(event: Any) -> Any:
    """Called by a function inside a run: stop with ``event`` until the run is resumed, and return the reply.

    Raises:
        RuntimeError: outside of a run.
    """
    run: Run | None = getattr(_current, "run", None)
    if run is None:
        raise RuntimeError("pause() was called outside of a run")
    return run._pause(event)


class Run:
    """One function in a thread that only works while :meth:`resume` waits for it.

    Args:
        function: what to run; it calls :func:`pause`.
        around: entered whenever the run works, and left whenever it stops.

    Attributes:
        event: what the run was last paused with.
        finished: whether the function has returned.
    """

    def __init__(self, function: Callable[[], object], around: AbstractContextManager[Any] | None = None) -> None:
        self.event: Any = None
        self.finished = False
        self._function: Callable[[], object] | None = function
        self._around = around or nullcontext()
        self._reply: Any = None
        self._error: BaseException | None = None
        self._modes, self._random = _modes(), random_state.states()
        self._cancelled = False
        self._turn, self._rest = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._work, daemon=True, name="lockstep")

    def resume(self, reply: Any = None) -> None:
        """Let the run work until it pauses or ends; ``reply`` is what its pause returns.

        Raises:
            BaseException: what the function raised.
        """
        if self.finished:
            return
        self._reply, self.event = reply, None
        ours = random_state.states()
        random_state.set_states(self._random)
        try:
            with self._around:
                if not self._thread.is_alive():
                    self._thread.start()
                self._turn.release()
                self._rest.acquire()
            self._random = random_state.states()
        finally:
            random_state.set_states(ours)
            if self.finished:
                self._around = nullcontext()  # it may hold what the run has left
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def cancel(self) -> None:
        """Unwind the run where it is paused."""
        if self.finished or not self._thread.is_alive():
            return
        self._cancelled = True
        with self._around:
            self._turn.release()
            self._thread.join()

    def _pause(self, event: Any) -> Any:
        if self._cancelled:
            raise _Cancelled
        self.event = event
        self._rest.release()
        self._turn.acquire()
        if self._cancelled:
            raise _Cancelled
        return self._reply

    def _work(self) -> None:
        self._turn.acquire()
        _current.run = self
        try:
            function, self._function = self._function, None  # so that its arguments end with it
            if function is not None and not self._cancelled:
                with _entered(self._modes):
                    function()
        except _Cancelled:
            pass
        except BaseException as error:  # handed to the thread that waits in resume
            self._error = error
        finally:
            self.finished = True
            self._rest.release()


class _OpenLock:
    """A lock that nobody waits for."""

    def acquire(self, *_: Any, **__: Any) -> bool:
        return True

    def release(self) -> None:
        return None

    def locked(self) -> bool:
        return False

    def __enter__(self) -> bool:
        return True

    def __exit__(self, *_: object) -> None:
        return None


@contextmanager
def unlocked(models: Iterable[nn.Module]) -> Iterator[None]:
    """Let locks that are attributes of modules be open meanwhile.

    A run that pauses while it holds one would make the next run wait for ever; since one run works at a time, nothing
    has to be locked.
    """
    locks = [
        (module, name, value)
        for model in models
        for module in model.modules()
        for name, value in module.__dict__.items()
        if isinstance(value, LOCKS)
    ]
    for module, name, _ in locks:
        module.__dict__[name] = _OpenLock()
    try:
        yield
    finally:
        for module, name, value in locks:
            module.__dict__[name] = value


@contextmanager
def runs(functions: Iterable[Run | Callable[[], object]]) -> Iterator[list[Run]]:
    """Runs, or those of functions, not started yet; what is unfinished at the end is unwound, the last one first.

    The order matters: a function that saves and restores the state of a shared module restores what it found, so the
    first one must restore last.
    """
    started = [function if isinstance(function, Run) else Run(function) for function in functions]
    try:
        yield started
    finally:
        for run in reversed(started):
            run.cancel()


def _modes() -> list[Callable[[], Any]]:
    """Context managers that give another thread the modes of this one."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    modes: list[Callable[[], Any]] = [
        lambda: torch.inference_mode(inference),
        lambda: torch.set_grad_enabled(grad),
    ]
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            modes.append(lambda device=device, dtype=dtype: torch.autocast(device, dtype))  # type: ignore[misc]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        current, stream = torch.cuda.current_device(), torch.cuda.current_stream()
        modes += [lambda: torch.cuda.device(current), lambda: torch.cuda.stream(stream)]
    default = torch.get_default_device()
    if default.type != "cpu":
        modes.append(lambda: torch.device(default))
    return modes


@contextmanager
def _entered(modes: list[Callable[[], Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode())
        yield
