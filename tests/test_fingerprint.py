import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lrf_lightning.fingerprint import UnknownContentError, fingerprint


@dataclasses.dataclass
class Sample:
    inputs: torch.Tensor
    label: int


def values():
    x = torch.arange(6.0)
    return [
        None, True, 1, 1.0, "1", b"1", Path("a"), torch.float32, [1, 2], (1, 2), [[1], 2], [1, [2]], {"a": 1}, {"b": 1},
        {1, 2}, x, x.reshape(2, 3), x.double(), x + 1, x.bfloat16(), x > 2, torch.tensor(1.0), np.arange(6.0),
        Sample(x, 1), Sample(x, 2), Sample(x + 1, 1), nn.ReLU(), nn.GELU(), [],
    ]  # fmt: skip


def test_equal_content_gives_equal_digests_and_other_content_others():
    first, second = [fingerprint(v) for v in values()], [fingerprint(v) for v in values()]
    assert first == second
    assert len(set(first)) == len(first)


def test_strides_do_not_matter_and_order_does():
    x = torch.arange(6.0).reshape(2, 3)
    assert fingerprint(x.T) == fingerprint(x.T.contiguous())
    assert fingerprint(1, 2) != fingerprint(2, 1)
    assert fingerprint({"a": 1, "b": 2}) != fingerprint({"a": 2, "b": 1})


def test_modules_by_structure_and_weights():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    other = nn.Linear(3, 2)
    assert fingerprint(model) != fingerprint(other)
    other.load_state_dict(model.state_dict())
    assert fingerprint(model) == fingerprint(other)


def test_loaders_by_what_they_yield():
    data = TensorDataset(torch.arange(10.0))
    assert fingerprint(DataLoader(data, batch_size=5)) == fingerprint(DataLoader(data, batch_size=5))
    assert fingerprint(DataLoader(data, batch_size=5)) != fingerprint(DataLoader(data, batch_size=2))


@pytest.mark.parametrize("value", [object(), lambda: 1, torch.empty(3, device="meta")])
def test_what_cannot_be_told_is_refused(value):
    with pytest.raises(UnknownContentError):
        fingerprint([value])
