"""How long layers take, dense and at every rank, measured on the device at hand.

A layer and its low-rank stand-ins at about ten ranks are timed in rounds, in a new order each time, on an input of the
shape, dtype and layout that the layer was seen to get. Every timing is taken for

    log t(round, variant) = slowness(round) + duration(variant) + noise

and separated by median polish (Tukey 1977, Exploratory Data Analysis): what slows a whole round down cancels, and
single disturbed timings do not count. Of two ranks the larger one cannot really be faster: the durations are made
non-decreasing by isotonic regression (pool adjacent violators) and interpolated in between. Where a larger rank was
measured to cost no more, the allocation therefore takes the larger one.

The time spent on one shape of layer is bounded, and the figures are kept; see
:mod:`lrf_lightning.solver.layers.latency_cache`.
"""

from __future__ import annotations

import math
import platform
import random
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrf_lightning.distributed import Processes
from lrf_lightning.matmul_precision import matmul_precision
from lrf_lightning.modules.base import memory_format
from lrf_lightning.solver.layers import latency_cache
from lrf_lightning.solver.layers.layer_input import LayerInput
from lrf_lightning.solver.layers.layer_statistics import LayerStatistics, TiedUse
from lrf_lightning.surgery import Candidate
from lrf_lightning.surgery.kinds import low_rank_type
from lrf_lightning.surgery.module_hooks import carry_hooks

__all__ = ["LayerLatency", "LayerTimes", "device_name", "measure_layers", "median_polish", "ratio_at", "rising", "wait"]

METHOD = 1  # part of the key of kept figures: raise it when they are measured differently
CALL_SECONDS = 0.01  # the batch is cut until the dense layer takes no longer
SHORTEST_SECONDS = 0.0005  # calls are repeated until they take as long
SHAPE_SECONDS = 2.0  # for one shape of layer
RANK_SECONDS = 0.1  # for one rank by itself
FEWEST_ROUNDS, MOST_ROUNDS = 7, 25
PRECISION = 0.01  # standard error of a logarithm of a duration at which no more rounds are run
RANKS = 9  # ranks that are timed
DOUBTS = 2.0  # standard errors by which a rank must be faster than the dense layer


@dataclass(frozen=True)
class LayerTimes:
    """Measured durations of one layer.

    Attributes:
        dense: seconds per input row of the dense layer.
        ranks: ranks that were timed, rising.
        ratios: duration at these ranks over that of the dense layer, never falling.
        errors: standard errors of the logarithms of the ratios.
    """

    dense: float
    ranks: tuple[int, ...]
    ratios: tuple[float, ...]
    errors: tuple[float, ...]

    def seconds(self, rank: int | None, *, doubts: float = 0.0) -> float:
        """Seconds per row at a rank, or of the dense layer for None, with some standard errors on top."""
        if rank is None:
            return self.dense
        if doubts:
            ratios = [ratio * math.exp(doubts * error) for ratio, error in zip(self.ratios, self.errors, strict=True)]
        else:
            ratios = list(self.ratios)
        return self.dense * _interpolated(self.ranks, ratios, rank)


@dataclass(frozen=True)
class LayerLatency:
    """Time that a layer takes per sample, over all its calls and all modules that share its weight.

    Attributes:
        parts: durations and rows per sample of every way in which the weight is used.
    """

    parts: tuple[tuple[LayerTimes, float], ...]

    def seconds(self, rank: int | None, *, doubts: float = 0.0) -> float:
        """Seconds per sample at a rank, or of the dense layer for None."""
        return sum(rows * times.seconds(rank, doubts=doubts) for times, rows in self.parts)

    def is_faster(self, rank: int) -> bool:
        """Whether a rank is faster than the dense layer beyond the noise of the measurement."""
        return self.seconds(rank, doubts=DOUBTS) < self.seconds(None)


def measure_layers(
    layers: Mapping[str, LayerStatistics],
    device: torch.device,
    multiple: int,
    processes: Processes,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, LayerLatency]:
    """Time every layer at a few ranks; the first process measures for all.

    Args:
        layers: usable layers.
        device: where they are.
        multiple: ranks are timed at multiples of it where the layer is large enough.
        processes: all of them get the same figures.
        advance: called after every layer.
    """

    def measure() -> dict[str, LayerLatency]:
        found: dict[str, LayerLatency] = {}
        for name, layer in layers.items() if processes.rank == 0 else ():
            found[name] = _measure_layer(layer, device, multiple)
            advance()
        return found

    return processes.of_first(processes.patiently("the timing of layers", measure))


