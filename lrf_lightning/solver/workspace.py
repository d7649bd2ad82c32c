"""What every stage of the solver works on: the dense model, its layers, the data, and the curves found so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lrf_lightning.solver.curves import Prediction
from lrf_lightning.solver.evaluation import Batches, LossFunction
from lrf_lightning.solver.factorization import Factors
from lrf_lightning.solver.probes import Probe
from lrf_lightning.solver.settings import Settings
from lrf_lightning.solver.statistics import LayerStatistics, RowSampler
from lrf_lightning.surgery import Skipped

__all__ = ["Curve", "Progress", "Workspace", "length"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Curve:
    """Predictions for one layer at the ranks 1 to r, tensors of shape (r,) on the CPU.

    Attributes:
        prediction: first-order change, standard error, curvature and perturbation.
        change: predicted change of the loss that the allocation uses.
        allowed: whether the rank lies inside the perturbation range.
        probes: what was measured.
    """

    prediction: Prediction
    change: Tensor
    allowed: Tensor
    probes: list[Probe]


@dataclass
class Workspace:
    """State of one solve; stages read what earlier stages wrote.

    Attributes:
        model: working copy of the dense model on ``device``.
        loss: the user's loss.
        calibration: batches for statistics, curves and compensation.
        selection: batches for the choice.
        verification: batches for the verdict.
        device: device of the model.
        settings: the settings.
        progress: called as ``progress(stage, done, total)``; a total of 0 is unknown.
        layers: usable layers in execution order.
        skipped: layers left alone.
        factors: components of every usable layer in the metric.
        curves: predictions for every usable layer.
        sampler: chooses the rows that moments are taken over.
        samples: samples in every split.
        seconds: wall-clock seconds of every stage.
    """

    model: nn.Module
    loss: LossFunction
    calibration: Batches
    selection: Batches
    verification: Batches
    device: torch.device
    settings: Settings
    progress: Progress
    layers: dict[str, LayerStatistics] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    factors: dict[str, Factors] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    sampler: RowSampler = field(default_factory=lambda: RowSampler(1, 1, 0))
    samples: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def cost(self, layer: LayerStatistics, rank: int | None) -> int:
        """Cost of a layer at a rank, dense for None, in the unit of the setting ``cost``."""
        if self.settings.cost == "flops":
            return layer.flops(rank)
        candidate = layer.candidate
        return candidate.dense_params if rank is None else candidate.low_rank_params(rank)

    @property
    def dense_cost(self) -> int:
        """Cost of all usable layers when they are dense."""
        return sum(self.cost(layer, None) for layer in self.layers.values())

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
