"""Modules whose weights FSDP2 has spread, on one process of gloo; two of them are in ``test_launchers.py``."""

import functools
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from packaging.version import Version
from process_groups import run_together
from small_modules import FEATURES, QUICK, Classifier, loader, network, trainer
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn import functional

from lrf_lightning import LowRankCompression, load_compressed
from lrf_lightning.callbacks.isolation import detached_copy
from lrf_lightning.copies.unsharded import whole_weights


class Tied(nn.Module):
    """Two layers that share a weight, a buffer, and an attribute that refers back to the first of them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(FEATURES)
        self.head = nn.Linear(FEATURES, 4)
        self.favourite = [self.first]

    def forward(self, x):
        return self.head(self.norm(torch.relu(self.second(torch.relu(self.first(x))))))


class Sharded(Classifier):
    """Sharded once, like a user's module that is fitted and then tested."""

    def configure_model(self):
        if not isinstance(self.net, FSDPModule):
            for layer in (self.net.norm, self.net.head) if isinstance(self.net, Tied) else (self.net[0], self.net[2]):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def in_a_process(test):
    """Run a test in a process of its own: after a backward pass of FSDP2 no process can be forked from this one."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        (outcome,) = run_together(lambda rank, world: test(*args, **kwargs), 1)
        assert outcome is None, outcome

    return run


def fitted(module, *callbacks, shards=False, **options):
    run = trainer(callbacks=list(callbacks), strategy=ModelParallelStrategy(1, 1, shards), devices=1, **options)
    run.fit(module, loader(), loader(seed=1))
    return run


def whole_copy(module):
    found, failure = whole_weights(module)
    assert failure is None
    return detached_copy(module, found)


def weights(module):
    state = module.state_dict()
    return {n: (v.full_tensor() if isinstance(v, DTensor) else v).detach().clone() for n, v in state.items()}


@pytest.mark.parametrize("tied", [False, True])
@in_a_process
def test_a_copy_is_whole_and_the_module_stays_as_it_is(tied):
    module = Sharded(Tied()) if tied else Sharded()
    fitted(module)
    before, kinds = weights(module), [type(child) for child in module.modules()]
    batch = next(iter(loader(seed=2)))
    with torch.no_grad():
        expected = module.eval().loss(batch)
    copy = whole_copy(module)
    after = weights(module)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [type(child) for child in module.modules()] == kinds
    assert all(isinstance(weight, DTensor) for weight in module.parameters())
    assert not any(isinstance(weight, DTensor) for weight in (*copy.parameters(), *copy.buffers()))
    assert not any(isinstance(child, FSDPModule) for child in copy.modules())
    assert type(copy.net) is (Tied if tied else nn.Sequential)
    found = copy.state_dict()
    assert all(torch.equal(found[name], before[name]) for name in before)
    torch.testing.assert_close(copy.eval().loss(batch), expected)
    copy.loss(batch).backward()
    assert all(isinstance(parameter, nn.Parameter) and parameter.grad is not None for parameter in copy.parameters())
    if tied:
        assert copy.net.second.weight is copy.net.first.weight
        assert copy.net.favourite == [copy.net.first]
    with torch.no_grad():
        copy.net[0].weight.zero_() if not tied else copy.net.first.weight.zero_()
    after = weights(module)
    assert all(torch.equal(after[name], before[name]) for name in before), "nothing is shared"
    assert detached_copy(copy) is not copy


@in_a_process
def test_a_copy_takes_hooks_in_another_process(tmp_path):
    """Numbers of hooks start anew there, and those of FSDP2 had been called in another way."""
    module = Sharded()
    fitted(module)
    torch.save(whole_copy(module).net, tmp_path / "net.pt")
    code = """
import sys, torch
net = torch.load(sys.argv[1], weights_only=False)
seen = []
for layer in net:
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(module))
    layer.register_forward_hook(lambda module, inputs, output: seen.append(module))
net(torch.zeros(2, 12))
assert len(seen) == 2 * len(net)
"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "net.pt"], check=True)


class Whole(Sharded):
    """The module itself is sharded."""

    def configure_model(self):
        super().configure_model()
        if not isinstance(self, FSDPModule):
            fully_shard(self, mesh=self.device_mesh["data_parallel"])


class Compiled(Sharded):
    """What is compiled is sharded; no code is generated."""

    def configure_model(self):
        if isinstance(self.net, nn.Sequential):
            super().configure_model()
            self.net = torch.compile(self.net, backend="eager")


class CompiledFirst(Classifier):
    def configure_model(self):
        if isinstance(self.net, nn.Sequential):
            self.net = torch.compile(self.net, backend="eager")
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class Encoder(nn.Sequential):
    def encode(self, x):
        return self(x)


class OtherMethod(Sharded):
    """A method besides forward that FSDP2 was told of."""

    def __init__(self):
        super().__init__(Encoder(*network()))

    def configure_model(self):
        super().configure_model()
        if "encode" not in self.net.__dict__:
            register_fsdp_forward_method(self.net, "encode")

    def loss(self, batch):
        return functional.cross_entropy(self.net.encode(batch[0]), batch[1])


