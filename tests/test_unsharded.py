"""Modules whose weights FSDP2 has spread, on one process of gloo; two of them are in ``test_launchers.py``."""

import os
import pickle
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from small_modules import FEATURES, QUICK, Classifier, loader, trainer
from torch import nn
from torch.distributed.tensor import DTensor

from lrf_lightning import LowRankCompression, load_compressed
from lrf_lightning.callbacks.isolation import detached_copy

fsdp = pytest.importorskip("torch.distributed.fsdp")
if not hasattr(fsdp, "fully_shard"):
    pytest.skip("torch is older than 2.6", allow_module_level=True)


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
        if not isinstance(self.net, fsdp.FSDPModule):
            for layer in (self.net.norm, self.net.head) if isinstance(self.net, Tied) else (self.net[0], self.net[2]):
                fsdp.fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fsdp.fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


@pytest.fixture(autouse=True)
def group():
    with mock.patch.dict(os.environ):
        yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def fitted(module, *callbacks, shards=False, **options):
    run = trainer(callbacks=list(callbacks), strategy=ModelParallelStrategy(1, 1, shards), devices=1, **options)
    run.fit(module, loader(), loader(seed=1))
    return run


def weights(module):
    state = module.state_dict()
    return {n: (v.full_tensor() if isinstance(v, DTensor) else v).detach().clone() for n, v in state.items()}


@pytest.mark.parametrize("tied", [False, True])
def test_a_copy_is_whole_and_the_module_stays_as_it_is(tied):
    module = Sharded(Tied()) if tied else Sharded()
    fitted(module)
    before, kinds = weights(module), [type(child) for child in module.modules()]
    batch = next(iter(loader(seed=2)))
    with torch.no_grad():
        expected = module.eval().loss(batch)
    copy = detached_copy(module)
    after = weights(module)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [type(child) for child in module.modules()] == kinds
    assert all(isinstance(weight, DTensor) for weight in module.parameters())
    assert not any(isinstance(weight, DTensor) for weight in (*copy.parameters(), *copy.buffers()))
    assert not any(isinstance(child, fsdp.FSDPModule) for child in copy.modules())
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
    pickle.dumps(copy)
    assert detached_copy(copy) is not copy


def test_frozen_weights_stay_frozen():
    module = Sharded()
    module.net[0].requires_grad_(False)
    fitted(module)
    copy = detached_copy(module)
    assert [weight.requires_grad for weight in copy.parameters()] == [False, False, True, True, True, True]


@pytest.mark.parametrize("shards", [False, True])
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
