r"""Factors for given ranks, fitted to the inputs that the layers will really see.

Layers are replaced in execution order. Once layers upstream are replaced, a layer sees inputs y instead of x. The best
matrix of rank k for those inputs,

    min E || S^(1/2) (W x - W_k y) ||^2,

is found in closed form: T = W C B^(-1) with C = E[x y'] and B = E[y y'] is the least-squares answer without the rank
constraint, and W_k its truncation in the metric of S and B. Both moments are damped towards the identity, so that
directions without evidence keep the weight W. No labels, no gradient steps.

A pass runs the dense and the partly compressed model side by side over the calibration data for one group of layers;
the layers of a group do not see each other's replacement.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lrf_lightning.solver.evaluation import Batches, LossFunction, batch_size, evaluation_mode, to_device
from lrf_lightning.solver.factorization import factorize
from lrf_lightning.solver.hooks import observe_inputs
from lrf_lightning.solver.statistics import LayerStatistics, Moment, RowSampler
from lrf_lightning.surgery import factorized, replace_module

__all__ = ["build", "compensated_target"]


def build(
    model: nn.Module,
    layers: Mapping[str, LayerStatistics],
    ranks: Mapping[str, int],
    *,
    metric: str,
    damping: float,
    passes: int,
    loss: LossFunction,
    batches: Batches,
    device: torch.device,
    sampler: RowSampler,
    advance: Callable[[], None] = lambda: None,
) -> nn.Module:
    """A copy of the dense model in which the named layers have the given ranks.

    Args:
        model: dense model on ``device``; not changed.
        layers: statistics by name, in execution order.
        ranks: rank by name; layers that are missing stay dense.
        metric: metric of the factorization.
        damping: relative damping of the moments.
        passes: passes over the data, 0 for no compensation.
        loss: the user's loss; only its forward pass is used.
        batches: calibration data.
        device: where batches are moved to.
        sampler: chooses rows.
        advance: called after every batch.
    """
    compressed = copy.deepcopy(model)
    ordered = [name for name in layers if name in ranks]
    for number, group in enumerate(_groups(ordered, max(passes, 1))):
        moments: Mapping[str, tuple[Moment, Moment]] = {}
        if passes > 0 and number > 0:  # nothing upstream of the first group has changed
            moments = _paired_moments(
                model, compressed, {name: layers[name] for name in group}, loss, batches, device, sampler, advance
            )
        for name in group:
            target, inputs = _weight(layers[name]), layers[name].inputs.mean
            if name in moments:
                cross, inputs = moments[name][0].mean, moments[name][1].mean
                target = compensated_target(target, cross, inputs, damping)
            install(compressed, layers[name], ranks[name], target, inputs, metric=metric, damping=damping)
    return compressed


def install(
    model: nn.Module,
    layer: LayerStatistics,
    rank: int,
    target: Tensor,  # (g, m, n)
    input_moment: Tensor,  # (g, n, n)
    *,
    metric: str,
    damping: float,
) -> None:
    """Replace one layer of ``model`` by the factors of ``target``."""
    name = layer.candidate.name
    factors = factorize(
        target,
        None if metric == "euclidean" else input_moment,
        layer.gradients.mean if metric == "fisher" else None,
        damping=damping,
        max_rank=rank,
    )
    dense = dict(model.named_modules(remove_duplicate=False))[name]
    replace_module(model, name, factorized(dense, *factors.truncated(rank)))


def compensated_target(
    weight: Tensor,  # (g, m, n)
    cross_moment: Tensor,  # (g, n, n), E[x y']
    input_moment: Tensor,  # (g, n, n), E[y y']
    damping: float,
) -> Tensor:
    """The damped least-squares weight W (C + e I)(B + e I)^(-1) for the inputs y, in float64, shape (g, m, n)."""
    size = input_moment.shape[-1]
    mean = input_moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(size, dtype=torch.float64, device=weight.device)
    if damping == 0 or not bool((mean > 0).all()):
        # without damping null directions need a pseudo-inverse; a zero moment carries no evidence at all
        inverse = torch.linalg.pinv(input_moment, hermitian=True)
        correction: Tensor = cross_moment @ inverse + eye - input_moment @ inverse
    else:
        ridge = damping * mean * eye
        correction = torch.linalg.solve(input_moment + ridge, cross_moment + ridge, left=False)
    return weight.double() @ correction


def _paired_moments(
    model: nn.Module,
    compressed: nn.Module,
    layers: Mapping[str, LayerStatistics],
    loss: LossFunction,
    batches: Batches,
    device: torch.device,
    sampler: RowSampler,
    advance: Callable[[], None],
) -> dict[str, tuple[Moment, Moment]]:
    """Cross moment E[x y'] and moment E[y y'] of every layer, x from the dense model, y from the compressed one."""
    moments = {name: (Moment(), Moment()) for name in layers}
    dense_rows: dict[str, list[Tensor]] = {}
    dense_modules = {name: layer.candidate.modules_in(model) for name, layer in layers.items()}
    compressed_modules = {name: layer.candidate.modules_in(compressed) for name, layer in layers.items()}

    def rows(name: str, x: Tensor, size: int, index: int) -> Tensor:
        layer = layers[name]
        available = layer.reader.rows_per_sample(x, size)
        return layer.reader.inputs(x, sampler.positions(layer.candidate, available, index, x.device), size)

    with evaluation_mode(model), evaluation_mode(compressed), torch.no_grad():
        for index, batch in enumerate(batches):
            size, moved = batch_size(batch), to_device(batch, device)
            dense_rows.clear()

            def on_dense(name: str, x: Tensor, size: int = size, index: int = index) -> None:
                dense_rows.setdefault(name, []).append(rows(name, x, size, index))

            def on_compressed(name: str, y: Tensor, size: int = size, index: int = index) -> None:
                y_rows, x_rows = rows(name, y, size, index), dense_rows[name].pop(0)
                moments[name][0].add(x_rows, y_rows)
                moments[name][1].add(y_rows, y_rows)

            with observe_inputs(dense_modules, on_dense):
                loss(model, moved)
            with observe_inputs(compressed_modules, on_compressed):
                loss(compressed, moved)
            advance()
    return moments


def _groups(names: Sequence[str], count: int) -> list[list[str]]:
    """Split into ``count`` runs of nearly equal length, the first ones shorter; empty runs are dropped."""
    bounds = [round(i * len(names) / count) for i in range(count + 1)]
    return [list(names[a:b]) for a, b in itertools.pairwise(bounds) if b > a]


def _weight(layer: LayerStatistics) -> Tensor:
    return layer.candidate.matrices().double()
