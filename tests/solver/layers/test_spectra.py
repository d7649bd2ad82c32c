import math

import pytest
import torch
from torch import nn

from lrf_lightning.solver.layers.spectra import spectrum
from lrf_lightning.surgery import find_layers


def measured(module):
    (candidate,), _ = find_layers(nn.Sequential(module))
    return spectrum(candidate)


def linear(weight):
    module = nn.Linear(weight.shape[1], weight.shape[0])
    module.weight = nn.Parameter(weight)
    return module


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_figures_are_those_of_the_singular_values(shape):
    weight = torch.randn(shape)
    found = measured(linear(weight))
    values = torch.linalg.svdvals(weight.double())
    torch.testing.assert_close(found.singular_values, values)
    shares = values / values.sum()
    assert found.effective_rank == pytest.approx(math.exp(-float((shares * shares.log()).sum())))
    assert found.stable_rank == pytest.approx(float(values.square().sum() / values[0] ** 2))
    assert found.numerical_rank == 12
    kept = (12 * 20 - 1) // 32
    assert found.energy == pytest.approx(float(values[:kept].square().sum() / values.square().sum()))


def test_equal_and_few_singular_values():
    equal = measured(linear(torch.eye(8)))
    assert (equal.effective_rank, equal.stable_rank, equal.numerical_rank) == pytest.approx((8, 8, 8))
    low = measured(linear(torch.randn(16, 3) @ torch.randn(3, 24)))
    assert low.numerical_rank == 3
    assert low.effective_rank < 3.001
    assert low.energy == pytest.approx(1)


def test_groups_are_averaged():
    conv = nn.Conv2d(8, 8, 3, groups=2, bias=False)
    with torch.no_grad():
        conv.weight[:4] = 0
        conv.weight[4:] = torch.eye(4, 36).view(4, 4, 3, 3)
    found = measured(conv)
    assert (found.numerical_rank, found.effective_rank, found.stable_rank) == pytest.approx((2, 2, 2))
    torch.testing.assert_close(found.singular_values, torch.full((4,), math.sqrt(0.5), dtype=torch.float64))


def test_a_weight_of_zeros_and_one_that_is_not_finite():
    zero = measured(linear(torch.zeros(8, 8)))
    assert (zero.effective_rank, zero.stable_rank, zero.numerical_rank, zero.energy) == (0, 0, 0, 1)
    with pytest.raises(ValueError, match="the weight of '0' holds NaN"):
        measured(linear(torch.full((8, 8), math.nan)))


def test_short_dtypes():
    weight = torch.randn(8, 16).bfloat16()
    torch.testing.assert_close(measured(linear(weight)).singular_values, torch.linalg.svdvals(weight.double()))
