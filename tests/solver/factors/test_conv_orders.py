"""The orders of a convolution's factors against dense computations in float64."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from lrf_lightning import StepOutput, compress, load_compressed
from lrf_lightning.solver.factors.conv_orders import best_factors, decomposed, layer_factors
from lrf_lightning.solver.factors.factorization import damped
from lrf_lightning.surgery import find_layers

DAMPING = 1e-2


def candidate(groups=1, channels_in=8, channels_out=6, kernel=(3, 2), split=0):
    layer = nn.Conv2d(channels_in * groups, channels_out * groups, kernel, groups=groups).double()
    (found,), _ = find_layers(nn.ModuleDict({"layer": layer}))
    return replace(found, split=split)


def every(layer):
    return [replace(layer, split=split) for split in (None, 0, 1)]


def best_order(orders, target, inputs, outputs, *, damping, costs=None):
    """The order with the lowest score, and its components."""
    found = [
        (*decomposed(order, target, inputs, outputs, damping=damping, cost=cost), order)
        for order, cost in zip(orders, costs or [None] * len(orders), strict=True)
    ]
    _, factors, order = min(found, key=lambda item: item[0])
    return order, factors


def moment(groups, size, seed=0, rows=None):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, rows or 3 * size, size, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(groups, size, size, generator=generator, dtype=torch.float64)
    return x.transpose(1, 2) @ x / x.shape[1]


def product(candidate, left, right):
    """The weight (g, m, c k) that factors stand for."""
    groups, _, columns = candidate.groups, *candidate.sides
    weight = (left @ right).reshape(groups, candidate.rows, candidate.left_kernel, columns)
    return weight.transpose(2, 3).reshape(groups, candidate.rows, -1)


def error(candidate, factors, inputs, outputs):
    """Squared error of the weight in the damped metric, summed over the groups in the moments' own proportions."""
    difference = candidate.matrices().double() - product(candidate, *factors)
    traces = [m.diagonal(dim1=1, dim2=2).sum(1) for m in (inputs, outputs)]
    share = (traces[0] * traces[1])[:, None, None]
    a, s = damped(inputs, DAMPING), damped(outputs, DAMPING)
    return float((share * (s @ difference @ a @ difference.transpose(1, 2))).diagonal(dim1=1, dim2=2).sum())


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize("groups", [1, 3])
def test_all_components_are_the_weight(groups, split):
    layer = candidate(groups, split=split)
    inputs, outputs = moment(groups, layer.columns), moment(groups, layer.rows, 1)
    for moments in ((None, None), (inputs, None), (inputs, outputs)):
        factors = layer_factors(layer, layer.matrices(), *moments, damping=DAMPING, max_rank=layer.full_rank)
        assert_close(product(layer, factors.left, factors.right), layer.matrices())


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize("groups", [1, 3])
def test_without_moments_it_is_the_plain_singular_value_decomposition(groups, split):
    layer = candidate(groups, split=split)
    factors = layer_factors(layer, layer.matrices(), None, None, damping=DAMPING, max_rank=3)
    by_channels = layer.matrices().reshape(groups, layer.rows, -1, layer.left_kernel).transpose(2, 3).flatten(1, 2)
    left, values, right = torch.linalg.svd(by_channels, full_matrices=False)
    assert_close(factors.left @ factors.right, left[..., :3] * values[:, None, :3] @ right[:, :3])
    assert_close(factors.singular_values, values)
    assert factors.gains is None


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_errors_of_all_ranks_are_those_of_every_rank_by_itself(groups, split):
    layer = candidate(groups, split=split)
    inputs, outputs = moment(groups, layer.columns), moment(groups, layer.rows, 1)
    target = layer.matrices()
    _, factors = best_order([layer], target, inputs, outputs, damping=DAMPING)
    everything = error(layer, (factors.left[..., :0], factors.right[:, :0]), inputs, outputs)
    for rank in range(1, layer.max_rank + 1):
        best = error(layer, best_factors(layer, factors, rank, target, inputs, damping=DAMPING), inputs, outputs)
        truncated = error(layer, factors.truncated(rank), inputs, outputs)
        assert factors.gains[rank - 1] == pytest.approx(best / truncated, rel=1e-6)
        assert best < truncated < everything


