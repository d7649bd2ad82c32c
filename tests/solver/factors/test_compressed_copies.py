"""How much is fitted in one go: bounded by threads, and by the memory of half-finished passes."""

import dataclasses

import pytest
import torch
from small_modules import FEATURES, clouds, network
from torch.nn import functional

from lrf_lightning import Settings
from lrf_lightning.distributed import ALONE, Processes
from lrf_lightning.solver.factors import compressed_copies
from lrf_lightning.solver.factors.compressed_copies import compensation_batches, copies_at_once
from lrf_lightning.solver.joint import calibrated

BATCHES, SIZE, WIDTH = 8, 10, 24


def loss(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.fixture
def work():
    split = [clouds(SIZE, seed) for seed in range(BATCHES)]
    splits = dict.fromkeys(("calibration", "selection", "verification"), split)
    return calibrated(network(WIDTH), loss, splits, settings=Settings(probes=False))[0]


def counts(work, processes=ALONE, *, alone=False, **settings):
    work = dataclasses.replace(work, processes=processes, settings=dataclasses.replace(work.settings, **settings))
    return len(list(compensation_batches(work))), copies_at_once(work, work.layers, alone=alone)


def test_as_many_passes_as_threads(work, monkeypatch):
    assert counts(work) == (8, 256 // 8 - 1), "those of the dense model run too"
    monkeypatch.setattr(compressed_copies, "MOST_BATCHES", 3)
    assert counts(work) == (3, 256 // 3 - 1)
    first, second = Processes(0, 2), Processes(1, 2)
    assert (counts(work, first), counts(work, second)) == ((2, 256 // 2 - 1), (1, 256 // 2 - 1))
    assert counts(work, second, alone=True) == (1, 256 // 3 - 1)
    monkeypatch.setattr(compressed_copies, "MOST_RUNS", 2)
    assert counts(work) == (3, 1), "at least one"


def test_as_many_passes_as_memory_holds(work):
    assert WIDTH > FEATURES
    one_pass = 3 * SIZE * WIDTH * torch.finfo(torch.float32).bits / 8
    for batches in (8, 5, 1):
        found, copies = counts(work, memory_gib=2 * one_pass * (batches + 0.5) / 2**30)
        assert found == batches
        assert copies == 1
    assert counts(work, memory_gib=1e-9) == (1, 1)
