"""The components of many layers: every process decomposes its share and sends it to the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lrf_lightning.distributed import assigned
from lrf_lightning.modules import LowRankModule
from lrf_lightning.solver.factors.conv_orders import best_factors, decomposed, order_cost
from lrf_lightning.solver.factors.factorization import Factors
from lrf_lightning.solver.layers.latency import ratio_at
from lrf_lightning.solver.layers.layer_statistics import LayerStatistics
from lrf_lightning.solver.workspace import Workspace
from lrf_lightning.surgery import Candidate

__all__ = ["decompose", "owners", "stand_in"]


def decompose(
    work: Workspace, layers: Mapping[str, LayerStatistics], advance: Callable[[], None] = lambda: None
) -> dict[str, Factors]:
    """Components of some layers in the metric.

    Convolutions get the best order of their factors, each of which is a task of its own.
    """
    processes = work.processes
    orders = {name: layer.candidate.orders(work.settings.conv_order) for name, layer in layers.items()}
    costs = {(name, order.split): order_cost(order) for name, found in orders.items() for order in found}
    shared_out = dict(zip(costs, assigned(costs.values(), processes.size), strict=True))
    own: dict[str, tuple[float, Factors]] = {}  # of the best order of those that are decomposed here
    found_here: dict[tuple[str, int | None], tuple[float, Tensor | None]] = {}  # scores and gains

    def decompose_own() -> None:
        for name, layer in layers.items():
            for order in orders[name]:
                if shared_out[name, order.split] == processes.rank:
                    score, factors = _in_order(work, layer, order, alone=len(orders[name]) == 1)
                    found_here[name, order.split] = score, factors.gains
                    if name not in own or score < own[name][0]:
                        own[name] = score, factors
            advance()

    processes.patiently("the factorization", decompose_own)
    known = {task: found for part in processes.gather(found_here) for task, found in part.items()}
    result = {}
    for name, layer in layers.items():
        best = min(((name, order.split) for order in orders[name]), key=lambda task: known[task][0])
        layer.set_order(best[1])
        factors = own[name][1] if shared_out[best] == processes.rank else None
        result[name] = replace(_sent(work, factors, layer.candidate, shared_out[best]), gains=known[best][1])
    return result


def stand_in(work: Workspace, layer: LayerStatistics, factors: Factors, rank: int) -> LowRankModule:
    """The low-rank layer of a rank, from components of the weight itself."""
    candidate, settings = layer.candidate, work.settings
    inputs = None if settings.metric == "euclidean" else layer.inputs.mean
    best = best_factors(candidate, factors, rank, candidate.matrices(), inputs, damping=settings.damping)
    return candidate.stand_in(*best)


def owners(work: Workspace, layers: Mapping[str, LayerStatistics]) -> dict[str, int]:
    """The process that decomposes each layer, in the order of its factors that was chosen."""
    costs = [order_cost(layer.candidate) for layer in layers.values()]
    return dict(zip(layers, assigned(costs, work.processes.size), strict=True))


def _in_order(work: Workspace, layer: LayerStatistics, order: Candidate, *, alone: bool) -> tuple[float, Factors]:
    settings = work.settings
    inputs = None if settings.metric == "euclidean" else layer.inputs.mean
    outputs = layer.gradients.mean if settings.metric == "fisher" else None
    cost = None if alone else _cost_of_component(work, layer, order)
    return decomposed(order, order.matrices(), inputs, outputs, damping=settings.damping, cost=cost)


def _cost_of_component(work: Workspace, layer: LayerStatistics, order: Candidate) -> float:
    """What one component costs in an order, as a share of the dense layer, in the unit of the setting ``cost``."""
    by_params = order.low_rank_params(1) / order.dense_params
    if work.settings.cost == "params":
        return by_params
    ordered = replace(layer)
    ordered.set_order(order.split)
    rank = min(max(1, round(0.5 / by_params)), order.max_rank)
    if work.settings.cost == "flops":
        return ordered.flops(rank) / ordered.flops(None) / rank
    measured = ratio_at(ordered, rank, work.device)
    return by_params if measured is None else measured / rank


def _sent(work: Workspace, factors: Factors | None, candidate: Candidate, source: int) -> Factors:
    if factors is None:
        rows, columns = candidate.sides
        shapes = (
            (candidate.groups, rows, candidate.max_rank),
            (candidate.groups, candidate.max_rank, columns),
            (candidate.groups, candidate.full_rank),
        )
        factors = Factors(*(torch.zeros(shape, dtype=torch.float64, device=work.device) for shape in shapes))
    work.processes.broadcast_([factors.left, factors.right, factors.singular_values], source)
    return factors
