"""Time the compressed model beside the original on a real batch.

Both models run in turn, in a new order in every round, so that whatever slows the machine down meets both of them. The
speed-up is the median of the paired ratios, with a distribution-free confidence interval from the order statistics of
the sign test. Called is the forward of the model, or of the one part of it that holds its weights, as the user's loss
called it; where that is not seen, the loss itself.

A batch that takes too long is cut. Several processes make the same calls, each on its own batch, since a model may hold
collectives; their number cannot depend on times, and the figures are those of the first.
"""

from __future__ import annotations

import math
import random
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lrf_lightning.solver.layers.latency import device_name, ratio_at
from lrf_lightning.solver.model_size import model_bytes
from lrf_lightning.solver.running.evaluation import evaluation_mode
from lrf_lightning.solver.speed.model_call import ModelCall
from lrf_lightning.solver.speed.peak_memory import peak_memory
from lrf_lightning.solver.speed_result import Pair, Runtime, SlowerLayer, Speed, Timing
from lrf_lightning.solver.workspace import Workspace
from lrf_lightning.surgery import settle

__all__ = ["Scope", "measure_speed"]

TIMING_SECONDS = 0.4  # for one runtime and batch size
CALL_SECONDS = 0.04, 0.25  # a batch that takes longer is cut; the first after a short solve, at most the second
SOLVE_SHARE = 0.003  # of the solve so far that a call may take; a runtime and batch size are some 18 calls
BRIEF = 0.25  # of that time
SHORTEST_SECONDS = 0.002  # calls are repeated until they take as long
FEWEST_ROUNDS, MOST_ROUNDS = 7, 31
MOST_LAYERS = 4  # of those that are looked at where the model is not faster


@dataclass(frozen=True)
class Scope:
    """How much is measured of a model.

    Attributes:
        share: of the time that a call may take, since other models are timed as well.
        batch: samples in the largest batch; None for as many as the time allows.
        brief: whether a few rounds will do, without compilation and without looking for slower layers.
    """

    share: float = 1.0
    batch: int | None = None
    brief: bool = False


WHOLE = Scope()


def measure_speed(
    work: Workspace, make: Callable[[], nn.Module], ranks: Mapping[str, int], scope: Scope = WHOLE
) -> Speed | None:
    """Speed and size of a compressed model beside the original; a failure is a warning.

    Args:
        work: the dense model, the data and the settings.
        make: gives the compressed model, settled.
        ranks: ranks of its layers.
        scope: how much is measured.
    """
    if work.settings.speed == "none" or not ranks:
        return None
    try:
        with work.processes.together("the measurement of speed"):
            found = _measured(work, make(), ranks, scope)
        return work.processes.of_first(found)
    except Exception as error:  # user code, compilers; the result does not depend on it
        warnings.warn(f"The speed was not measured ({type(error).__name__}: {error})", stacklevel=2)
        return None


def _measured(work: Workspace, compressed: nn.Module, ranks: Mapping[str, int], scope: Scope) -> Speed | None:
    batch = next(iter(work.splits["verification"]), None)
    if batch is None:  # this process has none
        return None
    dense = work.copied()
    settle(dense)
    models = (dense, compressed)
    with evaluation_mode(dense), evaluation_mode(compressed), torch.no_grad():
        calls = [ModelCall.seen(model, work, batch) for model in models]
        timings, problems = _timings(work, calls, scope)
        largest = [call.resized(timings[0].batch if timings else call.size) for call in calls]
        flops = _tolerated(problems, "count operations", lambda: _pair(_flops, largest))
        peak = _tolerated(problems, "measure memory", lambda: _pair(peak_memory, largest))
        slower, timed = ([], 0) if scope.brief else _slower_layers(work, timings, ranks)
    return Speed(
        device=device_name(work.device),
        what=calls[0].what,
        timings=timings,
        bytes_on_disk=(model_bytes(dense), model_bytes(compressed)),
        flops=None if flops is None else (flops[0] / largest[0].size, flops[1] / largest[1].size),
        peak_memory=None if peak is None else (int(peak[0]), int(peak[1])),
        slower_layers=slower,
        timed_layers=timed,
        problems=problems,
    )


