"""Where the solver works, whatever torch's default device and precision are."""

from types import SimpleNamespace

import pytest
import torch
from small_modules import QUICK, loader, network
from torch import distributed as dist
from torch.nn import functional

from lrf_lightning import compress, distributed
from lrf_lightning.matmul_precision import matmul_precision
from lrf_lightning.solver.devices import check_one_device, solver_device
from lrf_lightning.solver.layers.latency import device_name
from lrf_lightning.solver.layers.moments import Moment


def loss(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def test_a_device_without_float64_is_left_to_its_model():
    assert solver_device(torch.device("mps")) == torch.device("cpu")
    assert solver_device(torch.device("cuda", 1)) == torch.device("cuda", 1)


def test_a_model_on_several_devices_is_refused():
    parameters = [SimpleNamespace(device=torch.device(name), is_meta=False) for name in ("cuda:1", "cpu", "cuda:1")]
    with pytest.raises(ValueError, match=r"lie on cpu, cuda:1; .* without device_map, or move it"):
        check_one_device(SimpleNamespace(parameters=lambda: parameters))
    check_one_device(network())


def test_another_default_device_changes_nothing():
    """What has no device of its own would be made there, and be of no use on the meta device."""
    torch.manual_seed(0)
    model, splits = network(), [list(loader(seed=seed)) for seed in (1, 2, 3)]
    options = QUICK | {"objective": "lossless", "rank_multiple": 1}
    expected = compress(model, loss, *splits, **options)
    with torch.device("meta"):
        found = compress(model, loss, *splits, **options)
    assert found.ranks == expected.ranks
    assert found.certificate.loss_change.mean == expected.certificate.loss_change.mean


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("cpu:gloo,cuda:gloo,hpu:gloo,xpu:gloo", ("cpu", "cpu")),
        ("cpu:gloo,cuda:nccl", ("cpu", "cpu")),
        ("cuda:nccl", ("cuda:3", "cuda:1")),
    ],
)
def test_tensors_travel_where_the_group_can(monkeypatch, config, expected):
    monkeypatch.setattr(dist, "get_backend_config", lambda *_: config)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    found = [distributed._travelling(torch.device(name)) for name in ("cpu", "cuda:1")]
    assert tuple(map(str, found)) == expected


def test_products_of_rows_are_not_rounded_by_autocast():
    rows = torch.randn(1, 500, 8) * torch.logspace(0, -3, 8) + 3
    exact, mixed = Moment(), Moment()
    exact.add(rows, rows)
    with torch.autocast("cpu", torch.bfloat16):
        mixed.add(rows, rows)
    assert torch.equal(mixed.mean, exact.mean)
    assert torch.linalg.eigvalsh(mixed.mean).min() > 0


def test_a_precision_that_was_set_by_backend_is_no_error(monkeypatch):
    def refuse():
        raise RuntimeError("PyTorch is checking whether allow_tf32_new is enabled")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuse)
    assert matmul_precision() is None
    assert device_name(torch.device("cpu")).endswith("precision by backend")
