"""New running statistics of batch norms, against the statistics of all rows at once."""

import copy

import pytest
import torch
from process_groups import run_together
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

from lrf_lightning import Settings, compress
from lrf_lightning.distributed import current_processes
from lrf_lightning.solver.joint import calibrated
from lrf_lightning.solver.points.batch_norm import renormalized
from lrf_lightning.solver.points.frontier import Frontier

CPU = torch.device("cpu")


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8),
        nn.Flatten(), nn.Linear(32, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4),
    ).eval()  # fmt: skip


def loss(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def data(*sizes, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (3 + 2 * torch.randn(size, 2, 6, 6, generator=generator), torch.randint(4, (size,), generator=generator))
        for size in sizes
    ]


def test_one_batch_gives_the_statistics_of_a_training_pass():
    model, batches = network(), data(32)
    before = copy.deepcopy(model.state_dict())
    new = renormalized(model, loss, batches, CPU)
    expected = copy.deepcopy(model)
    for module in expected.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None
            module.train()
    with torch.no_grad():
        expected(batches[0][0])
    for name, value in new.state_dict().items():
        if "num_batches" in name:
            assert_close(value, before[name])
        else:
            assert_close(value, expected.state_dict()[name], rtol=1e-4, atol=1e-5)
    assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert not any(module.training for module in new.modules())


def test_the_first_norm_does_not_depend_on_how_the_data_is_cut():
    model, (whole,) = network(), data(30)
    parts = [(whole[0][a:b], whole[1][a:b]) for a, b in ((0, 7), (7, 23), (23, 30))]
    one, many = renormalized(model, loss, [whole], CPU)[1], renormalized(model, loss, parts, CPU)[1]
    assert_close(one.running_mean, many.running_mean)
    assert_close(one.running_var, many.running_var)


@pytest.mark.parametrize("sizes", [(), (1,), (1, 1)])
def test_without_a_batch_of_two_everything_stays(sizes):
    model = network()
    new = renormalized(model, loss, data(*sizes), CPU)
    assert_close(dict(new.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


def test_inputs_given_by_keyword():
    class ByKeyword(nn.Sequential):
        def forward(self, x):
            for layer in self:
                x = layer(input=x)
            return x

    plain = network()
    expected, found = (
        renormalized(model, loss, data(20, 12), CPU) for model in (plain, ByKeyword(*plain.children()).eval())
    )
    assert_close(found.state_dict(), expected.state_dict())


def test_large_means_do_not_cancel():
    model = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 2)).eval()
    model[0].running_mean.fill_(1e4)
    x = 1e4 + torch.randn(64, 1) * 1e-1
    new = renormalized(model, lambda m, b: m(b).sum(1), [x], CPU)
    assert_close(new[0].running_var, x.double().var(0).float(), rtol=1e-3, atol=0)


def test_values_that_are_not_finite_leave_a_norm_alone():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)).eval()
    x = torch.full((8, 2), torch.inf)
    new = renormalized(model, lambda m, b: m(b).sum(1), [x], CPU)
    assert_close(dict(new.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize(
    "model",
    [nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False), nn.Linear(2, 2))],
)
def test_models_without_running_statistics(model):
    assert renormalized(model.eval(), lambda m, b: m(b).sum(1), [torch.randn(4, 2)], CPU) is None


def _shared(rank, world):
    batches = data(8, 6, 4)
    new = renormalized(network(), loss, batches[rank::world], CPU, current_processes(CPU))
    return {name: value.clone() for name, value in new.state_dict().items()}


def test_processes_put_their_sums_together():
    alone = renormalized(network(), loss, data(8, 6, 4), CPU).state_dict()
    for found in run_together(_shared, 2):
        assert_close(found, dict(alone))


@pytest.mark.parametrize("helps", [True, False])
def test_the_selection_split_decides(helps):
    model, parts = network(), {name: data(32, seed=i) for i, name in enumerate(("calibration", "selection"))}
    # labels that depend on the images, so that good statistics matter
    parts = {name: [(x, model(x).argmax(1)) for x, _ in batches] for name, batches in parts.items()}
    if helps:
        with torch.no_grad():
            model[1].running_mean.add_(2.0)
    work, dense = calibrated(model, loss, parts, settings=Settings(objective="budget", points=2, batch_norm=True))
    frontier = Frontier(work, dense)
    point = frontier.at(0.6)
    plain = Frontier(calibrated(model, loss, parts, settings=Settings(objective="budget", batch_norm=False))[0], dense)
    untouched = plain.with_ranks(point.ranks)
    assert point.loss <= untouched.loss
    changed = not torch.equal(frontier.build(point.ranks)[1].running_mean, model[1].running_mean)
    assert changed == (point.loss < untouched.loss)
    assert ("new running statistics" in frontier.note(point)) == changed
    if helps:
        assert changed
    frontier.at(0.9)
    frontier._latest = None
    again = work.evaluate(frontier.build(point.ranks), "selection").measurement().loss
    assert again == pytest.approx(point.loss, rel=1e-6)


def test_the_paper_knows_nothing_of_it():
    result = compress(network(), loss, data(32), data(32, seed=2), data(32, seed=3), objective="paper", gamma=0.9)
    assert not result.settings.batch_norm
