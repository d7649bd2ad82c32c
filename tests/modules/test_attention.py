"""Split attention against ``nn.MultiheadAttention``, in every option and inside torch's transformer layers."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lrf_lightning.modules import LowRankLinear, SplitAttention
from lrf_lightning.surgery import prepare, set_structure

OPTIONS = [
    {},
    {"batch_first": True},
    {"batch_first": True, "bias": False},
    {"kdim": 5, "vdim": 6},
    {"kdim": 5, "batch_first": True, "add_bias_kv": True},
    {"add_bias_kv": True, "add_zero_attn": True},
    {"add_zero_attn": True, "batch_first": True, "bias": False},
]
N, L, S, E, H = 3, 4, 5, 8, 2


def attention(**options) -> nn.MultiheadAttention:
    module = nn.MultiheadAttention(E, H, dtype=torch.float64, **options).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def arguments(module: nn.MultiheadAttention):
    shapes = ((N, L, E), (N, S, module.kdim), (N, S, module.vdim))
    values = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    return values if module.batch_first else [value.transpose(0, 1) for value in values]


def masks():
    """Every pair of an attention mask and a padding mask; no query is left without a key."""
    square = torch.rand(L, S) > 0.6
    square[:, 0] = False
    per_head = (torch.rand(N * H, L, S) > 0.6) & square[None]
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[1, 3:] = True
    additive = torch.zeros(L, S, dtype=torch.float64).masked_fill(square, -torch.inf)
    soft = torch.randn(N, S, dtype=torch.float64)
    return [*itertools.product((None, square, per_head), (None, padding)), (additive, soft), (None, soft)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("need_weights", [True, False])
def test_results_are_those_of_packed_attention(options, need_weights):
    module = attention(**options)
    split = SplitAttention.from_packed(module)
    for (attn_mask, padding), average in itertools.product(masks(), (True, False)):
        call = {
            "attn_mask": attn_mask,
            "key_padding_mask": padding,
            "need_weights": need_weights,
            "average_attn_weights": average,
        }
        values = arguments(module)
        expected, expected_weights = module(*values, **call)
        got, got_weights = split(*values, **call)
        assert_close(got, expected)
        assert (got_weights is None) == (not need_weights)
        if need_weights:
            assert_close(got_weights, expected_weights)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_inputs_without_a_batch(options):
    module = attention(**options)
    values = [
        torch.randn(rows, size, dtype=torch.float64) for rows, size in ((L, E), (S, module.kdim), (S, module.vdim))
    ]
    padding = torch.tensor([False, True, False, False, False])
    for got, expected in zip(
        SplitAttention.from_packed(module)(*values, padding), module(*values, padding), strict=True
    ):
        assert_close(got, expected)


@pytest.mark.parametrize("batch_first", [True, False])
def test_fused_self_attention_without_gradients(batch_first):
    module = attention(batch_first=batch_first)
    x = torch.randn(N, L, E, dtype=torch.float64)
    with torch.no_grad():
        assert_close(SplitAttention.from_packed(module)(x, x, x)[0], module(x, x, x)[0])


def test_causal_hint():
    module = attention(batch_first=True)
    x = torch.randn(N, L, E, dtype=torch.float64)
    mask = torch.triu(torch.ones(L, L, dtype=torch.bool), 1)
    split = SplitAttention.from_packed(module)
    for need_weights in (True, False):
        call = {"attn_mask": mask, "is_causal": True, "need_weights": need_weights}
        assert_close(split(x, x, x, **call)[0], module(x, x, x, **call)[0])
    with pytest.raises(RuntimeError, match="give attn_mask too"):
        split(x, x, x, is_causal=True)


def test_dropout_acts_in_training_only():
    module = attention(dropout=0.5, batch_first=True)
    x = torch.randn(N, L, E, dtype=torch.float64)
    split = SplitAttention.from_packed(module)
    assert_close(split(x, x, x)[0], module(x, x, x)[0])
    split.train()
    for need_weights in (True, False):
        assert not torch.allclose(split(x, x, x, need_weights=need_weights)[0], module(x, x, x)[0])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_way_back_restores_every_parameter(options):
    module = attention(**options)
    module.out_proj.weight.requires_grad_(False)
    split = SplitAttention.from_packed(module)
    assert sum(p.numel() for p in split.parameters()) == sum(p.numel() for p in module.parameters())
    back = split.to_packed()
    assert type(back) is nn.MultiheadAttention
    assert back.dropout == module.dropout
    assert not back.training
    assert_close(dict(back.state_dict()), dict(module.state_dict()), rtol=0, atol=0)
    flags = {name: p.requires_grad for name, p in module.named_parameters()}
    assert {name: p.requires_grad for name, p in back.named_parameters()} == flags
    values = arguments(module)
    assert_close(back(*values)[0], module(*values)[0])


def test_split_parameters_are_copies_unless_asked_otherwise():
    module = attention()
    copied, views = SplitAttention.from_packed(module), SplitAttention.from_packed(module, copy=False)
    with torch.no_grad():
        module.in_proj_weight.zero_()
    assert copied.k_proj.weight.abs().sum() > 0
    assert views.k_proj.weight.abs().sum() == 0


def test_gradients_are_those_of_packed_attention():
    module = attention(batch_first=True)
    split = SplitAttention.from_packed(module)
    x = torch.randn(N, L, E, dtype=torch.float64)
    module(x, x, x)[0].square().sum().backward()
    split(x, x, x)[0].square().sum().backward()
    parts = [getattr(split, name) for name in ("q_proj", "k_proj", "v_proj")]
    assert_close(torch.cat([part.weight.grad for part in parts]), module.in_proj_weight.grad)
    assert_close(torch.cat([part.bias.grad for part in parts]), module.in_proj_bias.grad)
    assert_close(split.out_proj.weight.grad, module.out_proj.weight.grad)


def low_rank() -> SplitAttention:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(E, H, batch_first=True)})
    set_structure(model, {"attn.q_proj": 2, "attn.out_proj": 3})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model["attn"].eval()


def test_low_rank_projections_work_like_their_products():
    split = low_rank()
    assert isinstance(split.q_proj, LowRankLinear)
    assert isinstance(split.k_proj, nn.Linear)
    dense = copy.deepcopy(split)
    dense.q_proj, dense.out_proj = split.q_proj.to_dense(), split.out_proj.to_dense()
    x = torch.randn(N, L, E)
    assert_close(split(x, x, x)[0], dense.to_packed()(x, x, x)[0], rtol=1e-4, atol=1e-4)


def test_compile_export_copy_and_autocast():
    torch.compiler.reset()
    split, x = low_rank(), torch.randn(N, L, E)
    expected = split(x, x, x)[0]
    assert_close(torch.compile(split, backend="aot_eager", fullgraph=True)(x, x, x)[0], expected)
    assert_close(torch.export.export(split, (x, x, x)).module()(x, x, x)[0], expected)
    assert torch.equal(copy.deepcopy(split)(x, x, x)[0], expected)
    assert torch.equal(pickle.loads(pickle.dumps(split))(x, x, x)[0], expected)
    padding = torch.zeros(N, L, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        for need_weights in (True, False):
            y = split(x, x, x, padding, need_weights=need_weights)[0]
            assert y.dtype == torch.bfloat16
            assert_close(y.float(), expected, rtol=0.1, atol=0.5)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_encoder_with_padding_keeps_its_results(norm_first, batch_first):
    """Torch's encoder would hand nested tensors to its layers, and read their weights, in inference."""
    layer = nn.TransformerEncoderLayer(E, H, 16, batch_first=batch_first, norm_first=norm_first)
    dense = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first and not norm_first).eval()
    model = nn.Sequential(copy.deepcopy(dense))
    prepare(model)
    x = torch.randn((N, S, E) if batch_first else (S, N, E))
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[1, 3:] = True
    calls: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, *_: calls.append(module))
    with torch.no_grad():
        got, expected = model[0](x, src_key_padding_mask=padding), dense(x, src_key_padding_mask=padding)
    if not batch_first:
        got, expected = got.transpose(0, 1), expected.transpose(0, 1)
    assert_close(got[~padding], expected[~padding])
    assert len(calls) == 2 * 6


def test_decoder_keeps_its_results():
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 16, batch_first=True), 2).eval()
    model = nn.Sequential(copy.deepcopy(decoder))
    prepare(model)
    target, memory = torch.randn(N, L, E), torch.randn(N, S, E)
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    with torch.no_grad():
        assert_close(model[0](target, memory, mask), decoder(target, memory, mask))
    assert sum(isinstance(module, SplitAttention) for module in model.modules()) == 4