@pytest.mark.parametrize("split", [0, 1])
def test_left_kernels_are_the_least_squares_answer(split):
    """Behind the right factor that was found, no other left one does better; the truth is a dense lstsq."""
    layer = candidate(split=split)
    inputs, outputs = moment(1, layer.columns), moment(1, layer.rows, 1)
    target = layer.matrices()
    factors = layer_factors(layer, target, inputs, outputs, damping=DAMPING, max_rank=4)
    left, right = best_factors(layer, factors, 4, target, inputs, damping=DAMPING)
    root = torch.linalg.cholesky(damped(inputs, DAMPING))[0]
    mixing = torch.einsum("rc,ab->racb", right[0], torch.eye(layer.left_kernel, dtype=torch.float64)).reshape(
        4 * layer.left_kernel, -1
    )
    kernels = torch.linalg.lstsq((mixing @ root).T, (target[0] @ root).T).solution.T
    assert_close(product(layer, left, right)[0], kernels @ mixing)


def test_inputs_that_lie_in_few_channels_are_kept_whole():
    """Channels that are mixtures of three need rank 3, however full the rank of the weight is."""
    layer = candidate(kernel=(3, 3))
    torch.manual_seed(0)
    images = torch.einsum("cs,nshw->nchw", torch.randn(8, 3), torch.randn(40, 3, 9, 9)).double()
    rows = torch.nn.functional.unfold(images, 3).transpose(1, 2).flatten(0, 1)[None]
    inputs = rows.transpose(1, 2) @ rows / rows.shape[1]
    order, factors = best_order(every(layer), layer.matrices(), inputs, moment(1, layer.rows), damping=1e-9)
    assert order.order == "pointwise_first"
    left, right = best_factors(order, factors, 3, layer.matrices(), inputs, damping=1e-9)
    new = order.stand_in(left, right)
    assert (new.rank, new.split) == (3, 0)
    assert_close(new(images), layer.module(images), rtol=1e-4, atol=1e-4)


def test_outputs_that_lie_in_few_directions_keep_the_kernel_first():
    layer = candidate(kernel=(3, 3))
    with torch.no_grad():
        few = torch.randn(6, 2).double() @ torch.randn(2, 72).double()
        layer.module.weight.copy_(few.reshape(layer.module.weight.shape))
    moments = moment(1, layer.columns), moment(1, layer.rows, 1)
    order, _ = best_order(every(layer), layer.matrices(), *moments, damping=1e-9)
    assert order.order == "kernel_first"


def test_a_weight_of_separable_kernels_is_split():
    """Every kernel a column times a row, of different columns and rows: only the split has a low rank."""
    layer = candidate(channels_in=4, channels_out=12, kernel=(3, 3))
    with torch.no_grad():
        torch.manual_seed(0)
        columns, rows = torch.randn(2, 4, 3).double(), torch.randn(12, 2, 3).double()
        layer.module.weight.copy_(torch.einsum("rca,orb->ocab", columns, rows))
    moments = moment(1, layer.columns), moment(1, layer.rows, 1)
    order, factors = best_order(every(layer), layer.matrices(), *moments, damping=1e-9)
    assert order.order == "spatial_split"
    images = torch.randn(5, 4, 9, 8).double()
    new = order.stand_in(*best_factors(order, factors, 2, layer.matrices(), moments[0], damping=1e-9))
    assert (new.rank, new.split) == (2, 1)
    assert (new.right_factor.shape, new.left_factor.shape) == ((2, 4, 3, 1), (12, 2, 1, 3))
    assert_close(new(images), layer.module(images), rtol=1e-4, atol=1e-4)


def test_the_order_is_chosen_at_equal_cost():
    """An order whose components cost half as much may keep twice as many, and wins if errors are alike."""
    layer = candidate(channels_in=8, channels_out=8, kernel=(3, 3))
    moments = moment(1, layer.columns), moment(1, layer.rows, 1)
    for cheap, wanted in enumerate(every(layer)):
        costs = [order.low_rank_params(1) / order.dense_params for order in every(layer)]
        costs[cheap] /= 4
        order, _ = best_order(every(layer), layer.matrices(), *moments, damping=DAMPING, costs=costs)
        assert order == wanted


