r"""Choose one rank per layer: the multiple-choice knapsack, by its Lagrangian.

Layer i offers options (cost c, predicted change of the loss J): its dense weight, with J = 0, and every allowed rank.
For a price lambda the best choice minimises sum J_i + lambda * sum c_i and separates over the layers; as lambda rises
the choices walk along the lower convex hull of each layer's options. The steps of all hulls, sorted by price, are one
path of nested allocations from the dense model to the smallest one. Between two of its vertices the remaining budget is
filled greedily. (Sinha and Zoltners 1979, The multiple-choice knapsack problem.)

The path starts at the dense model even where smaller ones are predicted to be better, so its first prices may be
negative. A predicted gain decides what is cut first, never how much is cut: gains are the least certain predictions,
and with little data all layers together promised so much that far more was cut than had been asked for.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Allocation", "Option", "RanksKey", "allocate", "cheapest", "path", "ranks_key"]

RanksKey = tuple[tuple[str, int], ...]


def ranks_key(ranks: Mapping[str, int]) -> RanksKey:
    """Ranks by name as a key of dictionaries, whatever their order."""
    return tuple(sorted(ranks.items()))


@dataclass(frozen=True)
class Option:
    """One choice for a layer.

    Attributes:
        rank: the rank, None for the dense weight.
        cost: what the choice costs, in the unit of the budget.
        change: predicted change of the loss.
    """

    rank: int | None
    cost: float
    change: float


@dataclass(frozen=True)
class Allocation:
    """One choice for every layer; layers that stay dense are missing from ``ranks``."""

    ranks: dict[str, int]
    cost: float
    change: float


def path(options: Mapping[str, Sequence[Option]]) -> list[Allocation]:
    """All allocations that are optimal for some price, negative ones included, from the highest cost to the lowest.

    Args:
        options: every layer's options by name, each at least one.
    """
    chosen, steps = _start_and_steps(options)
    allocations = [_allocation(chosen)]
    for name, option in steps:
        chosen[name] = option
        allocations.append(_allocation(chosen))
    return allocations


def cheapest(options: Mapping[str, Sequence[Option]]) -> float:
    """The lowest cost that any allocation has."""
    return sum(min(option.cost for option in choices) for choices in options.values())


def allocate(options: Mapping[str, Sequence[Option]], budget: float) -> Allocation:
    """The allocation of the path that just fits, with what is left of the budget filled greedily.

    Args:
        options: every layer's options by name, each at least one.
        budget: largest total cost.

    Raises:
        ValueError: if even the cheapest options cost more than the budget.
    """
    chosen, steps = _start_and_steps(options)
    cost = sum(option.cost for option in chosen.values())
    for name, option in steps:
        if cost <= budget:
            break
        cost += option.cost - chosen[name].cost
        chosen[name] = option
    # summed anew, since the running sum of fractional costs may be off by rounding
    if sum(option.cost for option in chosen.values()) > budget:
        raise ValueError(f"budget={budget:g} is below {cheapest(options):g}, the lowest cost that the layers can reach")
    return _allocation(_filled(options, chosen, budget))


def _filled(options: Mapping[str, Sequence[Option]], start: Mapping[str, Option], budget: float) -> dict[str, Option]:
    """Spend the rest of the budget on the exchange with the largest gain per cost until none fits.

    Every exchange leads to a higher cost. A gain that is predicted for the cheaper choice is no reason to keep it.

    A layer's best exchange can only get worse as the budget shrinks, so that only the one on top of the heap needs to
    be looked up again.
    """
    chosen, names = dict(start), list(options)

    def entry(index: int, left: float) -> tuple[float, int, Option] | None:
        best = _best_exchange(options[names[index]], chosen[names[index]], left)
        return None if best is None else (-best[0], index, best[1])

    left = budget - sum(option.cost for option in chosen.values())
    heap = [found for index in range(len(names)) if (found := entry(index, left)) is not None]
    heapq.heapify(heap)
    while heap:
        _, index, option = heap[0]
        name = names[index]
        if option.cost - chosen[name].cost <= left:
            chosen[name] = option
            left = budget - sum(option.cost for option in chosen.values())
        found = entry(index, left)
        if found is None:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, found)
    return chosen


def _best_exchange(choices: Sequence[Option], now: Option, left: float) -> tuple[float, Option] | None:
    """The affordable, more expensive choice with the largest gain per additional cost, and that rate.

    None if every one is predicted to be worse than both the present choice and the dense weight.
    """
    best: tuple[float, Option] | None = None
    for option in choices:
        extra = option.cost - now.cost
        if 0 < extra <= left and option.change <= max(now.change, 0.0):
            rate = (now.change - option.change) / extra
            if best is None or rate > best[0]:
                best = (rate, option)
    return best


def _hull(choices: Sequence[Option]) -> list[Option]:
    """Lower convex hull of (cost, change), starting at the highest cost and running towards lower cost."""
    start = min(choices, key=lambda option: (-option.cost, option.change))
    hull = [start]
    for option in sorted(choices, key=lambda option: (-option.cost, option.change)):
        if option.cost >= hull[-1].cost:
            continue
        while len(hull) > 1 and _price(hull[-2], hull[-1]) >= _price(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _price(expensive: Option, cheap: Option) -> float:
    """Increase of the loss per unit of cost that is saved, negative where a gain is predicted."""
    return (cheap.change - expensive.change) / (expensive.cost - cheap.cost)


def _start_and_steps(options: Mapping[str, Sequence[Option]]) -> tuple[dict[str, Option], list[tuple[str, Option]]]:
    """The choices of the highest cost, and the exchanges that walk down all hulls in the order of their price."""
    hulls = {name: _hull(choices) for name, choices in options.items()}
    steps = sorted(
        (_price(hull[i], hull[i + 1]), i, name) for name, hull in hulls.items() for i in range(len(hull) - 1)
    )
    return {name: hull[0] for name, hull in hulls.items()}, [(name, hulls[name][i + 1]) for _, i, name in steps]


def _allocation(chosen: Mapping[str, Option]) -> Allocation:
    return Allocation(
        {name: option.rank for name, option in chosen.items() if option.rank is not None},
        sum(option.cost for option in chosen.values()),
        sum(option.change for option in chosen.values()),
    )
