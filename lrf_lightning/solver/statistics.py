"""Second moments of every layer's inputs and output gradients, from one pass over the calibration data.

For a layer with input rows x and output-gradient rows g the pass collects::

    A = E[x x']   (groups, n, n)        S = E[g g']   (groups, m, m)

over a random subset of the rows (tokens, spatial positions) of every sample. The gradient is that of the per-sample
loss, or, where a sample's loss is a mean over tokens or pixels, that of its terms with random signs, so that g g' has
the mean of the terms' own products. Products are taken in float32 on rows that are scaled to size 1, sums in float64.
Only the diagonal is kept of the inputs of an embedding, which are one-hot, and of a side beyond
:data:`~lrf_lightning.solver.factorization.LARGEST_SIDE`, such as the vocabulary of a language model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lrf_lightning.distributed import ALONE, Processes
from lrf_lightning.solver.conv_rows import ConvRows
from lrf_lightning.solver.evaluation import (
    Batches,
    LossFunction,
    StepOutput,
    batch_size,
    evaluation_mode,
    step,
    to_device,
)
from lrf_lightning.solver.factorization import LARGEST_SIDE
from lrf_lightning.solver.hooks import frozen_parameters, observe_gradients
from lrf_lightning.solver.layer_input import LayerInput
from lrf_lightning.solver.rows import RowReader, UnreadableRowsError, row_reader
from lrf_lightning.surgery import Candidate

__all__ = [
    "LayerStatistics",
    "Moment",
    "RowSampler",
    "TiedUse",
    "Use",
    "backward_passes",
    "collect_statistics",
    "empty_statistics",
    "memory_groups",
    "scattered_loss",
    "summed_loss",
]


@dataclass
class Moment:
    """A running sum of outer products u v', or of their diagonals u * v, in float64."""

    total: Tensor | None = None  # (g, a, b), or (g, a)
    rows: int = 0
    diagonal: bool = False

    def add(
        self,
        u: Tensor,  # (g, rows, a)
        v: Tensor,  # (g, rows, b)
    ) -> None:
        """Add the outer products of matching rows."""
        if self.diagonal:
            self.add_sum((u.double() * v.double()).sum(1), u.shape[1])
            return
        u, v = u.float(), v.float()
        u_scale, v_scale = _scale(u), _scale(v)
        product = ((u / u_scale).transpose(1, 2) @ (v / v_scale)).double() * (u_scale.double() * v_scale.double())
        self.add_sum(product, u.shape[1])

    def add_sum(
        self,
        total: Tensor,  # (g, a, b), or (g, a) for a diagonal
        rows: int,
    ) -> None:
        """Add a sum over some rows."""
        self.total = total if self.total is None else self.total + total
        self.rows += rows

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
        """The mean outer product, or its diagonal."""
        assert self.total is not None
        return self.total / self.rows


@dataclass
class TiedUse:
    """What one pass says about modules that read a layer's weight transposed, in their own orientation.

    Attributes:
        module: the first of them.
        reader: how their rows are read.
        inputs: moment of their input rows, which belong to the output side of the layer.
        gradients: moment of their output-gradient rows, which belong to the input side of the layer.
        rows_per_sample: tokens per sample.
        observed: the input of their first call, None if they never ran.
    """

    module: nn.Module
    reader: RowReader
    inputs: Moment
    gradients: Moment
    rows_per_sample: float = 0.0
    observed: LayerInput | None = None


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
        observed: the input of its first call, None if it never ran.
        repeated: whether it runs several times in one pass.
        input_bytes: largest size of its input per sample.
        order: place of the layer's first call in the execution order, -1 if it never ran.
        problem: why the layer cannot be used, empty if it can.
        tied: modules that read the weight transposed, None if there are none; once the pass is over, ``inputs`` and
            ``gradients`` hold their part.
    """

    candidate: Candidate
    reader: RowReader
    inputs: Moment = field(default_factory=Moment)
    gradients: Moment = field(default_factory=Moment)
    samples: int = 0
    rows_per_sample: float = 0.0
    observed: LayerInput | None = None
    repeated: bool = False
    input_bytes: float = 0.0
    order: int = -1
    problem: str = ""
    tied: TiedUse | None = None

    def flops(self, rank: int | None) -> int:
        """Multiply-adds per sample at a rank, or of the dense layer for None; a lookup in a dense table costs none."""
        candidate, looked_up = self.candidate, isinstance(self.candidate.module, nn.Embedding)
        tied = 0.0 if self.tied is None else self.tied.rows_per_sample
        products, lookups = (tied, self.rows_per_sample) if looked_up else (self.rows_per_sample, tied)
        if rank is None:
            return round(candidate.dense_params * products)
        if candidate.split is not None:
            rows, columns = candidate.sides
            return round(candidate.groups * rank * (rows * products + columns * self._rows_between))
        entry = candidate.rows if looked_up else candidate.columns
        return round(candidate.low_rank_params(rank) * products + rank * entry * lookups)

    @property
    def _rows_between(self) -> float:
        """Rows per sample that the right factor puts out, more than of the output where the left one has a stride."""
        if self.observed is None:
            return self.rows_per_sample
        assert isinstance(self.reader, ConvRows)
        shape = self.observed.shape
        return self.rows_per_sample * shape[0] * self.reader.positions_between(shape) / self.observed.rows

    def set_order(self, split: int | None) -> None:
        """Set the order of a convolution's factors."""
        if self.candidate.split != split:
            self.candidate = replace(self.candidate, split=split)
            self.reader = row_reader(self.candidate)

    def use(self, *, transposed: bool) -> LayerStatistics | TiedUse:
        """The part of the modules that read the weight as the layer does, or transposed."""
        if not transposed:
            return self
        assert self.tied is not None
        return self.tied


