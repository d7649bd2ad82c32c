"""A calibration from the cache gives the very same result, and is never taken for another model, data or setting."""

import multiprocessing
import sys
import time
from pathlib import Path

import pytest
import torch
from small_modules import QUICK, clouds, loader, network
from torch import nn
from torch.nn import functional

from lrf_lightning import compress
from lrf_lightning.solver.predictions.calibration import calibrate
from lrf_lightning.sweeps import calibration_cache
from lrf_lightning.sweeps.calibration_cache import locked


def loss(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def squeeze(model, folder, *, calibration=None, **options):
    options = QUICK | {"objective": "budget", "cache_dir": folder} | options
    used = options.pop("loss", loss)
    return compress(model, used, calibration or loader(seed=1), loader(seed=2), loader(seed=3), **options)


@pytest.fixture
def model():
    torch.manual_seed(1)
    return network().eval()


@pytest.fixture
def calls(monkeypatch):
    """How often something was calibrated."""
    made = []

    def counted(work, candidates):
        made.append(work.settings)
        calibrate(work, candidates)

    monkeypatch.setattr(calibration_cache, "calibrate", counted)
    return made


def test_a_change_of_any_module_of_the_solver_is_seen():
    known = {str(path) for path in calibration_cache._code_files()}
    solver = [module for name, module in sys.modules.items() if name.startswith("lrf_lightning.solver")]
    assert {module.__file__ for module in solver} <= known
    assert any(Path(name).parent.name == "predictions" for name in known)


class ConvNet(nn.Module):
    """Convolutions, packed attention, a layer that runs twice, a tied embedding and a layer that never runs."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(40, 12)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.conv = nn.Conv1d(12, 12, 3, padding=1)
        self.twice = nn.Linear(12, 12)
        self.unused = nn.Linear(30, 30)
        self.head = nn.Linear(12, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        x = self.table(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.twice(torch.relu(self.twice(x)))
        return self.head(x)


def same(first, second):
    one, two = first.model.state_dict(), second.model.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert first.layers == second.layers
    assert first.frontier == second.frontier
    assert first.certificate == second.certificate


def test_other_budgets_and_objectives_reuse_it_and_find_the_same(model, tmp_path, calls):
    squeeze(model, tmp_path, keep=0.7)
    for options in ({"keep": 0.4}, {"keep": 0.4, "cost": "flops"}, {"objective": "compact", "tolerance": 0.1}):
        same(squeeze(model, tmp_path, **options), squeeze(model, None, **options))
    assert len(calls) == 1
    assert len(list(tmp_path.glob("*.pt"))) == 1


def test_times_are_measured_beside_it(model, tmp_path, calls, monkeypatch):
    """Seconds are counted with layers that come from the cache too, and the objective does not matter."""
    monkeypatch.setenv("LRF_LIGHTNING_CACHE", str(tmp_path / "times"))
    first = squeeze(model, tmp_path)
    second = squeeze(model, tmp_path, cost="latency", objective="compact")
    assert len(calls) == 1
    assert first.latency_layers is None
    assert all(layer.latency_before > 0 for layer in second.layers)


@pytest.mark.parametrize("memory", [4.0, 1e-6])
def test_all_kinds_of_layers(tmp_path, calls, memory):
    torch.manual_seed(0)
    net = ConvNet().eval()
    batches = [[torch.randint(40, (8, 6)) for _ in range(3)] for _ in range(3)]

    def token_loss(model, tokens):
        return functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten())

    options = QUICK | {"objective": "budget", "memory_gib": memory, "cache_dir": tmp_path}
    first, second = (compress(net, token_loss, *batches, **options) for _ in range(2))
    assert len(calls) == 1
    same(first, second)
    assert {layer.name: layer.reason for layer in second.layers}["unused"].startswith("did not run on the")


def test_anything_that_decides_it_makes_another_one(model, tmp_path, calls):
    squeeze(model, tmp_path)
    changed = network().eval()
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        changed[0].weight[0, 0] += 1e-3
    squeeze(changed, tmp_path)
    squeeze(model, tmp_path, calibration=loader(seed=7))
    for options in ({"metric": "activation"}, {"seed": 1}, {"exclude": ("0",)}, {"damping": 0.1}, {"probes": False}):
        squeeze(model, tmp_path, **options)
    squeeze(model, tmp_path, objective="paper")
    squeeze(model, tmp_path, loss=lambda model, batch: 2 * loss(model, batch))
    assert len(calls) == 10


def test_a_damaged_file_is_made_anew(model, tmp_path, calls, caplog):
    first = squeeze(model, tmp_path)
    (path,) = tmp_path.glob("*.pt")
    path.write_bytes(path.read_bytes()[:1000])
    same(squeeze(model, tmp_path), first)
    assert "cannot be read" in caplog.text
    squeeze(model, tmp_path)
    assert len(calls) == 2


def test_data_whose_content_cannot_be_told_is_calibrated_each_time(model, tmp_path, calls):
    class Odd:
        pass

    batches = [(*clouds(), Odd()) for _ in range(2)]
    for _ in range(2):
        squeeze(model, tmp_path, calibration=batches)
    assert len(calls) == 2
    assert not list(tmp_path.glob("*.pt"))


def test_a_folder_that_cannot_be_written_costs_nothing_but_a_warning(model, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="could not keep the calibration"):
        result = squeeze(model, tmp_path / "file" / "folder")
    assert result.ranks
    assert "No lock for" in caplog.text


def hold(path, held, release):
    with locked(path):
        held.set()
        release.wait(30)


def test_one_process_at_a_time(tmp_path):
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / "entry", held, release))
    process.start()
    assert held.wait(30)
    waiting = context.Event()

    def wait():
        waiting.set()
        with locked(tmp_path / "entry"):
            pass

    second = context.Process(target=wait)
    second.start()
    assert waiting.wait(30)
    second.join(0.3)
    assert second.is_alive(), "it waits as long as the first one works"
    release.set()
    second.join(30)
    process.join(30)
    assert second.exitcode == process.exitcode == 0


def test_the_lock_of_a_process_that_dies_is_free(tmp_path):
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / "entry", held, release))
    process.start()
    assert held.wait(30)
    process.kill()
    process.join(30)
    started = time.monotonic()
    with locked(tmp_path / "entry"):
        assert time.monotonic() - started < 30
