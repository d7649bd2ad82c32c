import copy

import pytest
import torch
from small_modules import network
from torch import nn

from lrf_lightning import Settings
from lrf_lightning.solver.predictions.forecast import forecast

CPU = torch.device("cpu")


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def batches():
    return [(torch.randn(64, 12), torch.arange(64) % 4) for _ in range(2)]


def test_a_layer_of_low_rank_is_predicted_to_be_kept_at_its_rank():
    model = network()
    with torch.no_grad():
        model[2].weight.copy_(torch.randn(24, 2) @ torch.randn(2, 24) / 5)
    found = forecast(copy.deepcopy(model), loss, batches(), CPU, Settings())
    assert found.params["2"] <= 2 * 48
    before = sum(parameter.numel() for parameter in model.parameters())
    dense = {"0": 12 * 24, "2": 24 * 24, "4": 4 * 24}
    assert found.params_model == (before, before - sum(dense[name] - count for name, count in found.params.items()))


def test_a_wider_margin_keeps_less():
    model, data = network(), batches()
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight.mul_(3)
    margins = (1e-6, 0.02, 0.2, 10.0)
    found = [forecast(copy.deepcopy(model), loss, data, CPU, Settings(loss_margin=margin)) for margin in margins]
    kept = [item.params_model[1] for item in found]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[-1]
    assert all(item.loss_change <= margin / 2 for item, margin in zip(found, margins, strict=True))


def test_a_model_without_layers_keeps_everything():
    found = forecast(nn.Sequential(nn.Linear(12, 1)), lambda m, b: m(b[0])[:, 0] ** 2, batches(), CPU, Settings())
    assert (found.params, found.params_model) == ({}, (13, 13))


def test_no_data_is_an_error():
    with pytest.raises(ValueError, match="calibration holds no batch"):
        forecast(network(), loss, [], CPU, Settings())