def _timings(work: Workspace, calls: list[ModelCall], scope: Scope) -> tuple[list[Timing], list[str]]:
    """For every runtime the largest affordable batch, then a single sample."""
    runtimes: list[Runtime] = (
        ["eager", "compile"] if work.settings.speed == "compile" and not scope.brief else ["eager"]
    )
    timings: list[Timing] = []
    problems: list[str] = []
    large = scope.batch or _affordable(work, calls, SOLVE_SHARE * scope.share)
    for runtime in runtimes:
        for size in dict.fromkeys((large, 1)):
            what = f"time {runtime} at batch {size}"
            found = _tolerated(problems, what, lambda: _timing(work, calls, runtime, size, scope))  # noqa: B023 (called at once)
            timings += [] if found is None else [found]
    return timings, problems


def _affordable(work: Workspace, calls: list[ModelCall], share: float) -> int:
    """The largest number of samples at which a call of the dense model takes no longer than a share of the solve."""
    size, (shortest, longest) = calls[0].size, CALL_SECONDS
    limit = min(max(share * sum(work.seconds.values()), shortest), longest)
    for _ in range(3 if work.processes.size == 1 else 0):
        call = calls[0].resized(size)
        call.seconds()
        took = call.seconds()
        if took <= 1.5 * limit or size == 1:
            break
        size = max(1, int(size * limit / took))
    return size


def _timing(work: Workspace, calls: list[ModelCall], runtime: Runtime, size: int, scope: Scope) -> Timing:
    pair = [call.resized(size) for call in calls]
    if runtime == "compile":
        pair = [call.compiled() for call in pair]
    for call in pair:
        call.seconds()
    repeats, rounds = 1, FEWEST_ROUNDS
    if work.processes.size == 1:
        once = max(sum(call.seconds() for call in pair), 1e-9)
        repeats = max(1, math.ceil(2 * SHORTEST_SECONDS / once))
        seconds_left = TIMING_SECONDS * (BRIEF if scope.brief else 1.0)
        rounds = min(max(int(seconds_left / (once * repeats)), FEWEST_ROUNDS), MOST_ROUNDS)
    order, shuffle = [0, 1], random.Random(0)  # the user's random state stays as it is
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        shuffle.shuffle(order)
        for index in order:
            seconds[index].append(pair[index].seconds(repeats))
    ratios = sorted(dense / compressed for dense, compressed in zip(*seconds, strict=True))
    low, high = median_interval(rounds)
    return Timing(
        runtime=runtime,
        batch=size,
        seconds=(statistics.median(seconds[0]), statistics.median(seconds[1])),
        speedup=statistics.median(ratios),
        lower=ratios[low],
        upper=ratios[high],
        rounds=rounds,
    )


def median_interval(count: int, confidence: float = 0.95) -> tuple[int, int]:
    """Indices into sorted values between which their true median lies with some confidence, or the outermost two."""
    below, tail = 0, 0.0
    for index in range(count // 2):
        tail += math.comb(count, index) / 2**count
        if 2 * tail > 1 - confidence:
            break
        below = index
    return below, count - 1 - below


def _tolerated(problems: list[str], what: str, action: Callable[[], Any]) -> Any:
    """The result of ``action``, None if it fails; why is noted."""
    try:
        return action()
    except Exception as error:  # user code, compilers
        lines = str(error).strip().splitlines() or [""]
        problems.append(f"could not {what} ({type(error).__name__}: {lines[0][:120]})")
        return None


def _pair(function: Callable[[ModelCall], float], calls: list[ModelCall]) -> Pair:
    dense, compressed = (function(call) for call in calls)
    return dense, compressed


def _flops(call: ModelCall) -> float:
    with _unfused_attention(), FlopCounterMode(display=False) as counter, call.precision():
        call.run()
    return float(counter.get_total_flops())


@contextmanager
def _unfused_attention() -> Iterator[None]:
    """Keep dense encoder layers off their fused path, a single operation that counts as none."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _slower_layers(work: Workspace, timings: list[Timing], ranks: Mapping[str, int]) -> tuple[list[SlowerLayer], int]:
    """Where the model is not faster: the factorized layers that are slower than the dense ones, largest loss first."""
    if all(timing.is_faster for timing in timings) or work.processes.size > 1:
        return [], 0
    by_work = sorted(ranks, key=lambda name: -work.layers[name].flops(None))[:MOST_LAYERS]
    ratios = {name: ratio_at(work.layers[name], ranks[name], work.device) for name in by_work}
    slower = [
        SlowerLayer(name, ranks[name], ratio) for name, ratio in ratios.items() if ratio is not None and ratio > 1
    ]
    return sorted(slower, key=lambda layer: -layer.ratio), len(by_work)
