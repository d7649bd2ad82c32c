"""The knapsack against all combinations, and the greedy fill against its literal definition."""

import itertools
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrf_lightning.solver.ranks.allocation import Option, allocate, cheapest, path


def random_options(seed, layers=4, ranks=4, gain=0.2):
    """Convex or not, with a first-order gain or not."""
    rng = random.Random(seed)
    options = {}
    for i in range(layers):
        unit = rng.randint(1, 9)
        choices = [Option(None, unit * (ranks + 1), 0.0)]
        choices += [Option(k, unit * k, rng.choice([-gain, 0.0]) + rng.random() * 4 / k) for k in range(1, ranks + 1)]
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
                # a loss against the present choice is accepted as long as the dense weight is no better
                if 0 < extra <= left and (gain >= 0 or option.change <= 0):
                    rate = gain / extra
                    if best is None or rate > best[0]:
                        best = (rate, name, option)
        if best is None:
            return chosen
        chosen[best[1]] = best[2]


def option_of(choices, rank):
    return next(option for option in choices if option.rank == rank)


@pytest.mark.parametrize("seed", range(20))
def test_every_allocation_of_the_path_is_the_best_at_its_cost(seed):
    """Among the allocations of no lower cost as long as gains are predicted, of no higher cost afterwards."""
    options = random_options(seed)
    everything, vertices = list(combinations(options)), path(options)
    lowest = min(range(len(vertices)), key=lambda i: vertices[i].change)
    for i, vertex in enumerate(vertices):
        costlier = [change for cost, change, _ in everything if cost >= vertex.cost]
        cheaper = [change for cost, change, _ in everything if cost <= vertex.cost]
        assert vertex.change == pytest.approx(min(costlier if i < lowest else cheaper), abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_the_path_holds_the_best_allocation_at_every_price(seed):
    options = random_options(seed)
    everything, vertices = list(combinations(options)), path(options)
    for price in (-10.0, -0.1, -0.01, 0.0, 0.001, 0.01, 0.05, 0.1, 0.5, 10.0):
        best = min(change + price * cost for cost, change, _ in everything)
        assert min(a.change + price * a.cost for a in vertices) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_the_path_is_nested_from_the_dense_model_to_the_lowest_cost(seed):
    options = random_options(seed)
    vertices = path(options)
    assert vertices[0].ranks == {}
    assert vertices[-1].cost == pytest.approx(min(cost for cost, _, _ in combinations(options))) == cheapest(options)
    prices = []
    for larger, smaller in itertools.pairwise(vertices):
        changed = [n for n in options if larger.ranks.get(n) != smaller.ranks.get(n)]
        assert len(changed) == 1
        assert smaller.cost < larger.cost
        prices.append((smaller.change - larger.change) / (larger.cost - smaller.cost))
    assert prices == pytest.approx(sorted(prices), abs=1e-9)


@pytest.mark.parametrize("gain", [0.0, 0.2])
@pytest.mark.parametrize("seed", range(20))
def test_allocations_meet_the_budget(seed, gain):
    options = random_options(seed, gain=gain)
    everything, dense = list(combinations(options)), sum(choices[0].cost for choices in options.values())
    largest_step = max(option.change for choices in options.values() for option in choices)
    for keep in (0.25, 0.4, 0.6, 0.8, 1.0):
        budget = keep * dense
        allocation, vertex = allocate(options, budget), next(a for a in path(options) if a.cost <= budget)
        assert vertex.cost <= allocation.cost <= budget
        chosen, start = (
            [option_of(choices, some.ranks.get(name)) for name, choices in options.items()]
            for some in (allocation, vertex)
        )
        assert allocation.cost == pytest.approx(sum(option.cost for option in chosen))
        assert allocation.change == pytest.approx(sum(option.change for option in chosen))
        for before, after in zip(start, chosen, strict=True):
            assert after.change <= max(before.change, 0.0)
        if not gain:  # then the gap of a knapsack to the optimum is below one exchange
            best = min(change for cost, change, _ in everything if cost <= budget)
            assert best - 1e-12 <= allocation.change <= best + largest_step


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


def test_a_gain_decides_what_is_cut_first_but_not_how_much():
    options = {
        "gains": [Option(None, 10, 0.0), Option(2, 8, -0.3), Option(1, 4, 0.5)],
        "loses": [Option(None, 10, 0.0), Option(2, 8, 0.1), Option(1, 4, 0.2)],
    }
    assert allocate(options, 20).ranks == {}
    assert allocate(options, 18).ranks == {"gains": 2}
    assert [allocation.ranks for allocation in path(options)[:2]] == [{}, {"gains": 2}]


def test_gains_on_all_ranks_do_not_cut_below_the_budget():
    options = {
        f"l{i}": [Option(None, 100, 0.0)] + [Option(k, 10 * k, 0.1 * k - 1) for k in range(1, 10)] for i in range(3)
    }
    for keep in (0.9, 0.6, 0.4):
        assert allocate(options, 300 * keep).cost == pytest.approx(300 * keep)


def test_equal_changes_are_cut_no_further_than_the_budget_asks():
    options = {"a": [Option(None, 10, 0.0), Option(3, 9, 0.0), Option(2, 6, 0.0), Option(1, 3, 0.0)]}
    assert [allocate(options, budget).ranks for budget in (10, 9, 8, 3)] == [{}, {"a": 3}, {"a": 2}, {"a": 1}]
    assert [allocation.cost for allocation in path(options)] == [10, 3]


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