class RowSampler:
    """Chooses the rows of a sample that a moment is taken over, the same ones whenever the same batch is asked for."""

    def __init__(self, rows_per_feature: int, samples: int, seed: int) -> None:
        self.rows_per_feature, self.samples, self.seed = rows_per_feature, max(samples, 1), seed

    def positions(self, candidate: Candidate, available: int, batch_index: int, device: torch.device) -> Tensor | None:
        """Indices into the ``available`` rows of a sample, or None for all of them."""
        sides = [side for side, whole in _sides(candidate) if whole] or [1]
        wide, narrow = max(sides), min(candidate.rows, candidate.columns)
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
    layers = {c.name: empty_statistics(model, c) for c in candidates}
    seen: list[str] = []
    last_batch: dict[str, int] = {}
    calls: Calls = {(name, transposed): 0.0 for name in layers for transposed in (False, True)}

    def on_forward(use: Use, x: Tensor, output: Tensor, size: int, index: int) -> Callable[[Tensor], None] | None:
        name = use.name
        layer, part = layers[name], layers[name].use(transposed=use.transposed)
        if name not in seen:
            layer.order = len(seen)
            seen.append(name)
        layer.repeated = layer.repeated or last_batch.get(name) == index
        last_batch[name] = index
        layer.input_bytes = max(layer.input_bytes, x.numel() * x.element_size() / size)
        if layer.problem:
            return None
        try:
            available = part.reader.rows_per_sample(x, size)
            positions = sampler.positions(layer.candidate, available, index, x.device)
            _add_inputs(part, x, positions, size)
        except UnreadableRowsError as error:
            layer.problem = str(error)
            return None
        calls[name, use.transposed] += available * size
        part.observed = part.observed or LayerInput.of(x, size, available * size)

        def on_gradient(grad: Tensor) -> None:
            grad_rows = part.reader.gradients(grad, positions, size)
            part.gradients.add(grad_rows, grad_rows)

        return on_gradient

    with processes.together("the statistics"):
        targets = [scattered_loss(sampler.seed)]
        samples = backward_passes(
            model, layers, loss, batches, device, on_forward, lambda *_: advance(), targets, processes
        )
    samples = _merge(layers, calls, samples, processes, device)
    if samples == 0:
        raise ValueError("calibration holds no batch; give a loader that yields at least one and can be iterated again")
    for name, layer in layers.items():
        layer.samples, layer.rows_per_sample = samples, calls[name, False] / samples
        if layer.tied is not None:
            layer.tied.rows_per_sample = calls[name, True] / samples
            _unite(layer, layer.tied)
        layer.problem = layer.problem or _problem(layer)
    return dict(sorted(layers.items(), key=lambda item: item[1].order))


@dataclass(frozen=True)
class Use:
    """Modules that share a layer's weight and read it in the same way.

    Attributes:
        name: name of the layer.
        transposed: whether they read it transposed.
        modules: the modules, in the model that is run; the bias of the first stands for all.
        reader: how their rows are read.
    """

    name: str
    transposed: bool
    modules: tuple[nn.Module, ...]
    reader: RowReader


