"""On CUDA devices: the solver against the CPU, the callback, mixed precision, and two processes with gloo and NCCL."""

import copy
import tempfile

import pytest
import torch
from launching import check, notes, started, started_on_two_nodes
from small_modules import QUICK, Classifier, clouds, loader, network, trainer
from torch import distributed as dist
from torch import multiprocessing as mp
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lrf_lightning import LowRankCompression, compress, load_compressed

DEVICE = "cuda"

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def loss(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def trained():
    torch.manual_seed(0)
    model, (x, y) = network(48), clouds(480)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(100):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def solved(model, device, **options):
    splits = [loader(seed=seed) for seed in (1, 2, 3)]
    options = QUICK | {"objective": "budget", "keep": 0.4, "rank_multiple": 1} | options
    return compress(model.to(device), loss, *splits, device=device, **options)


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def test_the_same_model_as_on_the_cpu():
    there, here = solved(trained(), DEVICE), solved(trained(), "cpu")
    assert there.ranks == here.ranks
    assert {parameter.device.type for parameter in there.model.parameters()} == {torch.device(DEVICE).type}
    for name in there.ranks:
        products = [result.model.get_submodule(name).to_dense().weight.detach().cpu() for result in (there, here)]
        assert torch.linalg.norm(products[0] - products[1]) < 1e-4 * torch.linalg.norm(products[1])
    assert there.certificate.loss_change.mean == pytest.approx(here.certificate.loss_change.mean, abs=1e-4)


def test_all_points_of_a_frontier_are_timed():
    found = solved(trained(), DEVICE, objective="frontier", budgets=(0.7, 0.4), rank_multiple=None)
    for point in found.frontier:
        assert all(rank % 8 == 0 for rank in point.ranks.values()), "tiles of the device"
        assert len(point.speed.timings) == 2
        assert all(used > size for used, size in zip(point.speed.peak_memory, point.speed.bytes_on_disk, strict=True))


class Mixture(nn.Module):
    """A convolution, a grouped one, attention and a linear layer."""

    def __init__(self):
        super().__init__()
        self.first, self.grouped = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, stride=2, groups=2)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        x = torch.relu(self.grouped(torch.relu(self.first(x)))).flatten(2).transpose(1, 2)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def test_other_layers_are_the_same_as_on_the_cpu():
    torch.manual_seed(0)
    model, x = Mixture().eval(), torch.randn(180, 1, 8, 8)
    y = x.mean((1, 2, 3)).mul(20).round().clamp(-1, 1).long() + 1
    splits = [list(DataLoader(TensorDataset(x[i : i + 60], y[i : i + 60]), 20)) for i in (0, 60, 120)]
    options = QUICK | {"objective": "budget", "keep": 0.5, "rank_multiple": 1, "speed": "none"}
    there, here = (compress(model.to(name), loss, *splits, device=name, **options) for name in (DEVICE, "cpu"))
    assert {layer.name for layer in there.layers} == {layer.name for layer in here.layers}
    for one, other in zip(there.layers, here.layers, strict=True):
        if one.curve is not None:
            assert one.curve.curvature == pytest.approx(other.curve.curvature, rel=1e-2, abs=1e-9)
    assert there.certificate.loss_change.mean == pytest.approx(here.certificate.loss_change.mean, abs=1e-3)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_the_callback(precision, tmp_path):
    compression = LowRankCompression(objective="budget", keep=0.5, dirpath=tmp_path, strict=True, **QUICK)
    module = Classifier(network(48))
    run = trainer(callbacks=[compression], accelerator="gpu", devices=1, precision=precision)
    run.fit(module, loader(), loader(960, seed=1))
    assert compression.result.ranks
    loaded = load_compressed(Classifier(network(48)), tmp_path).state_dict()
    expected = compression.result.model.state_dict()
    assert {value.device.type for value in expected.values()} == {"cpu"}, "where the trainer leaves the module, too"
    assert all(torch.equal(value, expected[name]) for name, value in loaded.items())
    assert any(layer.curve is not None and max(layer.curve.curvature) > 0 for layer in compression.result.layers)


def share(rank, world, model, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world)
    splits = [list(loader(seed=seed))[rank::world] for seed in (1, 2, 3)]
    options = QUICK | {"objective": "budget", "keep": 0.4, "rank_multiple": 1, "speed": "none"}
    found = compress(model.to(DEVICE), loss, *splits, device=DEVICE, **options)
    torch.save((found.ranks, found.model.cpu().state_dict()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_find_what_one_finds():
    alone = solved(trained(), DEVICE, speed="none")
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(share, (2, trained(), folder), nprocs=2, start_method="spawn")
        found = [torch.load(f"{folder}/{rank}.pt") for rank in range(2)]
    assert found[0][0] == found[1][0] == alone.ranks
    for name, value in found[0][1].items():
        assert torch.equal(value, found[1][1][name])
    x = clouds(seed=7)[0]
    alone.model.cpu()
    shared = copy.deepcopy(alone.model)
    shared.load_state_dict(found[0][1])
    torch.testing.assert_close(shared(x), alone.model(x), rtol=1e-3, atol=1e-4)


@pytest.fixture
def nccl():
    """Environment variables for two processes with NCCL, which may share a device from version 2.30 on."""
    if torch.cuda.device_count() > 1:
        return {}
    if torch.cuda.nccl.version() < (2, 30):
        pytest.skip(f"NCCL {torch.cuda.nccl.version()} does not let two processes share the only device")
    return {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_processes_with_nccl_find_what_one_finds(project, tmp_path, nccl, strategy):
    gpu = ("--accelerator", "gpu")
    (alone,) = notes(started(project, tmp_path / "alone", *gpu), folder=tmp_path / "alone", world=1)
    folder = tmp_path / strategy
    if torch.cuda.device_count() > 1:
        processes = [started(project, folder, *gpu, "--strategy", strategy, "--devices", "2")]
    elif strategy == "ddp":  # two nodes, both with the same device
        processes = started_on_two_nodes(project, folder, *gpu, "--strategy", strategy, environment=nccl)
    else:
        pytest.skip("ModelParallelStrategy shards within a node, which needs two devices")
    found = notes(*processes, folder=folder, world=2)
    assert alone["ranks"]
    assert {note["backend"] for note in found} == {"nccl"}
    check(found, alone, folder)
