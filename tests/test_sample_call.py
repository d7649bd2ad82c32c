import pytest
import torch

from lrf_lightning.sample_call import SampleCall


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
