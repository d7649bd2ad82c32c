"""What is known about the speed and the size of a compressed model beside the original: plain, frozen records."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Pair", "Runtime", "SlowerLayer", "Speed", "Timing"]

Runtime = Literal["eager", "compile"]
Pair = tuple[float, float]  # dense, compressed


@dataclass(frozen=True)
class Timing:
    """Both models timed in turn on the same input.

    Attributes:
        runtime: ``eager``, or ``compile`` for ``torch.compile``.
        batch: samples per call.
        seconds: median seconds per call.
        speedup: median of the paired ratios, dense over compressed; above 1 is faster.
        lower: lower end of the interval that holds the true median of the ratios with 95 % confidence.
        upper: its upper end.
        rounds: number of pairs.
    """

    runtime: Runtime
    batch: int
    seconds: Pair
    speedup: float
    lower: float
    upper: float
    rounds: int

    @property
    def throughput(self) -> Pair:
        """Samples per second."""
        dense, compressed = self.seconds
        return self.batch / dense, self.batch / compressed

    @property
    def is_faster(self) -> bool:
        """Whether the compressed model is faster beyond the noise."""
        return self.lower > 1

    @property
    def is_slower(self) -> bool:
        """Whether the compressed model is slower beyond the noise."""
        return self.upper < 1


@dataclass(frozen=True)
class SlowerLayer:
    """A factorized layer that takes longer than the dense one.

    Attributes:
        name: qualified name of the module.
        rank: its rank.
        ratio: its time over that of the dense layer.
    """

    name: str
    rank: int
    ratio: float


@dataclass(frozen=True)
class Speed:
    """Speed and size of both models.

    Attributes:
        device: where they were timed, with what decides how fast it is.
        what: what was called, ``forward`` of a module or the user's ``step``.
        timings: one for each runtime and batch size; those that failed are missing.
        bytes_on_disk: size of the weights and buffers in a file.
        flops: floating-point operations per sample of the whole model as torch counts them (two per multiply-add),
            None if they could not be counted.
        peak_memory: bytes of weights, buffers and everything that is alive at once in a call with the largest batch,
            None if that could not be measured.
        slower_layers: factorized layers that take longer than the dense ones, looked for only where the model is not
            faster; the worst first.
        timed_layers: number of factorized layers that were looked at for it.
        problems: what could not be measured and why.
    """

    device: str
    what: str
    timings: list[Timing]
    bytes_on_disk: tuple[int, int]
    flops: Pair | None = None
    peak_memory: tuple[int, int] | None = None
    slower_layers: list[SlowerLayer] = field(default_factory=list)
    timed_layers: int = 0
    problems: list[str] = field(default_factory=list)
