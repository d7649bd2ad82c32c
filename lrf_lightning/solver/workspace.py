"""What every stage of the solver works on: the dense model, its layers, the data, and the curves found so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lrf_lightning.copies.model_copy import copied_model
from lrf_lightning.distributed import ALONE, Processes
from lrf_lightning.solver.layers.latency import LayerLatency
from lrf_lightning.solver.layers.layer_curve import Curve
from lrf_lightning.solver.layers.layer_statistics import LayerStatistics
from lrf_lightning.solver.layers.statistics import RowSampler, collect_statistics
from lrf_lightning.solver.running.evaluation import Batches, LossFunction, Outcome, evaluate
from lrf_lightning.solver.settings import Settings
from lrf_lightning.surgery import Candidate, Skipped

__all__ = ["Progress", "Workspace", "length"]

Progress = Callable[[str, int, int], None]


@dataclass
class Workspace:
    """State of one solve; stages read what earlier stages wrote.

    Attributes:
        model: working copy of the dense model on ``device``.
        loss: the user's loss.
        splits: this process's batches by the name of the split: ``calibration`` for statistics, curves and
            compensation, ``selection`` for the choice, ``verification`` for the verdict.
        device: device of the model.
        settings: the settings.
        progress: called as ``progress(stage, done, total)``; a total of 0 is unknown.
        processes: who else works on other batches of the same splits.
        layers: usable layers in execution order.
        skipped: layers left alone.
        curves: predictions for every usable layer.
        latencies: measured times of every usable layer, empty unless the setting ``cost`` asks for them.
        sampler: chooses the rows that moments are taken over.
        batches: number of calibration batches of all processes, 0 if unknown.
        keeps_gradients: whether the moments of all gradients are in memory; else they are collected anew when needed.
        samples: samples in every split.
        seconds: wall-clock seconds of every stage.
        shared: what all copies of the model share, see :func:`~lrf_lightning.copies.model_copy.shareable`.
    """

    model: nn.Module
    loss: LossFunction
    splits: Mapping[str, Batches]
    device: torch.device
    settings: Settings
    progress: Progress
    processes: Processes = ALONE
    layers: dict[str, LayerStatistics] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    curves: dict[str, Curve] = field(default_factory=dict)
    latencies: dict[str, LayerLatency] = field(default_factory=dict)
    sampler: RowSampler = field(default_factory=lambda: RowSampler(1, 1, 0))
    batches: int = 0
    keeps_gradients: bool = True
    samples: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    shared: dict[int, Any] = field(default_factory=dict)

    def copied(self) -> nn.Module:
        """A copy of the dense model, for use within the solver."""
        return copied_model(self.model, self.shared)

    def cost(self, layer: LayerStatistics, rank: int | None) -> float:
        """Cost of a layer at a rank, dense for None, in the unit of the setting ``cost``: latency is in seconds."""
        if self.settings.cost == "latency":
            return self.latencies[layer.candidate.name].seconds(rank)
        if self.settings.cost == "flops":
            return layer.flops(rank)
        candidate = layer.candidate
        return candidate.dense_params if rank is None else candidate.low_rank_params(rank)

    def is_worthwhile(self, layer: LayerStatistics, rank: int) -> bool:
        """Whether a rank below break-even saves what counts; with ``cost="latency"`` that is measured."""
        return self.settings.cost != "latency" or self.latencies[layer.candidate.name].is_faster(rank)

    @property
    def calibration(self) -> Batches:
        """This process's calibration batches."""
        return self.splits["calibration"]

    @property
    def memory(self) -> float:
        """Bytes that statistics may take."""
        return self.settings.memory_gib * 2**30

    @property
    def rank_multiple(self) -> int:
        """What ranks are rounded to: by default 8 where time counts and on CUDA (sizes of tiles), else 1."""
        tiled = self.device.type == "cuda" or self.settings.cost == "latency"
        return self.settings.rank_multiple or (8 if tiled else 1)

    def evaluate(self, model: nn.Module, split: str, *, keep_logits: bool = False) -> Outcome:
        """Loss and score on a split, over all processes."""
        outcome = evaluate(
            model,
            self.loss,
            self.splits[split],
            self.device,
            split=split,
            keep_logits=keep_logits,
            processes=self.processes,
        )
        self.samples[split] = outcome.measurement().samples
        return outcome

    def statistics(
        self, candidates: Sequence[Candidate], advance: Callable[[], None] = lambda: None
    ) -> dict[str, LayerStatistics]:
        """Moments of some layers, from one pass over the calibration data."""
        return collect_statistics(
            self.model,
            candidates,
            self.loss,
            self.calibration,
            self.device,
            sampler=self.sampler,
            processes=self.processes,
            advance=advance,
        )

    @property
    def dense_cost(self) -> float:
        """Cost of all usable layers when they are dense.

        Raises:
            ValueError: if it is 0, since lookups in dense tables take no multiply-adds.
        """
        cost = sum(self.cost(layer, None) for layer in self.layers.values())
        if cost == 0:
            raise ValueError(
                f"cost={self.settings.cost!r} is 0 for the factorizable layers {list(self.layers)}: lookups in a dense "
                "embedding take no multiply-adds. Use cost='params'"
            )
        return cost

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[], None]]:
        """Time a stage and report its progress; yields a callable that counts one step."""
        started, done = time.perf_counter(), 0
        self.progress(name, 0, total)

        def advance() -> None:
            nonlocal done
            done += 1
            self.progress(name, done, total)

        try:
            yield advance
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def length(batches: Any) -> int:
    """Number of batches if it is known, else 0."""
    try:
        return len(batches)
    except TypeError:
        return 0
