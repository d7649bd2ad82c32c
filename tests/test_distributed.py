import itertools
import os
import signal
import time

import pytest
import torch
from process_groups import run_together
from small_modules import CLASSES, QUICK, clouds, network
from torch import nn
from torch.nn import functional

from lrf_lightning import LossTerms, StepOutput, compress
from lrf_lightning.distributed import PeerError, Processes, assigned
from lrf_lightning.solver.factors import decomposition

WORLDS = (1, 2, 3)


def loss(model, batch):
    x, y = batch
    return functional.cross_entropy(model(x), y, reduction="none")


def loss_of_outputs(model, batch):
    """A loss of several terms per sample, whose signs are drawn."""
    x, y = batch
    terms = LossTerms.of(functional.mse_loss(model(x), functional.one_hot(y, CLASSES).float(), reduction="none"))
    return StepOutput(terms.per_sample, terms=terms)


def batches(count, seed, size=16):
    """``count`` batches of which the last one is short."""
    if count == 0:
        return []
    x, y = clouds(count * size - 5, seed)
    return list(zip(x.split(size), y.split(size), strict=True))


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = nn.Sequential(*network(), nn.BatchNorm1d(CLASSES))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x, y = clouds()
    for _ in range(60):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def solved(rank, world, model, counts, options):
    """Every figure of a solve on this process's share of the batches."""
    shares = [batches(count, seed)[rank::world] for seed, count in enumerate(counts, start=1)]
    options = QUICK | options
    result = compress(model, options.pop("loss", loss), *shares, **options)
    products = {}
    for name in result.ranks:
        layer = result.model.get_submodule(name)
        products[name] = layer(torch.eye(layer.in_features)).detach()
    certificate = result.certificate
    figures = [certificate.loss_change, certificate.dense, certificate.compressed, result.dense, result.samples]
    return result.ranks, products, repr(result.frontier), repr(figures)


