"""Second moments of every layer's inputs and output gradients, from one pass over the calibration data.

For a layer with input rows x and output-gradient rows g (gradient of the per-sample loss) the pass collects::

    A = E[x x']   (groups, n, n)        S = E[g g']   (groups, m, m)

over a random subset of the rows (tokens, spatial positions) of every sample. Products are taken in float32 on rows that
are scaled to size 1, sums in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lrf_lightning.distributed import ALONE, Processes
from lrf_lightning.solver.evaluation import Batches, LossFunction, batch_size, evaluation_mode, step, to_device
from lrf_lightning.solver.hooks import frozen_parameters, observe_gradients
from lrf_lightning.solver.rows import RowReader, UnreadableRowsError, row_reader
from lrf_lightning.surgery import Candidate

__all__ = ["LayerStatistics", "Moment", "RowSampler", "backward_passes", "collect_statistics", "memory_groups"]


@dataclass
class Moment:
    """A running sum of outer products u v', in float64."""

    total: Tensor | None = None  # (g, a, b)
    rows: int = 0

    def add(
        self,
        u: Tensor,  # (g, rows, a)
        v: Tensor,  # (g, rows, b)
    ) -> None:
        """Add the outer products of matching rows."""
        u, v = u.float(), v.float()
        u_scale, v_scale = _scale(u), _scale(v)
        product = ((u / u_scale).transpose(1, 2) @ (v / v_scale)).double() * (u_scale.double() * v_scale.double())
        self.total = product if self.total is None else self.total + product
        self.rows += u.shape[1]

    def merge(self, processes: Processes, device: torch.device) -> None:
        """Add up the sums of all processes; all of them must call it."""
        shapes = processes.gather((self.rows, None if self.total is None else tuple(self.total.shape)))
        shape = next((shape for _, shape in shapes if shape is not None), None)
        self.rows = sum(rows for rows, _ in shapes)
        if shape is None:
            return
        if self.total is None:
            self.total = torch.zeros(shape, dtype=torch.float64, device=device)
        processes.sum_([self.total])

    def forget(self) -> None:
        """Free the memory; the mean is not known any more."""
        self.total = None

    @property
    def known_mean(self) -> Tensor | None:
        """The mean outer product, None if there are no rows or they are forgotten."""
        return None if self.total is None else self.mean

    @property
    def mean(self) -> Tensor:
        """The mean outer product."""
        assert self.total is not None
        return self.total / self.rows


@dataclass
class LayerStatistics:
    """What one pass says about one layer.

    Attributes:
        candidate: the layer.
        reader: how its rows are read.
        inputs: moment of the input rows.
        gradients: moment of the output-gradient rows.
        samples: calibration samples of all processes, whether the layer ran on them or not.
        rows_per_sample: tokens or positions per sample, the mean over the calls.
        repeated: whether it runs several times in one pass.
        input_bytes: largest size of its input per sample.
        order: place of the layer's first call in the execution order, -1 if it never ran.
        problem: why the layer cannot be used, empty if it can.
    """

    candidate: Candidate
    reader: RowReader
    inputs: Moment = field(default_factory=Moment)
    gradients: Moment = field(default_factory=Moment)
    samples: int = 0
    rows_per_sample: float = 0.0
    repeated: bool = False
    input_bytes: float = 0.0
    order: int = -1
    problem: str = ""

    def flops(self, rank: int | None) -> int:
        """Multiply-adds per sample at a rank, or of the dense layer for None."""
        weights = self.candidate.dense_params if rank is None else self.candidate.low_rank_params(rank)
        return round(weights * self.rows_per_sample)


class RowSampler:
    """Chooses the rows of a sample that a moment is taken over, the same ones whenever the same batch is asked for."""

    def __init__(self, rows_per_feature: int, samples: int, seed: int) -> None:
        self.rows_per_feature, self.samples, self.seed = rows_per_feature, max(samples, 1), seed

    def positions(self, candidate: Candidate, available: int, batch_index: int, device: torch.device) -> Tensor | None:
        """Indices into the ``available`` rows of a sample, or None for all of them."""
        wide, narrow = max(candidate.rows, candidate.columns), min(candidate.rows, candidate.columns)
        # a moment over r rows costs r * wide^2, the layer itself samples * available * wide * narrow: stay near it
        affordable = 1.5 * self.samples * available * narrow / wide
        wanted = max(min(self.rows_per_feature * wide, affordable), 2 * wide)
        per_sample = max(1, math.ceil(wanted / self.samples))
        if per_sample >= available:
            return None
        generator = torch.Generator().manual_seed(hash((self.seed, batch_index, available)) % 2**63)
        return torch.randperm(available, generator=generator)[:per_sample].sort().values.to(device)