Calls = dict[tuple[str, bool], float]
# what a backward pass starts from, for the output of a step, the size of its batch and its index among all batches
BackwardTarget = Callable[[StepOutput, int, int], Tensor]


def _uses(model: nn.Module, layer: LayerStatistics) -> Iterator[Use]:
    candidate = layer.candidate
    names = (candidate.name, *candidate.twins)
    modules = dict(zip(names, candidate.modules_in(model), strict=True))
    own = tuple(module for name, module in modules.items() if name not in candidate.transposed)
    yield Use(candidate.name, False, own, layer.reader)
    if layer.tied is not None:
        yield Use(candidate.name, True, tuple(modules[name] for name in candidate.transposed), layer.tied.reader)


def backward_passes(
    model: nn.Module,
    layers: Mapping[str, LayerStatistics],
    loss: LossFunction,
    batches: Batches,
    device: torch.device,
    on_forward: Callable[[Use, Tensor, Tensor, int, int], Callable[[Tensor], None] | None],
    after_backward: Callable[[int, int], None],
    targets: Sequence[BackwardTarget],
    processes: Processes = ALONE,
) -> int:
    """Run forward and backward over this process's batches and return the number of their samples.

    ``on_forward`` also gets the batch's size and its index among all batches. Every target has a pass of its own, those
    after the first one only for batches whose loss has terms. Then ``after_backward`` is called with the size and the
    index of the target.
    """
    samples = 0
    uses = {(use.name, use.transposed): use for layer in layers.values() for use in _uses(model, layer)}
    modules = {key: use.modules for key, use in uses.items()}
    with evaluation_mode(model), frozen_parameters([model]):
        for position, batch in enumerate(batches):
            size, index = batch_size(batch), processes.index(position)
            samples += size

            def observe(key: tuple[str, bool], x: Tensor, y: Tensor, size: int = size, index: int = index) -> Any:
                return on_forward(uses[key], x, y, size, index)

            batch = to_device(batch, device)
            for i, target in enumerate(targets):
                # a forward pass again: not every kind of module bears going back twice, compiled ones do not
                with observe_gradients(modules, observe):
                    has_terms = _backward(model, loss, batch, size, index, target)
                after_backward(size, i)
                if not has_terms:
                    break
    return samples


def _backward(model: nn.Module, loss: LossFunction, batch: Any, size: int, index: int, target: BackwardTarget) -> bool:
    """One forward and backward pass from a target, of which nothing is kept; whether the loss has terms."""
    output = step(model, loss, batch, size)
    total = summed_loss(output, size, index).detach()
    if not torch.isfinite(total):
        raise ValueError(
            f"the loss of calibration batch {index} is {float(total / size)}; it must be finite. "
            "Check the batch and the weights for NaN"
        )
    start = target(output, size, index)
    if start.requires_grad:
        start.backward()  # type: ignore[no-untyped-call]
    return output.terms is not None


def summed_loss(output: StepOutput, size: int, index: int) -> Tensor:
    """The sum of the per-sample losses; a scalar loss is taken for the mean over its batch."""
    return output.loss.sum() if output.loss.dim() == 1 else output.loss * size


def scattered_loss(seed: int) -> BackwardTarget:
    """What second moments of gradients start from: the terms with random signs, or :func:`summed_loss` without terms.

    See :meth:`~lrf_lightning.solver.loss_terms.LossTerms.scattered`. The signs depend on the index of the batch, not on
    the process that has it.
    """

    def total(output: StepOutput, size: int, index: int) -> Tensor:
        if output.terms is None:
            return summed_loss(output, size, index)
        generator = torch.Generator().manual_seed(hash((seed, index)) % 2**63)
        return output.terms.scattered(generator).sum()

    return total


def memory_groups(candidates: Iterable[Candidate], limit: float) -> Iterator[list[Candidate]]:
    """Cut the layers into runs whose statistics fit into ``limit`` bytes; a larger layer is a run of its own."""
    group: list[Candidate] = []
    used = 0.0
    for candidate in candidates:
        size = 8.0 * candidate.groups * sum(side**2 if whole else side for side, whole in _sides(candidate))
        if group and used + size > limit:
            yield group
            group, used = [], 0.0
        group.append(candidate)
        used += size
    if group:
        yield group