# the trainer itself, without our callback, cannot save its optimizer: a KeyError in torch's rekey_optim_state_dict
UNSAVED = pytest.mark.skipif(Version(torch.__version__) < Version("2.11"), reason="Lightning cannot save such a module")


@pytest.mark.parametrize("kind", [Whole, pytest.param(Compiled, marks=UNSAVED), CompiledFirst, OtherMethod])
@pytest.mark.parametrize("which", ["last", "best"])
@in_a_process
def test_other_ways_to_shard(kind, which, tmp_path):
    compression = LowRankCompression(objective="budget", dirpath=tmp_path, weights=which, strict=True, **QUICK)
    checkpoint = ModelCheckpoint(tmp_path, monitor="val/loss")
    module = kind()
    fitted(module, compression, checkpoint, enable_checkpointing=True, shards=kind is CompiledFirst)
    assert compression.result.ranks
    model, batch = compression.result.model, next(iter(loader(seed=2)))
    assert not any(isinstance(child, FSDPModule) for child in model.modules())
    assert torch.isfinite(model.loss(batch))
    assert any(isinstance(weight, DTensor) for weight in module.parameters())


@in_a_process
def test_a_process_without_memory_takes_part_to_the_end(monkeypatch):
    module = Sharded()
    fitted(module)
    gathered = []
    monkeypatch.setattr(DTensor, "full_tensor", lambda self: gathered.append(self) or self.to_local())
    monkeypatch.setattr("lrf_lightning.copies.unsharded._like", Mock(side_effect=MemoryError("no room")))
    found, failure = whole_weights(module)
    assert isinstance(failure, MemoryError)
    assert len(gathered) == len(list(module.parameters()))
    assert sum(tensor.numel() for tensor in found.values()) == 0


@in_a_process
def test_frozen_weights_stay_frozen():
    module = Sharded()
    module.net[0].requires_grad_(False)
    fitted(module)
    copy = whole_copy(module)
    assert [weight.requires_grad for weight in copy.parameters()] == [False, False, True, True, True, True]


@pytest.mark.parametrize("shards", [False, True])
@in_a_process
def test_the_best_weights_are_compressed(tmp_path, shards):
    """The module gets worse after its first epoch, so that the best weights are not the last ones."""

    class Worsening(Sharded):
        def on_train_epoch_end(self):
            if self.current_epoch == 0:
                self.first = weights(self)

        def validation_step(self, batch, batch_idx):
            self.log("val/loss", self.loss(batch) + self.current_epoch)

    torch.manual_seed(0)
    module, found = Worsening(), {}
    for which in ("best", "last"):
        found[which] = LowRankCompression(
            objective="budget", keep=1.0, weights=which, dirpath=tmp_path / which, strict=True, **QUICK
        )
    checkpoint = ModelCheckpoint(tmp_path, monitor="val/loss")
    fitted(module, *found.values(), checkpoint, shards=shards, enable_checkpointing=True)
    assert (tmp_path / "best").is_dir()
    bias = "net.4.bias"
    assert torch.equal(found["best"].result.model.state_dict()[bias], module.first[bias])
    assert not torch.equal(found["last"].result.model.state_dict()[bias], module.first[bias])
    assert torch.equal(found["last"].result.model.state_dict()[bias], weights(module)[bias])


@in_a_process
def test_what_is_written_loads_without_fsdp2(tmp_path):
    compression = LowRankCompression(objective="budget", keep=0.5, dirpath=tmp_path, strict=True, **QUICK)
    module = Sharded()
    fitted(module, compression)
    result = compression.result
    assert result.ranks
    for source in (tmp_path, tmp_path / "compressed.ckpt"):
        loaded = load_compressed(Classifier(), source).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in result.model.state_dict().items())
    plain = trainer(callbacks=[LowRankCompression()])
    (metrics,) = plain.test(Classifier(), loader(seed=3), ckpt_path=tmp_path / "compressed.ckpt", verbose=False)
    with torch.no_grad():
        losses = [result.model.eval().loss(batch) for batch in loader(seed=3)]
    assert metrics["test/loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)


class TestRefused:
    @in_a_process
    def test_layers_of_the_live_module_before_training(self):
        module, steps = Sharded(), []
        module.on_train_start = lambda: steps.append(0)
        with pytest.raises(MisconfigurationException, match=r"in_place=True cannot replace.*use in_place=False"):
            fitted(module, LowRankCompression(in_place=True))
        assert steps == []

    def test_tensor_parallelism(self):
        strategy = ModelParallelStrategy(1, 2)
        strategy._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 2)}
        fake = SimpleNamespace(strategy=strategy, world_size=2)
        message = r"tensor_parallel_size=2\), only 1 \(FSDP2\).*train=false ckpt_path=.*one file: .*FOLDER"
        with pytest.raises(MisconfigurationException, match=message):
            LowRankCompression().setup(fake, Classifier(), TrainerFn.FITTING)
