import pytest
import torch
from torch import nn

from lrf_lightning.export.sample_call import SampleCall, find_sample


def test_positional_and_keyword_arguments():
    x = torch.zeros(2, 3)
    for sample, args, kwargs in ((x, (x,), {}), ([x, 4], (x, 4), {}), ({"ids": x, "flag": None}, (), ["ids", "flag"])):
        call = SampleCall(sample)
        assert len(call.args) == len(args)
        assert list(call.kwargs) == list(kwargs)
        assert call.batch_size == 2


def test_resized_repeats_samples_and_leaves_the_rest():
    scale = torch.tensor([5.0])
    call = SampleCall((torch.tensor([[1.0], [2.0]]), scale, torch.tensor(3.0), "mean")).resized(5)
    assert call.args[0].flatten().tolist() == [1, 2, 1, 2, 1]
    assert call.args[1] is scale
    assert call.args[2].dim() == 0
    assert call.args[3] == "mean"
    assert call.resized(1).args[0].tolist() == [[1.0]]
    assert call.resized(1).resized(3).args[1] is scale


def test_dynamic_shapes_name_the_batch():
    nested = {"tokens": {"ids": torch.zeros(4, 7), "length": torch.zeros(4)}, "table": torch.zeros(9, 2), "flag": True}
    assert SampleCall(nested).dynamic_shapes("batch") == {
        "tokens": {"ids": {0: "batch"}, "length": {0: "batch"}},
        "table": None,
        "flag": None,
    }


@pytest.mark.parametrize("sample", [3, (), {"x": 1}, torch.tensor(2.0), torch.zeros(0, 3)])
def test_no_batch(sample):
    with pytest.raises(ValueError, match=r"without a batch; give a Tensor \(batch, ...\), a tuple"):
        SampleCall(sample)


class Forward(nn.Module):
    def forward(self, ids, mask=None):
        return ids


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ((torch.ones(2, 3), torch.zeros(2)), (torch.ones(2, 3),)),
        ([torch.ones(2, 3)], (torch.ones(2, 3),)),
        (torch.ones(2, 3), (torch.ones(2, 3),)),
        ({"ids": torch.ones(2, 3), "labels": torch.zeros(2)}, {"ids": torch.ones(2, 3)}),
    ],
)
def test_sample_of_a_batch(batch, expected):
    torch.testing.assert_close(find_sample(Forward(), [batch]), expected)


def test_sample_of_the_module_comes_first():
    module = Forward()
    module.example_input_array = torch.ones(1, 3)
    assert find_sample(module, [torch.zeros(2, 3)]) is module.example_input_array


def test_no_sample_costs_nothing():
    def failing():
        raise RuntimeError("the loader is gone")
        yield

    assert find_sample(Forward(), failing()) is None
    assert find_sample(Forward(), []) is None