def _sides(candidate: Candidate) -> tuple[tuple[int, bool], tuple[int, bool]]:
    """Output and input side of a layer, and whether the whole moment is kept or only its diagonal."""
    embedding = isinstance(candidate.module, nn.Embedding)
    tables = (not embedding and bool(candidate.transposed), embedding)  # which side counts the entries of a table
    outputs, inputs = (
        (side, side <= LARGEST_SIDE and not table)
        for side, table in zip((candidate.rows, candidate.columns), tables, strict=True)
    )
    return outputs, inputs


def empty_statistics(model: nn.Module, candidate: Candidate) -> LayerStatistics:
    """Statistics of a layer before any pass."""
    (_, whole_outputs), (_, whole_inputs) = _sides(candidate)
    layer = LayerStatistics(
        candidate, row_reader(candidate), Moment(diagonal=not whole_inputs), Moment(diagonal=not whole_outputs)
    )
    if candidate.transposed:
        twin = model.get_submodule(candidate.transposed[0])
        mirrored = replace(candidate, module=twin, rows=candidate.columns, columns=candidate.rows)
        layer.tied = TiedUse(
            twin, row_reader(mirrored), Moment(diagonal=not whole_outputs), Moment(diagonal=not whole_inputs)
        )
    return layer


def _add_inputs(part: LayerStatistics | TiedUse, x: Tensor, positions: Tensor | None, size: int) -> None:
    if part.inputs.diagonal:
        part.inputs.add_sum(*part.reader.squared_inputs(x, positions, size))
    else:
        rows = part.reader.inputs(x, positions, size)
        part.inputs.add(rows, rows)


def _unite(layer: LayerStatistics, tied: TiedUse) -> None:
    """Put the moments of both uses of a weight together.

    The curvature is a sum of two Kronecker products; the one product nearest to it in spirit weighs the moments of each
    side, scaled to trace 1, by the share that their use has in the trace of the whole.
    """
    parts = [
        (layer.inputs, layer.gradients, layer.rows_per_sample),
        (tied.gradients, tied.inputs, tied.rows_per_sample),
    ]
    inputs, gradients = Moment(diagonal=layer.inputs.diagonal), Moment(diagonal=layer.gradients.diagonal)
    for a, s, rows in parts:
        if a.total is None or s.total is None:
            continue
        traces = _trace(a.mean), _trace(s.mean)
        share = rows * traces[0] * traces[1]
        for united, moment, trace in ((inputs, a, traces[0]), (gradients, s, traces[1])):
            united.add_sum(moment.mean * (share / trace if trace > 0 else 0.0), 0)
    for united in (inputs, gradients):
        united.rows = int(united.total is not None)
    layer.inputs, layer.gradients = inputs, gradients
    tied.inputs.forget()
    tied.gradients.forget()


def _trace(moment: Tensor) -> float:
    return float(moment.sum() if moment.dim() == 2 else moment.diagonal(dim1=-2, dim2=-1).sum())


def _merge(
    layers: Mapping[str, LayerStatistics],
    calls: Calls,
    samples: int,
    processes: Processes,
    device: torch.device,
) -> int:
    """Let every process know what all of them have seen; returns the number of all samples."""
    if processes.size == 1:
        return samples
    own = {
        name: (
            layer.order,
            layer.repeated,
            layer.input_bytes,
            layer.problem,
            calls[name, False],
            calls[name, True],
            (layer.observed, None if layer.tied is None else layer.tied.observed),
        )
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
        calls[name, False], calls[name, True] = sum(f[4] for f in facts), sum(f[5] for f in facts)
        for use, part in ((False, layer), (True, layer.tied)):
            if part is not None:
                part.observed = next((f[6][use] for f in facts if f[6][use] is not None), None)
        if layer.problem or layer.order < 0:
            continue
        tied = () if layer.tied is None else (layer.tied.inputs, layer.tied.gradients)
        for moment in (layer.inputs, layer.gradients, *tied):
            moment.merge(processes, device)
    return sum(count for count, _ in gathered)


def _problem(layer: LayerStatistics) -> str:
    if layer.order < 0 or layer.inputs.rows == 0:
        return "did not run on the calibration data, or another module reads its weight directly"
    if layer.gradients.rows == 0:
        return "no gradient of the loss reaches it"
    if not torch.isfinite(layer.inputs.mean).all() or not torch.isfinite(layer.gradients.mean).all():
        return "its inputs or gradients on the calibration data are not finite"
    return ""


def _scale(rows: Tensor) -> Tensor:
    largest = rows.abs().amax() if rows.numel() else torch.zeros((), device=rows.device)
    return torch.where(largest > 0, largest, torch.ones_like(largest))
