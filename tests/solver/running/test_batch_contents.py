"""Counting, copying and moving batches of all types."""

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lrf_lightning.solver.running.batch_contents import batch_size, to_device

CPU = torch.device("cpu")

Pair = namedtuple("Pair", ["x", "y"])


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(7, 2),
        (torch.zeros(7, 2), torch.zeros(3)),
        [[torch.zeros(7)]],
        {"name": "text", "scale": torch.tensor(2.0), "x": torch.zeros(7, 2)},
        Pair("text", torch.zeros(7, 1)),
    ],
)
def test_batch_size_is_the_first_dimension_of_the_first_tensor(batch):
    assert batch_size(batch) == 7


class Graphs:
    """A batch of graphs as PyTorch Geometric has it: an object that says how many there are, or only what it holds."""

    def __init__(self, sizes, **items):
        self.__dict__.update(sizes)
        self.items = items

    def __getitem__(self, key):
        raise AssertionError("objects of the user's are not opened: some make what they are asked for")

    def keys(self):
        return list(self.items)

    def to_dict(self):
        return {key: item.items if isinstance(item, Graphs) else item for key, item in self.items.items()}

    @property
    def num_graphs(self):
        return self.__dict__["graphs"]  # a KeyError where there is none


@dataclass
class Said:
    """Says its size, which is not that of its first tensor."""

    x: torch.Tensor
    batch_size: object


NamedSaid = namedtuple("NamedSaid", ["x", "batch_size"])


class Attributes(dict):
    batch_size = 7


@pytest.mark.parametrize(
    "batch",
    [
        Graphs({"graphs": 7}, x=torch.zeros(30, 2)),
        Graphs({"batch_size": 7}, x=torch.zeros(30, 2)),
        Graphs({"batch_size": torch.Size([3])}, scale=torch.tensor(1.0), x=torch.zeros(7, 2)),
        Graphs({"batch_size": 0}, nodes=Graphs({}, x=torch.zeros(7, 2))),
        ("text", Graphs({"graphs": 7}), torch.zeros(3)),
        Said(torch.zeros(2, 9), 7),
        Said(torch.zeros(2, 9), torch.tensor(7)),
        Said(torch.zeros(2, 9), np.int64(7)),
        NamedSaid(torch.zeros(2, 9), 7),
        Attributes(x=torch.zeros(2, 9)),
    ],
)
def test_a_batch_may_say_its_size_itself(batch):
    assert batch_size(batch) == 7


def images(count):
    return [torch.zeros(3, 8, 8 + i) for i in range(count)]


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ((tuple(images(2)), ({"boxes": torch.zeros(3, 4)}, {"boxes": torch.zeros(3, 4)})), 2),
        ({"image": images(3), "target": [{"boxes": torch.zeros(n, 4)} for n in (1, 0, 2)]}, 3),
        ([images(1), [{"boxes": torch.zeros(3, 4)}]], 1),
        (([torch.zeros(90), torch.zeros(70)], ["a text", "another"]), 2),
        (((torch.zeros(7, 3), torch.zeros(7, 5)), (torch.zeros(7), torch.zeros(7))), 7),
        ((torch.zeros(7, 3), [{"boxes": torch.zeros(2, 4)} for _ in range(7)]), 7),
        (([torch.zeros(7, 3)], [torch.zeros(7), torch.zeros(7)]), 7),
        (([torch.zeros(80), torch.zeros(80)], ["a", "b"]), 2),
        (([torch.zeros(16000)], ["a"]), 1),
        ({"l": [torch.zeros(7, 3), torch.zeros(7)], "u": [torch.zeros(9, 3), torch.zeros(9)]}, 7),
        ({"l": [torch.zeros(7, 10), torch.zeros(7, 3)], "u": [torch.zeros(9, 10), torch.zeros(9, 3)]}, 7),
        (([torch.zeros(7, 4, 9), torch.zeros(7)], [torch.zeros(57), torch.zeros(7)]), 7),
        (((torch.zeros(7, 3), torch.zeros(7, 3)), (torch.zeros(7), torch.tensor(0.5))), 7),
        ((images(3), torch.zeros(3)), 3),
        ({"labels": torch.zeros(3, 2), "images": images(3), "name": "a batch"}, 3),
        (([torch.zeros(4, 2), torch.zeros(6, 2)], torch.zeros(3)), 4),
        (([torch.zeros(2, 3), torch.zeros(2, 4)], torch.zeros(2)), 2),
        (([], []), None),
    ],
)
def test_lists_with_an_entry_for_every_sample(batch, expected):
    if expected is None:
        with pytest.raises(ValueError, match="its samples cannot be counted"):
            batch_size(batch)
    else:
        assert batch_size(batch) == expected


@pytest.mark.parametrize("batch", [torch.zeros(0, 3), [[], torch.zeros(0)]])
def test_a_batch_without_samples_is_an_error(batch):
    with pytest.raises(ValueError, match="holds no sample, since its first tensor has none; let the loader leave"):
        batch_size(batch)


@pytest.mark.parametrize("batch", ["text", {"x": 3}, torch.tensor(1.0), []])
def test_a_batch_that_cannot_be_counted_is_an_error(batch):
    with pytest.raises(ValueError, match="holds no tensor with a batch dimension, so its samples cannot be counted"):
        batch_size(batch)


def test_every_tensor_of_a_batch_is_moved():
    meta = torch.device("meta")
    moved = to_device({"x": [torch.zeros(2), "text"], "pair": Pair(torch.zeros(1), (torch.ones(3),)), "n": 3}, meta)
    assert moved["x"][0].device == meta
    assert moved["x"][1] == "text"
    assert isinstance(moved["pair"], Pair)
    assert moved["pair"].x.device == moved["pair"].y[0].device == meta
    assert moved["n"] == 3


class Fields(dict):
    """A mapping of the user's, with items as attributes."""

    __getattr__ = dict.__getitem__


class Movable:
    """A batch that moves itself, in place."""

    def __init__(self, x):
        self.x = x

    def to(self, device):
        self.x = self.x.to(device)
        return self


@pytest.mark.parametrize("kind", [dict, Fields, OrderedDict, UserDict])
def test_mappings_keep_their_type(kind):
    moved = to_device(kind(x=torch.ones(2), name="a"), CPU)
    assert type(moved) is kind
    assert moved["name"] == "a"
    assert_close(moved["x"], torch.ones(2))


def test_a_mapping_that_cannot_be_filled_becomes_a_dictionary():
    moved = to_device(MappingProxyType({"x": torch.ones(2)}), CPU)
    assert_close(moved, {"x": torch.ones(2)})


def test_a_moved_batch_is_a_copy_that_a_step_may_change():
    x, y, z = torch.zeros(3), torch.zeros(3), torch.zeros(3)
    batch = {"x": x, "list": [y], "own": Movable(z)}
    moved = to_device(batch, CPU)
    for tensor in (moved.pop("x"), moved["list"].pop(), moved["own"].x):
        tensor.add_(1)
    assert list(batch) == ["x", "list", "own"]
    assert batch["list"][0] is y
    assert_close(torch.stack([x, y, z, batch["own"].x]), torch.zeros(4, 3))


def test_only_the_rows_of_a_batch_are_copied():
    data = torch.arange(1000.0)
    moved = to_device([data[:2]], CPU)
    assert moved[0].untyped_storage().nbytes() == 8
