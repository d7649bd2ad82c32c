r"""Choose one rank per layer: the multiple-choice knapsack, by its Lagrangian.

Layer i offers options (cost c, predicted change of the loss J): its dense weight, with J = 0, and every allowed rank.
For a price lambda the best choice minimises sum J_i + lambda * sum c_i and separates over the layers; as lambda rises
from 0 the choices walk along the lower convex hull of each layer's options. The steps of all hulls, sorted by price,
are one path of nested allocations from the largest to the smallest model. Between two of its vertices the remaining
budget is filled greedily. (Sinha and Zoltners 1979, The multiple-choice knapsack problem.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Allocation", "Option", "allocate", "cheapest", "path"]


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
    """All allocations that are optimal for some price, from the cheapest change of the loss to the lowest cost.

    Args:
        options: every layer's options by name, each at least one.
    """
    return list(_walk(options))


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
    for allocation in _walk(options):
        if allocation.cost <= budget:
            return _fill(options, allocation, budget)
    raise ValueError(f"budget={budget:g} is below {cheapest(options):g}, the lowest cost that the layers can reach")


def _fill(options: Mapping[str, Sequence[Option]], start: Allocation, budget: float) -> Allocation:
    """Spend the rest of the budget on the exchange with the largest gain per cost until none fits."""
    chosen = {name: _option_of(choices, start.ranks.get(name)) for name, choices in options.items()}
    left = budget - start.cost
    while True:
        best: tuple[float, str, Option] | None = None
        for name, choices in options.items():
            now = chosen[name]
            for option in choices:
                gain, extra = now.change - option.change, option.cost - now.cost
                if gain > 0 and extra <= left:
                    rate = gain / extra if extra > 0 else float("inf")
                    if best is None or rate > best[0]:
                        best = (rate, name, option)
        if best is None:
            break
        _, name, option = best
        left -= option.cost - chosen[name].cost
        chosen[name] = option
    return _allocation(chosen)


def _hull(choices: Sequence[Option]) -> list[Option]:
    """Lower convex hull of (cost, change), starting at the lowest change and running towards lower cost."""
    start = min(choices, key=lambda option: (option.change, option.cost))
    hull = [start]
    for option in sorted(choices, key=lambda option: (-option.cost, option.change)):
        if option.cost >= hull[-1].cost:
            continue
        while len(hull) > 1 and _price(hull[-2], hull[-1]) >= _price(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _price(expensive: Option, cheap: Option) -> float:
    """Increase of the loss per unit of cost that is saved."""
    return (cheap.change - expensive.change) / (expensive.cost - cheap.cost)


def _walk(options: Mapping[str, Sequence[Option]]) -> Iterator[Allocation]:
    hulls = {name: _hull(choices) for name, choices in options.items()}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    yield _allocation(chosen)
    steps = sorted(
        (_price(hull[i], hull[i + 1]), i, name) for name, hull in hulls.items() for i in range(len(hull) - 1)
    )
    for _, index, name in steps:
        chosen[name] = hulls[name][index + 1]
        yield _allocation(chosen)


def _allocation(chosen: Mapping[str, Option]) -> Allocation:
    return Allocation(
        {name: option.rank for name, option in chosen.items() if option.rank is not None},
        sum(option.cost for option in chosen.values()),
        sum(option.change for option in chosen.values()),
    )


def _option_of(choices: Sequence[Option], rank: int | None) -> Option:
    return next(option for option in choices if option.rank == rank)
