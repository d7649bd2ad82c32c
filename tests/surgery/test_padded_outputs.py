"""Encoders with split attention give what torch's give at padded positions."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

from lrf_lightning import compress, export_program, load_compressed, restore_dense
from lrf_lightning.surgery import prepare, settle

LENGTH, WIDTH = 5, 8


def encoder(norm=False, **options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)
    last = nn.LayerNorm(WIDTH) if norm else None
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, norm=last, **options)).eval()
    if last is not None:
        nn.init.ones_(model[0].norm.bias)
    return model


def padding(*lengths):
    return torch.arange(LENGTH) >= torch.tensor(lengths)[:, None]


ALIGNED, IN_BETWEEN = padding(5, 3, 1), padding(5, 3, 1).flip(1)
CALLS = {
    "aligned": {"src_key_padding_mask": ALIGNED},
    "in between": {"src_key_padding_mask": IN_BETWEEN},
    "float": {"src_key_padding_mask": torch.zeros(ALIGNED.shape).masked_fill(ALIGNED, -torch.inf)},
    "none": {},
    "with mask": {"src_key_padding_mask": ALIGNED, "mask": torch.zeros(LENGTH, LENGTH)},
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad], ids=["no_grad", "grad"])
@pytest.mark.parametrize("options", [{}, {"enable_nested_tensor": False}, {"mask_check": False}])
def test_outputs_are_those_of_torch(call, norm, mode, options):
    if options.get("mask_check") is False and call == "in between":
        pytest.skip("torch wants to be told the truth")
    model, x = encoder(norm, **options), torch.randn(3, LENGTH, WIDTH)
    split = copy.deepcopy(model)
    prepare(split)
    with mode():
        expected, found = (each[0](x, **CALLS[call]).detach() for each in (model, split))
        if call == "aligned" and mode is torch.no_grad and "enable_nested_tensor" not in options and not norm:
            assert (expected[ALIGNED] == 0).all(), "or the test tests nothing"
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        again = pickle.loads(pickle.dumps(copy.deepcopy(split)))[0](x, **CALLS[call]).detach()
        torch.testing.assert_close(again, found)
        settle(split)
        torch.testing.assert_close(split[0](x, **CALLS[call]).detach(), expected)
    assert split[0].use_nested_tensor == model[0].use_nested_tensor
    assert not any(module._forward_hooks or module._forward_hooks_with_kwargs for module in split.modules())


class Mean(nn.Module):
    """Reads padded positions."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = encoder(), nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.head(
            self.encoder[0](x, src_key_padding_mask=padding(*[1 + i % LENGTH for i in range(len(x))])).mean(1)
        )


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_figures_are_those_of_the_models_in_use(tmp_path):
    model = Mean().eval()
    splits = [[(torch.randn(20, LENGTH, WIDTH), torch.randint(3, (20,))) for _ in range(2)] for _ in range(3)]

    def loss(model, batch):
        return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    result = compress(model, loss, *splits, objective="budget", keep=0.6, speed="none")
    assert result.ranks
    result.save(tmp_path)
    with torch.no_grad():
        dense, compressed, loaded = (
            float(torch.stack([loss(each, batch).mean() for batch in splits[2]]).mean())
            for each in (model, result.model, load_compressed(Mean().eval(), tmp_path))
        )
        assert result.certificate.dense.loss == pytest.approx(dense, rel=1e-5)
        assert result.certificate.compressed.loss == pytest.approx(compressed, rel=1e-5) == pytest.approx(loaded)
        x = splits[0][0][0]
        torch.testing.assert_close(restore_dense(result.model)(x), result.model(x), rtol=1e-4, atol=1e-5)


class Masked(Mean):
    def forward(self, x, mask):
        return self.head(self.encoder[0](x, src_key_padding_mask=mask).mean(1))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_exported_programs_give_the_same(tmp_path):
    model, x = Masked().eval(), torch.randn(4, LENGTH, WIDTH)
    prepare(model)
    export_program(model, (x[:3], ALIGNED), tmp_path / "model.pt2", compare_size=False)
    program = torch.export.load(tmp_path / "model.pt2").module()
    for mask in (padding(5, 3, 1, 2), padding(5, 3, 1, 2).flip(1)):
        with torch.no_grad():
            torch.testing.assert_close(program(x, mask), model(x, mask))
    with torch.no_grad():
        assert not torch.allclose(model(x, mask), model(x, mask.flip(1)))