def images(count, seed):
    """Batches of twelve images whose eight channels are mixtures of four, the last one short."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(12 * count - 5, 4, 6, 6, generator=generator)
    x = torch.einsum("cs,nshw->nchw", torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), few)
    return list(zip(x.split(12), x.mean((1, 2, 3)).gt(0).long().split(12), strict=True))


def solved_with_convolutions(rank, world, model):
    """Ranks with the order of the factors, what the factorized layers do, and the frontier."""
    shares = [images(count, seed)[rank::world] for seed, count in enumerate((5, 3, 4), start=1)]
    result = compress(model, loss, *shares, **QUICK, objective="budget", keep=0.5)
    orders = {layer.name: (layer.rank, layer.order) for layer in result.layers if layer.rank is not None}
    example = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(5))
    outputs = {name: result.model.get_submodule(name)(example).detach() for name in orders if name != "6"}
    return orders, outputs, repr(result.frontier), repr(result.certificate.loss_change)


def numbers(text):
    """The numbers in a text, and the text without them."""
    from re import findall, sub

    pattern = r"-?\d+\.?\d*(?:e-?\d+)?"
    return torch.tensor([float(n) for n in findall(pattern, text)], dtype=torch.float64), sub(pattern, "#", text)


def assert_same_solution(outcomes, expected):
    for outcome in outcomes:
        assert not isinstance(outcome, str), outcome
        ranks, products, *texts = outcome
        assert ranks == expected[0]
        assert ranks
        for name, product in products.items():
            difference = torch.linalg.norm(product - expected[1][name])
            assert difference <= 1e-5 * torch.linalg.norm(expected[1][name])
        for text, other in zip(texts, expected[2:], strict=True):
            (found, rest), (wanted, wanted_rest) = numbers(text), numbers(other)
            assert rest == wanted_rest
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


class TestSolve:
    @pytest.mark.parametrize(
        "options",
        [
            {"objective": "lossless", "tolerance": 0.05, "score_tolerance": 0.05},
            {"objective": "budget", "memory_gib": 2e-5},  # several groups of layers, and a part of the batches
            {"objective": "budget", "compensation": False, "prediction": "energy"},
            {"objective": "budget", "loss": loss_of_outputs},
        ],
        ids=["lossless", "little memory", "energy", "terms"],
    )
    def test_is_the_same_for_any_number_of_processes(self, trained, options):
        expected = solved(0, 1, trained, (6, 5, 4), options)
        for world in WORLDS:
            assert_same_solution(run_together(solved, world, trained, (6, 5, 4), options), expected)

    def test_convolutions_get_the_same_orders(self):
        """Every order is decomposed by a process of its own."""
        torch.manual_seed(0)
        convolutions = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, (1, 3), groups=2), nn.ReLU()
        model = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 2))
        expected = solved_with_convolutions(0, 1, model)
        assert {order for _, order in expected[0].values()} & {"pointwise_first", "spatial_split"}
        for world in WORLDS[1:]:
            assert_same_solution(run_together(solved_with_convolutions, world, model), expected)

    def test_processes_without_a_batch(self, trained):
        options = {"objective": "budget"}
        expected = solved(0, 1, trained, (2, 1, 2), options)
        assert_same_solution(run_together(solved, 3, trained, (2, 1, 2), options), expected)

    def test_no_batch_at_all(self, trained):
        for outcome in run_together(solved, 2, trained, (0, 2, 2), {}):
            assert outcome.startswith("ValueError: calibration holds no batch")

    def test_all_get_the_buffers_of_the_first(self, trained):
        outcomes = run_together(solved_with_other_buffers, 2, trained)
        torch.testing.assert_close(outcomes[1], outcomes[0], rtol=0, atol=0)
        torch.testing.assert_close(outcomes[0], trained[5].running_mean, rtol=0, atol=0)


def solved_with_other_buffers(rank, world, model):
    model[5].running_mean.add_(rank)
    shares = [batches(2, seed)[rank::world] for seed in (1, 2, 3)]
    options = QUICK | {"objective": "budget", "batch_norm": False}
    return compress(model, loss, *shares, **options).model[5].running_mean


def fails_in_the_loss(rank, world, model, call):
    calls = itertools.count()

    def failing(model, batch):
        if rank == 1 and next(calls) == call:
            raise ArithmeticError("the loss is broken")
        return loss(model, batch)

    shares = [batches(4, seed)[rank::world] for seed in (1, 2, 3)]
    return compress(model, failing, *shares, **QUICK, objective="budget")


def fails_to_decompose(rank, world, model):
    if rank == 1:

        def broken(*args, **options):
            raise ArithmeticError("no convergence")

        decomposition.decomposed = broken
    return fails_in_the_loss(rank, world, model, -1)


def fails_to_load(rank, world, model):
    def broken():
        yield from batches(2, 1)
        raise OSError("the disk is gone")

    class Broken:
        __iter__ = staticmethod(broken)

    shares = [batches(4, seed)[rank::world] for seed in (1, 2, 3)]
    if rank == 1:
        shares[0] = Broken()
    return compress(model, loss, *shares, **QUICK, objective="budget")


def dies_in_the_loss(rank, world, model):
    def dying(model, batch):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(model, batch)

    shares = [batches(4, seed)[rank::world] for seed in (1, 2, 3)]
    return compress(model, dying, *shares, **QUICK, objective="budget")


def disagrees(rank, world, model, what):
    shares = [batches(4, seed)[rank::world] for seed in (1, 2, 3)]
    if what == "weights" and rank == 1:
        model[0].weight.data[0, 0] += 1
    if what == "nan" and rank == 1:
        model[0].weight.data[0, 0] = torch.nan
    keep = 0.4 + 0.1 * rank * (what == "settings")
    return compress(model, loss, *shares, **QUICK, objective="budget", keep=keep)


class TestFailures:
    # rank 1 has two batches of every split: it evaluates selection and the probing data, and makes two backward passes
    @pytest.mark.parametrize(
        ("call", "where"), [(0, "evaluation on selection"), (4, "the statistics"), (6, "the curves"), (20, "")]
    )
    def test_in_the_loss(self, trained, call, where):
        others, own = run_together(fails_in_the_loss, 2, trained, call)
        assert own == "ArithmeticError: the loss is broken"
        assert others.startswith("PeerError: process 1 failed in ")
        assert where in others
        assert others.endswith("ArithmeticError: the loss is broken")

    def test_in_a_decomposition(self, trained):
        first, own, last = run_together(fails_to_decompose, 3, trained)
        assert own == "ArithmeticError: no convergence"
        assert first == last == "PeerError: process 1 failed in the factorization: ArithmeticError: no convergence"

    def test_in_a_loader(self, trained):
        first, own = run_together(fails_to_load, 2, trained)
        assert own == "OSError: the disk is gone"
        assert first.startswith("PeerError: process 1 failed in")
        assert first.endswith("OSError: the disk is gone")

    def test_killed(self, trained):
        (outcome,) = run_together(dies_in_the_loss, 2, trained, group_timeout=10, survivors=[0])
        assert outcome.startswith("PeerError: another process was lost, or did not come within the timeout")

    @pytest.mark.parametrize(
        ("what", "message"),
        [
            ("settings", r"PeerError: the setting 'keep' differs: 0.4 on process 0, 0.5 on process 1.*no seed"),
            ("weights", r"PeerError: the sum of the bytes of the weight '0.weight' differs: .*no seed"),
            ("nan", r"(PeerError: process 1 failed in the copy of the model: )?ValueError: the weights of '0.weight'"),
        ],
    )
    def test_different_tasks(self, trained, what, message):
        for outcome in run_together(disagrees, 2, trained, what):
            with pytest.raises(PeerError, match=message):
                raise PeerError(outcome)


def takes_long(rank, world):
    return Processes(rank, world).patiently("sleeping", lambda: time.sleep(4 * rank) or rank)


def exchanges(rank, world):
    processes = Processes(rank, world)
    total, sent = torch.tensor([float(rank + 1)], dtype=torch.float64), torch.full((2,), float(rank)).bool()
    processes.sum_([total])
    processes.broadcast_([sent], 1)
    own = [number for number in range(7) if number % world == rank]
    assert len(own) == processes.share(7)
    assert own == [processes.index(position) for position in range(len(own))]
    return float(total), sent.tolist(), processes.interleaved(own), processes.of_first(rank + 5)


class TestProcesses:
    def test_long_work_of_one_does_not_trip_the_timeout_of_the_others(self):
        assert run_together(takes_long, 2, group_timeout=2) == [0, 1]

    def test_exchanges(self):
        assert run_together(exchanges, 3) == [(6.0, [True, True], list(range(7)), 5)] * 3

    def test_alone(self):
        alone = Processes()
        with alone.together("nothing"):
            assert alone.patiently("nothing", lambda: 3) == 3
        assert alone.gather(1) == alone.interleaved([1]) == [1]


@pytest.mark.parametrize("seed", range(20))
def test_assignment_is_within_grahams_bound_of_the_best(seed):
    generator = torch.Generator().manual_seed(seed)
    costs = torch.rand(6, generator=generator).square().tolist()
    processes = 2 + seed % 2

    def makespan(owners):
        return max(sum(c for c, owner in zip(costs, owners, strict=True) if owner == p) for p in range(processes))

    best = min(makespan(owners) for owners in itertools.product(range(processes), repeat=len(costs)))
    owners = assigned(costs, processes)
    assert len(owners) == len(costs)
    assert makespan(owners) <= (4 / 3 - 1 / (3 * processes)) * best + 1e-12


def test_assignment_of_equal_tasks_is_even():
    assert sorted(assigned([1.0] * 6, 3)) == [0, 0, 1, 1, 2, 2]
    assert assigned([], 2) == []