def _measure_layer(layer: LayerStatistics, device: torch.device, multiple: int) -> LayerLatency:
    candidate = layer.candidate
    ranks = grid(candidate.max_rank, multiple)
    uses: list[tuple[nn.Module, LayerStatistics | TiedUse]] = [(candidate.module, layer)]
    if layer.tied is not None:
        uses.append((layer.tied.module, layer.tied))
    return LayerLatency(
        tuple(
            (_cached_times(candidate, module, use.observed, ranks, device, SHAPE_SECONDS), use.rows_per_sample)
            for module, use in uses
            if use.observed is not None
        )
    )


def ratio_at(layer: LayerStatistics, rank: int, device: torch.device) -> float | None:
    """Time of a layer at one rank over that of the dense layer, None if it never ran."""
    if layer.observed is None:
        return None
    candidate = layer.candidate
    return _cached_times(candidate, candidate.module, layer.observed, (rank,), device, RANK_SECONDS).ratios[0]


def grid(max_rank: int, multiple: int) -> tuple[int, ...]:
    """Ranks to be timed: spread over a logarithmic scale up to the largest, rounded to the multiple."""
    if max_rank < multiple:
        multiple = 1
    most = max_rank // multiple
    step = math.log(most) / (RANKS - 1)
    # the upper half matters most: there the factors stop being faster
    wanted = {round(math.exp(step * i)) for i in range(RANKS)} | {round(most * share) for share in (0.5, 0.75)}
    return tuple(sorted(multiple * count for count in wanted if count))


def _cached_times(
    candidate: Candidate,
    module: nn.Module,
    given: LayerInput,
    ranks: tuple[int, ...],
    device: torch.device,
    limit: float,
) -> LayerTimes:
    """Durations of the module, which is the candidate's or one that reads its weight transposed."""
    key = {
        "method": METHOD,
        "device": device_name(device),
        "layer": f"{type(module).__name__}: {module}",
        "weight": [list(module.get_parameter("weight").shape), str(module.get_parameter("weight").dtype)],
        "layout": str(memory_format(module.get_parameter("weight"))),
        "input": asdict(given),
        "ranks": list(ranks),
    } | ({} if candidate.split is None else {"split": candidate.split})
    kept = latency_cache.look_up(key)
    times = None if kept is None else _parsed(kept, ranks)
    if times is None:
        times = _measure(module, given, ranks, device, limit, candidate.split)
        latency_cache.keep(key, asdict(times))
    return times


def _parsed(kept: Mapping[str, Any], ranks: tuple[int, ...]) -> LayerTimes | None:
    """Figures from the cache, None if they are no such figures."""
    try:
        times = LayerTimes(
            float(kept["dense"]), ranks, tuple(map(float, kept["ratios"])), tuple(map(float, kept["errors"]))
        )
    except (KeyError, TypeError, ValueError):
        return None
    numbers = (times.dense, *times.ratios, *times.errors)
    complete = len(times.ratios) == len(times.errors) == len(ranks)
    return times if complete and all(math.isfinite(number) and number >= 0 for number in numbers) else None


