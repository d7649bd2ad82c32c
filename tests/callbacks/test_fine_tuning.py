"""Fits that start from a compressed checkpoint, with optimizers and callbacks that know nothing of factors."""

import warnings

import pytest
import torch
from compressed_models import compressed
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import callbacks
from small_modules import QUICK, Classifier, loader, trainer

from lrf_lightning import LowRankCompression, load_compressed

RANKS = {"net.0": 3, "net.2": 4}
AVERAGING = [callbacks.StochasticWeightAveraging(1e-3, swa_epoch_start=1)]
if hasattr(callbacks, "WeightAveraging"):  # Lightning 2.6
    AVERAGING.append(callbacks.WeightAveraging())


class ByName(Classifier):
    """Has an optimizer for parameters of some names only."""

    def __init__(self, *names):
        super().__init__()
        self.names = names

    def configure_optimizers(self):
        return torch.optim.SGD([p for name, p in self.named_parameters() if name.endswith(self.names)], lr=0.01)


@pytest.fixture
def checkpoint(tmp_path):
    """What the training of a compressed module writes."""
    runner = trainer(max_epochs=1, limit_train_batches=1)
    runner.fit(compressed(Classifier(), RANKS), loader())
    runner.save_checkpoint(tmp_path / "compressed.ckpt", weights_only=True)
    state = torch.load(tmp_path / "compressed.ckpt", weights_only=True)
    torch.save(state | {"optimizer_states": [], "lr_schedulers": []}, tmp_path / "compressed.ckpt")
    return tmp_path / "compressed.ckpt"


def fit(module, checkpoint, *others):
    """Fit with the callback behind others, without a compression."""
    compression = LowRankCompression(save=False, **QUICK)
    compression.on_fit_end = lambda trainer, pl_module: None
    runner = trainer(callbacks=[*others, compression], max_epochs=4, limit_train_batches=1, num_sanity_val_steps=0)
    runner.fit(module, loader(), loader(seed=1, samples=192), ckpt_path=checkpoint)
    return runner


def test_factors_without_an_optimizer_are_named(checkpoint):
    with pytest.warns(UserWarning, match=r"no optimizer has net\.0\.left_factor, .*net\.2\.right_factor.*by name"):
        fit(ByName("weight", "bias"), checkpoint)


def test_factors_with_an_optimizer_or_frozen_are_not(checkpoint):
    frozen = ByName("weight", "bias", "left_factor")
    frozen.net[0].weight.requires_grad_(False)
    frozen.net[2].weight.requires_grad_(False)
    for module in (Classifier(), frozen):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "LowRankCompression: no optimizer")
            fit(module, checkpoint)


@pytest.mark.parametrize("averaging", AVERAGING, ids=lambda callback: type(callback).__name__)
def test_averages_of_a_dense_module_are_refused_with_the_remedy(checkpoint, averaging):
    with pytest.raises(MisconfigurationException, match=r"has copied Classifier before .*load_compressed\(module, '/"):
        fit(Classifier(), checkpoint, averaging)
    module = load_compressed(Classifier(), checkpoint)
    assert fit(module, checkpoint, averaging).current_epoch >= 4
    assert module.net[0].rank == 3


class AveragesAPart(callbacks.Callback):
    """Averages something else than the module: a part of it, or a dense teacher."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def setup(self, trainer, pl_module, stage):
        """Make the average, of what is dense as yet or has factors already."""
        self.average = torch.optim.swa_utils.AveragedModel(self.make(pl_module))


@pytest.mark.parametrize(
    "make", [lambda module: module.net, lambda module: torch.nn.Linear(2, 2)], ids=["part", "other"]
)
def test_averages_of_something_else_are_no_affair_of_ours(checkpoint, make):
    module = load_compressed(Classifier(), checkpoint)
    assert fit(module, checkpoint, AveragesAPart(make)).current_epoch >= 4