def collect_statistics(
    model: nn.Module,
    candidates: Sequence[Candidate],
    loss: LossFunction,
    batches: Batches,
    device: torch.device,
    *,
    sampler: RowSampler,
    processes: Processes = ALONE,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, LayerStatistics]:
    """Run the model forward and backward over the calibration data once.

    Args:
        model: dense model on ``device``.
        candidates: layers to observe.
        loss: the user's loss.
        batches: calibration data.
        device: where batches are moved to.
        sampler: chooses rows.
        processes: who else works on other batches.
        advance: called after every batch.

    Returns:
        Statistics by layer name, in execution order; layers that cannot be used carry a ``problem``.

    Raises:
        ValueError: if there is no batch, or a loss is not finite.
    """
    layers = {c.name: LayerStatistics(c, row_reader(c)) for c in candidates}
    seen: list[str] = []
    last_batch: dict[str, int] = {}
    calls: dict[str, float] = dict.fromkeys(layers, 0.0)

    def on_forward(name: str, x: Tensor, output: Tensor, size: int, index: int) -> Callable[[Tensor], None] | None:
        layer = layers[name]
        if name not in seen:
            layer.order = len(seen)
            seen.append(name)
        layer.repeated = layer.repeated or last_batch.get(name) == index
        last_batch[name] = index
        layer.input_bytes = max(layer.input_bytes, x.numel() * x.element_size() / size)
        if layer.problem:
            return None
        try:
            available = layer.reader.rows_per_sample(x, size)
            positions = sampler.positions(layer.candidate, available, index, x.device)
            rows = layer.reader.inputs(x, positions, size)
        except UnreadableRowsError as error:
            layer.problem = str(error)
            return None
        calls[name] += available * size
        layer.inputs.add(rows, rows)

        def on_gradient(grad: Tensor) -> None:
            grad_rows = layer.reader.gradients(grad, positions, size)
            layer.gradients.add(grad_rows, grad_rows)

        return on_gradient

    with processes.together("the statistics"):
        samples = backward_passes(model, layers, loss, batches, device, on_forward, lambda _: advance(), processes)
    samples = _merge(layers, calls, samples, processes, device)
    if samples == 0:
        raise ValueError("calibration holds no batch; give a loader that yields at least one and can be iterated again")
    for name, layer in layers.items():
        layer.samples, layer.rows_per_sample = samples, calls[name] / samples
        layer.problem = layer.problem or _problem(layer)
    return dict(sorted(layers.items(), key=lambda item: item[1].order))


def backward_passes(
    model: nn.Module,
    layers: Mapping[str, LayerStatistics],
    loss: LossFunction,
    batches: Batches,
    device: torch.device,
    on_forward: Callable[[str, Tensor, Tensor, int, int], Callable[[Tensor], None] | None],
    after_batch: Callable[[int], None],
    processes: Processes = ALONE,
) -> int:
    """Run forward and backward over this process's batches and return the number of their samples.

    ``on_forward`` also gets the batch's size and its index among all batches, ``after_batch`` the size. The
    gradients are those of the per-sample losses: a scalar loss is taken for the mean over its batch.
    """
    samples = 0
    modules = {name: layer.candidate.modules_in(model) for name, layer in layers.items()}
    with evaluation_mode(model), frozen_parameters([model]):
        for position, batch in enumerate(batches):
            size, index = batch_size(batch), processes.index(position)
            samples += size

            def observe(name: str, x: Tensor, y: Tensor, size: int = size, index: int = index) -> Any:
                return on_forward(name, x, y, size, index)

            with observe_gradients(modules, observe):
                losses = step(model, loss, to_device(batch, device), size).loss
                total = losses.sum() if losses.dim() == 1 else losses * size
                if not torch.isfinite(total):
                    raise ValueError(
                        f"the loss of calibration batch {index} is {float(total.detach() / size)}; it must be finite. "
                        "Check the batch and the weights for NaN"
                    )
                if total.requires_grad:
                    total.backward()  # type: ignore[no-untyped-call]
            after_batch(size)
    return samples


def memory_groups(candidates: Iterable[Candidate], limit: float) -> Iterator[list[Candidate]]:
    """Cut the layers into runs whose statistics fit into ``limit`` bytes; a larger layer is a run of its own."""
    group: list[Candidate] = []
    used = 0.0
    for candidate in candidates:
        size = 8.0 * candidate.groups * (candidate.rows**2 + candidate.columns**2)
        if group and used + size > limit:
            yield group
            group, used = [], 0.0
        group.append(candidate)
        used += size
    if group:
        yield group


def _merge(
    layers: Mapping[str, LayerStatistics],
    calls: dict[str, float],
    samples: int,
    processes: Processes,
    device: torch.device,
) -> int:
    """Let every process know what all of them have seen; returns the number of all samples."""
    if processes.size == 1:
        return samples
    own = {
        name: (layer.order, layer.repeated, layer.input_bytes, layer.problem, calls[name], layer.inputs.rows)
        for name, layer in layers.items()
    }
    gathered = processes.gather((samples, own))
    # the order of the first process that ran a layer, after the layers that an earlier process ran
    ran = [name for _, seen in gathered for name, facts in sorted(seen.items(), key=lambda i: i[1][0]) if facts[0] >= 0]
    order = {name: position for position, name in enumerate(dict.fromkeys(ran))}
    for name, layer in layers.items():
        facts = [seen[name] for _, seen in gathered]
        layer.order = order.get(name, -1)
        layer.repeated, layer.input_bytes = any(f[1] for f in facts), max(f[2] for f in facts)
        layer.problem = next((f[3] for f in facts if f[3]), "")
        calls[name] = sum(f[4] for f in facts)
        if layer.problem or layer.order < 0:
            continue
        for moment in (layer.inputs, layer.gradients):
            moment.merge(processes, device)
    return sum(count for count, _ in gathered)


def _problem(layer: LayerStatistics) -> str:
    if layer.order < 0 or layer.inputs.rows == 0:
        return "did not run on the calibration data"
    if layer.gradients.rows == 0:
        return "no gradient of the loss reaches it"
    if not torch.isfinite(layer.inputs.mean).all() or not torch.isfinite(layer.gradients.mean).all():
        return "its inputs or gradients on the calibration data are not finite"
    return ""


def _scale(rows: Tensor) -> Tensor:
    largest = rows.abs().amax() if rows.numel() else torch.zeros((), device=rows.device)
    return torch.where(largest > 0, largest, torch.ones_like(largest))