@lru_cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The device with everything that changes how fast it is: model, threads, precision and version of torch."""
    precision = matmul_precision() or "precision by backend"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        name = f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    else:
        name = f"{device.type}, {platform.machine()}"
    return f"{name}, torch {torch.__version__}, {precision}"


@torch.no_grad()
def _measure(
    module: nn.Module,
    given: LayerInput,
    ranks: Sequence[int],
    device: torch.device,
    limit: float,
    split: int | None = None,
) -> LayerTimes:
    started = time.perf_counter()
    with given.precision(device):
        given, once = _affordable(module, given, device)
        x = given.example(module, device)
        variants = [module, *(_stand_in(module, rank, split) for rank in ranks)]
        calls = max(1, math.ceil(SHORTEST_SECONDS / max(once, 1e-9)))
        for variant in variants:
            _duration(variant, x, 1)
        order, shuffle = list(range(len(variants))), random.Random(0)  # the user's random state stays as it is
        rounds: list[list[float]] = []
        while len(rounds) < MOST_ROUNDS:
            shuffle.shuffle(order)
            taken = dict.fromkeys(order, 0.0)
            for index in order:
                taken[index] = _duration(variants[index], x, calls)
            rounds.append([math.log(max(taken[index], 1e-9)) for index in range(len(variants))])
            if len(rounds) >= FEWEST_ROUNDS:
                durations, errors = median_polish(torch.tensor(rounds, dtype=torch.float64, device="cpu"))
                if float(errors.max()) < PRECISION or time.perf_counter() - started > limit:
                    break
    durations, errors = median_polish(torch.tensor(rounds, dtype=torch.float64, device="cpu"))
    smooth = rising((durations[1:] - durations[0]).tolist())
    return LayerTimes(
        dense=math.exp(float(durations[0])) / max(given.rows, 1.0),
        ranks=tuple(ranks),
        ratios=tuple(math.exp(value) for value in smooth),
        errors=tuple(math.hypot(float(error), float(errors[0])) for error in errors[1:]),
    )


def _affordable(module: nn.Module, given: LayerInput, device: torch.device) -> tuple[LayerInput, float]:
    """The input, cut to fewer samples where the dense layer would take too long, and the seconds of a call."""
    for _ in range(3):
        x = given.example(module, device)
        once = min(_duration(module, x, 1) for _ in range(3))
        smaller = given.cut(max(1, int(given.samples * CALL_SECONDS / max(once, 1e-9))))
        if once <= 1.5 * CALL_SECONDS or smaller == given:
            break
        given = smaller
    return given, once


def _stand_in(module: nn.Module, rank: int, split: int | None) -> nn.Module:
    kind = low_rank_type(module)
    assert kind is not None
    new = kind.like(module, rank, split=split)
    for parameter in new.parameters():
        # memory that was never written may hold numbers that are slow to compute with
        parameter.fill_(0.01)
    carry_hooks(module, new)  # they take their time in both
    return new.train(module.training)


def _duration(module: nn.Module, x: Tensor, calls: int) -> float:
    """Seconds of one call, the mean over ``calls``."""
    wait(x.device)
    started = time.perf_counter()
    for _ in range(calls):
        module(x)
    wait(x.device)
    return (time.perf_counter() - started) / calls


def wait(device: torch.device) -> None:
    """Let the device finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def median_polish(
    logarithms: Tensor,  # (rounds, variants)
) -> tuple[Tensor, Tensor]:
    """Separate timings into the slowness of rounds, with median 0, and the duration of variants.

    Returns:
        The durations, shape (variants,), and their standard errors, from the median absolute residuals.
    """
    rounds = len(logarithms)
    slowness, durations = (
        logarithms.new_zeros(rounds, 1),
        _middle(logarithms, 0),
    )
    for _ in range(4):
        slowness = _middle(logarithms - durations, 1)
        slowness = slowness - _middle(slowness, 0)
        durations = _middle(logarithms - slowness, 0)
    spread = 1.4826 * _middle((logarithms - slowness - durations).abs(), 0)
    # a median of normal values is about 1.25 times as uncertain as their mean
    return durations[0], 1.2533 * spread[0] / math.sqrt(rounds)


def _middle(values: Tensor, dim: int) -> Tensor:
    """The median, the mean of the middle two of an even number, with the dimension kept."""
    return values.quantile(0.5, dim, keepdim=True)


def rising(values: Sequence[float]) -> list[float]:
    """The non-decreasing sequence nearest to ``values`` in squares: pool adjacent violators (Ayer et al. 1955)."""
    blocks: list[tuple[float, int]] = []  # mean and length
    for value in values:
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (second, more), (first, count) = blocks.pop(), blocks.pop()
            blocks.append(((first * count + second * more) / (count + more), count + more))
    return [mean for mean, count in blocks for _ in range(count)]


def _interpolated(ranks: Sequence[int], values: Sequence[float], rank: int) -> float:
    """Linear between timed ranks, and constant outside: a layer has a duration even with few components."""
    place = bisect_left(ranks, rank)
    if place == 0:
        return values[0]
    if place == len(ranks):
        return values[-1] * rank / ranks[-1]
    low, high = ranks[place - 1], ranks[place]
    share = (rank - low) / (high - low)
    return (1 - share) * values[place - 1] + share * values[place]