@pytest.mark.parametrize("cost", ["flops", "latency"])
def test_a_stride_makes_mixing_channels_first_dear(cost):
    """At four times as many positions as the kernel; where parameters count, it is the best order here."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 16, (1, 3), stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2))

    def batches(seed):
        generator = torch.Generator().manual_seed(seed)
        few = torch.randn(60, 6, 16, 16, generator=generator)
        x = torch.einsum("cs,nshw->nchw", torch.randn(16, 6, generator=torch.Generator().manual_seed(9)), few)
        return [(x, x.mean((1, 2, 3)).gt(0).long())]

    def chosen(cost):
        options = {"objective": "budget", "keep": 0.8, "speed": "none", "include": ["0"], "probes": False}
        found = compress(model, per_sample, batches(1), batches(2), batches(3), cost=cost, **options)
        return next(layer.order for layer in found.layers if layer.name == "0")

    assert chosen("params") == "pointwise_first"
    assert chosen(cost) != "pointwise_first"


def test_a_zero_weight_stays_zero():
    layer = candidate()
    with torch.no_grad():
        layer.module.weight.zero_()
    moments = moment(1, layer.columns), moment(1, layer.rows, 1)
    for order in every(layer):
        _, factors = best_order([order], layer.matrices(), *moments, damping=DAMPING)
        left, right = best_factors(order, factors, 2, layer.matrices(), moments[0], damping=DAMPING)
        assert (left @ right).count_nonzero() == 0
        assert factors.gains is None or torch.equal(factors.gains, torch.ones_like(factors.gains))


@pytest.mark.parametrize("groups", [1, 3])
def test_moments_of_which_only_the_diagonal_is_known(groups):
    """The same as with the diagonal as a whole matrix, but for the kernels, which are not fitted anew."""
    layer = candidate(groups)
    entries = (
        torch.rand(groups, layer.columns, dtype=torch.float64),
        torch.rand(groups, layer.rows, dtype=torch.float64),
    )
    diagonal, whole = (
        layer_factors(layer, layer.matrices(), *moments, damping=DAMPING, max_rank=3)
        for moments in (entries, tuple(map(torch.diag_embed, entries)))
    )
    assert_close(diagonal.left @ diagonal.right, whole.left @ whole.right)
    order, factors = best_order(every(layer), layer.matrices(), *entries, damping=DAMPING)
    left, right = best_factors(order, factors, 2, layer.matrices(), entries[0], damping=DAMPING)
    assert left.shape[-1] == right.shape[-2] == 2


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize("damping", [0.0, DAMPING])
def test_dead_channels_and_duplicates(damping, split):
    layer = candidate(split=split)
    inputs = moment(1, layer.columns)
    entries = math.prod(layer.kernel)
    inputs[:, :entries], inputs[:, :, :entries] = 0, 0  # the first channel is dead
    zero = torch.zeros_like(inputs)
    for moments in ((inputs, moment(1, layer.rows, 1, rows=2)), (zero, moment(1, layer.rows)), (inputs, None)):
        _, factors = best_order([layer], layer.matrices(), *moments, damping=damping)
        left, right = best_factors(layer, factors, layer.max_rank, layer.matrices(), moments[0], damping=damping)
        assert torch.isfinite(left).all()
        assert torch.isfinite(right).all()
        assert ((factors.gains >= 0) & (factors.gains <= 1)).all()


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_weights_of_any_size(scale, split):
    layer = candidate(split=split)
    inputs, outputs = moment(1, layer.columns), moment(1, layer.rows, 1)
    plain = best_factors(
        layer,
        layer_factors(layer, layer.matrices(), inputs, outputs, damping=DAMPING, max_rank=3),
        3,
        layer.matrices(),
        inputs,
        damping=DAMPING,
    )
    target = layer.matrices() * scale
    factors = layer_factors(layer, target, inputs, outputs, damping=DAMPING, max_rank=3)
    scaled = best_factors(layer, factors, 3, target, inputs, damping=DAMPING)
    assert_close(product(layer, *scaled) / scale, product(layer, *plain))


def images(seed, samples=60):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 3, 8, 8, generator=generator)
    return [(x[i : i + 20], x[i : i + 20].mean((1, 2, 3)).gt(0).long()) for i in range(0, samples, 20)]


def per_sample(model, batch):
    logits = model(batch[0])
    losses = torch.nn.functional.cross_entropy(logits, batch[1], reduction="none")
    return StepOutput(losses, (logits.argmax(1) == batch[1]).float())


@pytest.mark.parametrize("order", ["kernel_first", "pointwise_first", "spatial_split", "best"])
@pytest.mark.parametrize("groups", [1, 2])
def test_solves_with_every_order(order, groups, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, stride=2, padding=1, groups=groups),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 2),
    )
    found = compress(
        model, per_sample, images(1), images(2), images(3), objective="budget", keep=0.4, conv_order=order, speed="none"
    )
    used = {layer.order for layer in found.layers if layer.rank is not None and layer.kind == "Conv2d"}
    if order != "best":
        assert used == {order}
    x = images(4)[0][0]
    with FlopCounterMode(display=False) as counter:
        found.model(x)
    assert found.flops_layers[1] == counter.get_total_flops() / 2 / len(x)
    again = load_compressed(model, found.save(tmp_path / "small"))
    assert torch.equal(again(x), found.model(x))
