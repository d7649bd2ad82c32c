import dataclasses
import random

import lightning.pytorch as pl
import pytest
import torch
from small_modules import Classifier, loader, trainer
from torch.utils.data import DataLoader, Dataset

from lrf_lightning.data.device_batches import DeviceBatches

CPU = torch.device("cpu")


class Noisy(Dataset):
    """Samples with random augmentation; counts how often it is asked."""

    def __init__(self):
        self.asked = 0

    def __len__(self):
        return 6

    def __getitem__(self, index):
        self.asked += 1
        return torch.rand(2) + random.random()


def device_batches(batches, *, module=None, run=None, **options):
    return DeviceBatches(batches, run or trainer(), module or Classifier(), CPU, **options)


def passes(batches, times=2):
    return [[batch.clone() for batch in batches] for _ in range(times)]


@pytest.mark.parametrize("room", [2**20, 30, 0], ids=["stored", "too large", "nothing stored"])
def test_every_pass_is_the_same(room):
    data = Noisy()
    batches = device_batches(DataLoader(data, batch_size=2), cache_bytes=room)
    state = torch.get_rng_state()
    first, second = passes(batches)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert len(first) == 3
    assert not torch.equal(first[0], first[1])
    assert data.asked == (6 if room == 2**20 else 12)
    assert torch.equal(torch.get_rng_state(), state)


def test_random_numbers_of_steps_are_the_same_whether_a_batch_is_stored_or_loaded():
    batches = device_batches(DataLoader(Noisy(), batch_size=2))
    first, second = ([torch.rand(1) for _ in batches] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_stopping_early_stores_nothing_wrong_and_restores_random_states():
    batches = device_batches([torch.ones(1), torch.zeros(1)])
    state = torch.get_rng_state()
    next(iter(batches))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(list(batches)) == 2


def test_changes_of_a_batch_in_place_are_not_kept():
    batches = device_batches([torch.ones(2)])
    for _ in range(3):
        (batch,) = list(batches)
        assert batch.tolist() == [1.0, 1.0]
        batch.zero_()


@dataclasses.dataclass
class Pair:
    x: torch.Tensor
    name: str


class Opaque:
    """Of unknown size."""


def test_what_is_stored():
    sized = [{"x": torch.ones(2), "more": [1, "a", None]}, Pair(torch.ones(1), "b")]
    for batch, stored in ((sized, True), ([Opaque()], False)):
        source = device_batches([batch])
        list(source)
        assert (source._stored is not None) == stored


class Recorder:
    """The three hooks of a transfer, noted in order."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return [*batch, f"before {self.name}"]

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return [*batch, f"to {device} {self.name}"]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [*batch, f"after {self.name}"]


class HookedModule(Recorder, Classifier):
    name = "module"


class HookedData(Recorder, pl.LightningDataModule):
    name = "data"

    def train_dataloader(self):
        return loader()

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return super().transfer_batch_to_device(batch, device, dataloader_idx)


def test_hooks_of_the_module():
    module = HookedModule()
    run = trainer()
    assert list(device_batches([[]], module=module, run=run)) == [["before module", "to cpu module", "after module"]]
    assert module._trainer is None


def test_hooks_of_the_datamodule_come_first():
    run = trainer(fast_dev_run=True)
    run._data_connector.attach_datamodule(Classifier(), HookedData())
    batches = list(device_batches([[]], module=HookedModule(), run=run))
    assert batches == [["before data", "to cpu data", "after data"]]


def test_precision_of_the_trainer():
    (batch,) = device_batches([torch.ones(1)], run=trainer(precision="64-true"))
    assert batch.dtype is torch.float64


def test_hooks_see_a_trainer_that_is_lent():
    class Asks(Classifier):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            self.seen = self.trainer
            return batch

    module, run = Asks(), trainer()
    list(device_batches([torch.ones(1)], module=module, run=run))
    assert module.seen is run
