"""The knapsack against all combinations, and the greedy fill against its literal definition."""

import itertools
import math
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrf_lightning.solver.allocation import Option, allocate, cheapest, path


def random_options(seed, layers=4, ranks=4):
    """Convex or not, with a first-order gain or not."""
    rng = random.Random(seed)
    options = {}
    for i in range(layers):
        unit = rng.randint(1, 9)
        choices = [Option(None, unit * (ranks + 1), 0.0)]
        choices += [Option(k, unit * k, rng.choice([-0.2, 0.0]) + rng.random() * 4 / k) for k in range(1, ranks + 1)]
        options[f"layer{i}"] = choices
    return options


def combinations(options):
    """Every allocation as (cost, change, ranks)."""
    for chosen in itertools.product(*options.values()):
        ranks = {name: o.rank for name, o in zip(options, chosen, strict=True) if o.rank is not None}
        yield sum(o.cost for o in chosen), sum(o.change for o in chosen), ranks


def literal_fill(options, start, budget):
    """The exchange with the largest gain per cost among all layers and options, again and again."""
    chosen = dict(start)
    while True:
        left = budget - sum(option.cost for option in chosen.values())
        best = None
        for name, choices in options.items():
            for option in choices:
                gain, extra = chosen[name].change - option.change, option.cost - chosen[name].cost
                if gain > 0 and extra <= left:
                    rate = gain / extra if extra > 0 else math.inf
                    if best is None or rate > best[0]:
                        best = (rate, name, option)
        if best is None:
            return chosen
        chosen[best[1]] = best[2]


def option_of(choices, rank):
    return next(option for option in choices if option.rank == rank)


@pytest.mark.parametrize("seed", range(20))
def test_every_allocation_of_the_path_is_the_best_at_its_cost(seed):
    options = random_options(seed)
    everything = list(combinations(options))
    for allocation in path(options):
        best = min(change for cost, change, _ in everything if cost <= allocation.cost)
        assert allocation.change == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_the_path_holds_the_best_allocation_at_every_price(seed):
    options = random_options(seed)
    everything, vertices = list(combinations(options)), path(options)
    for price in (0.0, 0.001, 0.01, 0.05, 0.1, 0.5, 10.0):
        best = min(change + price * cost for cost, change, _ in everything)
        assert min(a.change + price * a.cost for a in vertices) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_the_path_is_nested_from_the_lowest_change_to_the_lowest_cost(seed):
    options = random_options(seed)
    vertices = path(options)
    everything = list(combinations(options))
    assert vertices[0].change == pytest.approx(min(change for _, change, _ in everything))
    assert vertices[-1].cost == pytest.approx(min(cost for cost, _, _ in everything)) == cheapest(options)
    for larger, smaller in itertools.pairwise(vertices):
        changed = [n for n in options if larger.ranks.get(n) != smaller.ranks.get(n)]
        assert len(changed) == 1
        assert smaller.cost < larger.cost
        assert smaller.change >= larger.change
        before, after = (option_of(options[changed[0]], a.ranks.get(changed[0])) for a in (larger, smaller))
        assert after.cost < before.cost


@pytest.mark.parametrize("seed", range(20))
def test_allocations_meet_the_budget_and_come_close_to_the_optimum(seed):
    options = random_options(seed)
    everything, dense = list(combinations(options)), sum(choices[0].cost for choices in options.values())
    largest_step = max(option.change for choices in options.values() for option in choices)
    for keep in (0.25, 0.4, 0.6, 0.8, 1.0):
        budget = keep * dense
        allocation = allocate(options, budget)
        assert allocation.cost <= budget
        chosen = [option_of(choices, allocation.ranks.get(name)) for name, choices in options.items()]
        assert allocation.cost == pytest.approx(sum(option.cost for option in chosen))
        assert allocation.change == pytest.approx(sum(option.change for option in chosen))
        best = min(change for cost, change, _ in everything if cost <= budget)
        vertices = path(options)
        fitting = next(a for a in vertices if a.cost <= budget)
        # between the optimum and the vertex of the path that fits; the gap of a knapsack is below one exchange
        assert best - 1e-12 <= allocation.change <= fitting.change + 1e-12
        assert allocation.change <= best + largest_step


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.2, 1.0))
def test_the_fill_makes_the_exchanges_of_the_literal_greedy(seed, keep):
    options = random_options(seed, layers=5, ranks=6)
    budget = keep * sum(choices[0].cost for choices in options.values())
    start = next((a for a in path(options) if a.cost <= budget), None)
    if start is None:
        with pytest.raises(ValueError, match="is below"):
            allocate(options, budget)
        return
    chosen = literal_fill(options, {n: option_of(c, start.ranks.get(n)) for n, c in options.items()}, budget)
    expected = {name: option.rank for name, option in chosen.items() if option.rank is not None}
    allocation = allocate(options, budget)
    assert allocation.ranks == expected
    assert allocation.cost <= budget


def test_the_leftover_budget_is_spent():
    # the hull of "wide" skips rank 2, which the leftover just pays
    options = {
        "wide": [Option(None, 10, 0.0), Option(2, 6, 0.9), Option(1, 2, 1.0)],
        "narrow": [Option(None, 4, 0.0), Option(1, 1, 5.0)],
    }
    assert allocate(options, 10).ranks == {"wide": 2}
    assert allocate(options, 9.9).ranks == {"wide": 1}


def test_a_gain_is_taken_even_where_the_budget_allows_the_dense_layer():
    options = {"a": [Option(None, 10, 0.0), Option(2, 8, -0.3), Option(1, 4, 0.5)]}
    assert allocate(options, 10).ranks == {"a": 2}
    assert path(options)[0].ranks == {"a": 2}


def test_equal_changes_take_the_cheaper_choice():
    options = {"a": [Option(None, 10, 0.0), Option(3, 9, 0.0), Option(2, 6, 0.0), Option(1, 3, 0.0)]}
    assert allocate(options, 10).ranks == {"a": 1}
    assert len(path(options)) == 1


def test_a_layer_without_ranks_stays_dense():
    options = {"a": [Option(None, 10, 0.0)], "b": [Option(None, 10, 0.0), Option(1, 2, 0.1)]}
    assert allocate(options, 12).ranks == {"b": 1}
    assert cheapest(options) == 12


def test_fractional_costs_may_use_the_whole_budget():
    options = {f"l{i}": [Option(None, 0.1, 0.0), Option(1, 0.05, 0.1 + i)] for i in range(3)}
    budget = sum(choices[0].cost for choices in options.values())
    assert allocate(options, budget).ranks == {}


def test_an_impossible_budget_names_the_lowest_cost():
    with pytest.raises(ValueError, match="budget=3 is below 4, the lowest cost that the layers can reach"):
        allocate({"a": [Option(None, 10, 0.0), Option(1, 4, 0.5)]}, 3)


def test_200_layers_of_1000_ranks_take_seconds_at_most():
    rng = random.Random(0)
    options = {}
    for i in range(200):
        unit, weight = rng.randint(1000, 4000), rng.random()
        choices = [Option(None, unit * 1001, 0.0)]
        # noise makes the curve rough, so that the hull is small and the fill has much to do
        choices += [Option(k, unit * k, weight / k + rng.random() * 1e-3) for k in range(1, 1001)]
        options[f"layer{i}"] = choices
    budget = 0.3 * sum(choices[0].cost for choices in options.values())
    started = time.process_time()
    allocation = allocate(options, budget)
    assert time.process_time() - started < 4
    assert 0.999 * budget < allocation.cost <= budget
