"""What every stage of the solver works on: the dense model, its layers, the data, and the curves found so far."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lrf_lightning.copies.model_copy import copied_model
from lrf_lightning.distributed import ALONE, Processes, assigned
from lrf_lightning.modules import LowRankModule
from lrf_lightning.solver.conv_orders import best_factors, decomposed, order_cost
from lrf_lightning.solver.curves import Prediction
from lrf_lightning.solver.evaluation import Batches, LossFunction, Outcome, evaluate
from lrf_lightning.solver.factorization import Factors
from lrf_lightning.solver.latency import LayerLatency, ratio_at
from lrf_lightning.solver.layer_statistics import LayerStatistics
from lrf_lightning.solver.probes import Probe
from lrf_lightning.solver.settings import Settings
from lrf_lightning.solver.statistics import RowSampler, collect_statistics
from lrf_lightning.surgery import Candidate, Skipped

# paused passes that are alive at a time, each in a thread of its own; on CUDA every thread has workspaces of cuBLAS,
# 8 to 32 MiB
MOST_RUNS, MOST_RUNS_ON_CUDA = 256, 128
# batches that the compensation sees, of two models at least
MOST_BATCHES, MOST_BATCHES_ON_CUDA = 512, 64

__all__ = ["Curve", "Progress", "Workspace", "energy_curve", "length"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Curve:
    """Predictions for one layer at the ranks 1 to r, tensors of shape (r,) on the CPU.

    Attributes:
        prediction: first-order change, standard error, curvature and perturbation.
        change: predicted change of the loss that the allocation uses.
        allowed: whether the rank lies inside the perturbation range.
        probes: what was measured, for the layer or the group of layers it was probed with.
        spectrum: singular values of the weight in the metric, the root mean square over the groups.
    """

    prediction: Prediction
    change: Tensor
    allowed: Tensor
    probes: list[Probe]
    spectrum: Tensor


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

    def compensation_batches(self) -> Batches:
        """This process's part of as many calibration batches as may be in the middle of a pass at once.

        A pass of each model keeps about three tensors of the size of the largest input alive, and a thread. The limit
        holds for all processes together, so that the factors do not depend on how many there are.
        """
        count = max(1, math.floor(min(self.memory / max(2 * self._pass_bytes, 1.0), self._most_batches)))
        return itertools.islice(self.calibration, self.processes.share(count))

    def copies_at_once(self, layers: Mapping[str, LayerStatistics], *, alone: bool = False) -> int:
        """How many compressed copies the compensation may fit in one go, besides the dense model's passes.

        Bounded by the memory of their passes, of the moments of one layer, and of the copies themselves, and by the
        number of threads. It is the same on all processes.

        Args:
            layers: those that are fitted.
            alone: whether to count as if there were a single process.
        """
        batches = min(max(self.batches, 1), self._most_batches)
        passes = self.memory / max(self._pass_bytes * batches, 1.0) - 1
        widest = max(
            (
                16.0 * layer.candidate.groups * layer.candidate.columns**2
                for layer in layers.values()
                if not layer.inputs.diagonal
            ),
            default=0.0,
        )
        weights = float(sum(p.numel() * p.element_size() for p in self.model.parameters()))
        # the first process has the most batches
        runs = MOST_RUNS_ON_CUDA if self.device.type == "cuda" else MOST_RUNS
        threads = runs / math.ceil(batches / (1 if alone else self.processes.size)) - 1
        return max(1, math.floor(min(passes, threads, self.memory / max(widest + weights, 1.0))))

    @property
    def _most_batches(self) -> int:
        return MOST_BATCHES_ON_CUDA if self.device.type == "cuda" else MOST_BATCHES

    @property
    def _pass_bytes(self) -> float:
        """Memory of one model's half-finished pass over one batch."""
        sample = 3 * max((layer.input_bytes for layer in self.layers.values()), default=0.0)
        return sample * self.sampler.samples / max(self.batches, 1)

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

    def factorized(self, layers: Mapping[str, LayerStatistics], advance: Callable[[], None]) -> dict[str, Factors]:
        """Components of some layers in the metric; every process decomposes its share and sends it to the others.

        Convolutions get the best order of their factors, each of which is a task of its own.
        """
        orders = {name: layer.candidate.orders(self.settings.conv_order) for name, layer in layers.items()}
        costs = {(name, order.split): order_cost(order) for name, found in orders.items() for order in found}
        owners = dict(zip(costs, assigned(costs.values(), self.processes.size), strict=True))
        own: dict[str, tuple[float, Factors]] = {}  # of the best order of those that are decomposed here
        found_here: dict[tuple[str, int | None], tuple[float, Tensor | None]] = {}  # scores and gains

        def decompose() -> None:
            for name, layer in layers.items():
                for order in orders[name]:
                    if owners[name, order.split] == self.processes.rank:
                        score, factors = self._decomposed(layer, order, alone=len(orders[name]) == 1)
                        found_here[name, order.split] = score, factors.gains
                        if name not in own or score < own[name][0]:
                            own[name] = score, factors
                advance()

        self.processes.patiently("the factorization", decompose)
        known = {task: found for part in self.processes.gather(found_here) for task, found in part.items()}
        result = {}
        for name, layer in layers.items():
            best = min(((name, order.split) for order in orders[name]), key=lambda task: known[task][0])
            layer.set_order(best[1])
            factors = own[name][1] if owners[best] == self.processes.rank else None
            result[name] = replace(self._sent(factors, layer.candidate, owners[best]), gains=known[best][1])
        return result

    def _decomposed(self, layer: LayerStatistics, order: Candidate, *, alone: bool) -> tuple[float, Factors]:
        settings = self.settings
        inputs = None if settings.metric == "euclidean" else layer.inputs.mean
        outputs = layer.gradients.mean if settings.metric == "fisher" else None
        cost = None if alone else self._cost_of_component(layer, order)
        return decomposed(order, order.matrices(), inputs, outputs, damping=settings.damping, cost=cost)

    def _cost_of_component(self, layer: LayerStatistics, order: Candidate) -> float:
        """What one component costs in an order, as a share of the dense layer, in the unit of the setting ``cost``."""
        by_params = order.low_rank_params(1) / order.dense_params
        if self.settings.cost == "params":
            return by_params
        ordered = replace(layer)
        ordered.set_order(order.split)
        rank = min(max(1, round(0.5 / by_params)), order.max_rank)
        if self.settings.cost == "flops":
            return ordered.flops(rank) / ordered.flops(None) / rank
        measured = ratio_at(ordered, rank, self.device)
        return by_params if measured is None else measured / rank

    def stand_in(self, layer: LayerStatistics, factors: Factors, rank: int) -> LowRankModule:
        """The low-rank layer of a rank, from components of the weight itself."""
        candidate, settings = layer.candidate, self.settings
        inputs = None if settings.metric == "euclidean" else layer.inputs.mean
        best = best_factors(candidate, factors, rank, candidate.matrices(), inputs, damping=settings.damping)
        return candidate.stand_in(*best)

    def owners(self, layers: Mapping[str, LayerStatistics]) -> dict[str, int]:
        """The process that decomposes each layer, in the order of its factors that was chosen."""
        costs = [order_cost(layer.candidate) for layer in layers.values()]
        return dict(zip(layers, assigned(costs, self.processes.size), strict=True))

    def _sent(self, factors: Factors | None, candidate: Candidate, source: int) -> Factors:
        if factors is None:
            rows, columns = candidate.sides
            shapes = (
                (candidate.groups, rows, candidate.max_rank),
                (candidate.groups, candidate.max_rank, columns),
                (candidate.groups, candidate.full_rank),
            )
            factors = Factors(*(torch.zeros(shape, dtype=torch.float64, device=self.device) for shape in shapes))
        self.processes.broadcast_([factors.left, factors.right, factors.singular_values], source)
        return factors

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


def energy_curve(factors: Factors, max_rank: int) -> Curve:
    """The baseline's curve: the share of the squared norm in the metric that truncation leaves out."""
    tail = factors.relative_tail()[:max_rank].cpu()
    none = torch.zeros_like(tail)
    prediction = Prediction(none, none, tail.square(), tail)
    return Curve(prediction, tail.square(), torch.ones_like(tail, dtype=torch.bool), [], factors.spectrum())


def length(batches: Any) -> int:
    """Number of batches if it is known, else 0."""
    try:
        return len(batches)
    except TypeError:
        return 0
