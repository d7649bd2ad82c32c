"""Second moments of every layer's inputs and output gradients, from one pass over the calibration data.

For a layer with input rows x and output-gradient rows g the pass collects::

    A = E[x x']   (groups, n, n)        S = E[g g']   (groups, m, m)

over a random subset of the rows (tokens, spatial positions) of every sample. The gradient is that of the per-sample
loss, or, where a sample's loss is a mean over tokens or pixels, that of its terms with random signs, so that g g' has
the mean of the terms' own products. Products are taken in float32 on rows that are scaled to size 1, sums in float64.
Only the diagonal is kept of the inputs of an embedding, which are one-hot, and of a side beyond
:data:`~lrf_lightning.solver.layers.moments.LARGEST_SIDE`, such as the vocabulary of a language model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lrf_lightning.distributed import ALONE, Processes
from lrf_lightning.solver.layers.backward_passes import Use, backward_passes, scattered_loss
from lrf_lightning.solver.layers.layer_input import LayerInput
from lrf_lightning.solver.layers.layer_statistics import LayerStatistics, TiedUse, empty_statistics, whole_sides
from lrf_lightning.solver.layers.moments import Moment
from lrf_lightning.solver.layers.rows import UnreadableRowsError
from lrf_lightning.solver.running.evaluation import Batches, LossFunction
from lrf_lightning.solver.running.hooks import goes_back, in_function_transform
from lrf_lightning.surgery import Candidate

__all__ = ["UNREACHED", "RowSampler", "collect_statistics"]

NEVER_RAN = "did not run on the calibration data, or another module reads its weight directly"
NO_GRADIENT = "no gradient of the loss reaches it"
UNRECORDED = (
    f"{NO_GRADIENT}, since it runs under torch.no_grad, or in a checkpoint with use_reentrant=True whose inputs come "
    "from no observed layer (use_reentrant=False helps)"
)
UNREACHED = (NEVER_RAN, NO_GRADIENT, UNRECORDED)
TRANSFORMED = "is called inside a function transform of torch.func, such as vmap or jvp, where it cannot be observed"

Calls = dict[tuple[str, bool], float]


class RowSampler:
    """Chooses the rows of a sample that a moment is taken over, the same ones whenever the same batch is asked for."""

    def __init__(self, rows_per_feature: int, samples: int, seed: int) -> None:
        self.rows_per_feature, self.samples, self.seed = rows_per_feature, max(samples, 1), seed

    def positions(self, candidate: Candidate, available: int, batch_index: int, device: torch.device) -> Tensor | None:
        """Indices into the ``available`` rows of a sample, or None for all of them."""
        sides = [side for side, whole in whole_sides(candidate) if whole] or [1]
        wide, narrow = max(sides), min(candidate.rows, candidate.columns)
        # a moment over r rows costs r * wide^2, the layer itself samples * available * wide * narrow: stay near it
        affordable = 1.5 * self.samples * available * narrow / wide
        wanted = max(min(self.rows_per_feature * wide, affordable), 2 * wide)
        per_sample = max(1, math.ceil(wanted / self.samples))
        if per_sample >= available:
            return None
        generator = torch.Generator("cpu").manual_seed(hash((self.seed, batch_index, available)) % 2**63)
        return torch.randperm(available, generator=generator, device="cpu")[:per_sample].sort().values.to(device)


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
    seen: dict[str, int] = {}  # the order of the layers
    last_batch: dict[str, int] = {}
    calls: Calls = {(name, transposed): 0.0 for name in layers for transposed in (False, True)}

    def on_forward(use: Use, x: Tensor, output: Tensor, size: int, index: int) -> Callable[[Tensor], None] | None:
        name = use.name
        layer, part = layers[name], layers[name].use(transposed=use.transposed)
        first = not goes_back()  # a checkpointed part that runs again was counted when it ran first
        if first:
            layer.order = seen.setdefault(name, len(seen))
            layer.repeated = layer.repeated or last_batch.get(name) == index
            last_batch[name] = index
            layer.recorded = layer.recorded and torch.is_grad_enabled()
            layer.input_bytes = max(layer.input_bytes, x.numel() * x.element_size() / size)
        if layer.problem:
            return None
        try:
            available = _available_rows(part, x, size)
            positions = sampler.positions(layer.candidate, available, index, x.device)
            if first:
                _add_inputs(part, x, positions, size)
                rows = part.reader.rows(x, size)
                calls[name, use.transposed] += rows
                part.observed = part.observed or LayerInput.of(x, size, rows)
        except UnreadableRowsError as error:
            layer.problem = str(error)
            return None

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


def _available_rows(part: LayerStatistics | TiedUse, x: Tensor, size: int) -> int:
    if in_function_transform():
        raise UnreadableRowsError(TRANSFORMED)
    return part.reader.rows_per_sample(x, size)


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
        return NEVER_RAN
    if layer.gradients.rows == 0:
        return NO_GRADIENT if layer.recorded else UNRECORDED
    if not torch.isfinite(layer.inputs.mean).all() or not torch.isfinite(layer.gradients.mean).all():
        return "its inputs or gradients on the calibration data are not finite"
    return ""
