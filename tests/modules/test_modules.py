"""Low-rank layers against the dense layers they stand in for; one conformance class for every kind."""

import copy
import io
import math
import pickle

import pytest
import torch
from layer_catalogue import CONVOLUTIONS, EMBEDDING, LINEAR, TRANSPOSED, TRANSPOSED_LINEAR, Conv1D
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

from lrf_lightning.modules import (
    LowRankConv1d,
    LowRankConv2d,
    LowRankConv3d,
    LowRankConvTranspose1d,
    LowRankConvTranspose2d,
    LowRankConvTranspose3d,
    LowRankEmbedding,
    LowRankLinear,
    LowRankModule,
    LowRankTransposedLinear,
)
from lrf_lightning.surgery import factorized, low_rank_type


def pytest_generate_tests(metafunc):
    """Run every test of a conformance class on all cases of its kind; ``first`` is the plain one only."""
    if "case" in metafunc.fixturenames:
        cases = metafunc.cls.cases
        metafunc.parametrize("case", cases.values(), ids=cases)
    if "first" in metafunc.fixturenames:
        metafunc.parametrize("first", [metafunc.cls.cases["plain"]], ids=["plain"])


class Conformance:
    """What every kind promises. Subclasses say which ``kind``, which ``cases`` and which order of the factors."""

    kind: type[LowRankModule]
    cases: dict
    split = None

    def matrices(self, dense: nn.Module):
        """The weight as the matrices that are factorized."""
        matrices = self.kind.matrices(dense)
        if self.split is None:
            return matrices
        groups, rows, _ = matrices.shape
        by_entry = matrices.reshape(groups, rows, -1, math.prod(dense.kernel_size[self.split :]))
        return by_entry.transpose(2, 3).reshape(groups, -1, by_entry.shape[2])

    def decomposed(self, dense: nn.Module):
        """Singular value decomposition of the matrices of a layer, singular values in the left factor."""
        left, values, right = torch.linalg.svd(self.matrices(dense).double(), full_matrices=False)
        return left * values[:, None], right

    def factorized(self, dense: nn.Module, left, right) -> LowRankModule:
        return factorized(dense, left, right, split=self.split)

    def like(self, dense: nn.Module, rank: int) -> LowRankModule:
        return self.kind.like(dense, rank, split=self.split)

    def truncated(self, dense: nn.Module, rank: int) -> LowRankModule:
        left, right = self.decomposed(dense)
        return self.factorized(dense, left[..., :rank], right[:, :rank])

    def test_full_rank_computes_what_the_dense_layer_computes(self, case):
        dense, x = case.dense().double(), case.inputs(torch.float64)
        low = self.truncated(dense, min(self.matrices(dense).shape[1:]))
        assert type(low) is self.kind
        assert_close(low(x), dense(x))
        assert_close(low.weight, dense.weight)

    def test_low_rank_computes_what_a_dense_layer_with_the_product_computes(self, case):
        dense, x = case.dense().double(), case.inputs(torch.float64)
        low = self.truncated(dense, 1)
        assert low.rank == 1
        assert low.left_factor.shape[1] == 1
        assert torch.linalg.matrix_rank(self.matrices(low.to_dense())).tolist() == [1] * low.groups
        assert not torch.allclose(low.weight, dense.weight)
        assert_close(low(x), functional_call(dense, {"weight": low.weight}, x))

    def test_factors_are_what_was_set_and_multiply_to_the_matrices(self, case):
        dense = case.dense().double()
        left, right = self.decomposed(dense)
        rank = min(2, left.shape[-1])
        low = self.factorized(dense, left[..., :rank], right[:, :rank])
        assert_close(low.factors()[0], left[..., :rank])
        assert_close(low.factors()[1], right[:, :rank])
        assert_close(self.matrices(low.to_dense()), left[..., :rank] @ right[:, :rank])

    def test_gradients_follow_the_chain_rule_of_the_dense_layer(self, case):
        dense, x = case.dense().double(), case.inputs(torch.float64)
        low = self.truncated(dense, 1)
        factors = (low.left_factor, low.right_factor)
        output = low(x)
        weighting = torch.randn_like(output)
        got = torch.autograd.grad((output * weighting).sum(), factors)
        dense_output = functional_call(dense, {"weight": low.weight}, x)
        expected = torch.autograd.grad((dense_output * weighting).sum(), factors)
        for one, other in zip(got, expected, strict=True):
            assert_close(one, other)

    def test_gradients_agree_with_finite_differences(self, first):
        dense, x = first.dense().double(), first.inputs(torch.float64)
        low = self.truncated(dense, 2)
        names = list(dict(low.named_parameters()))

        def run(*values):
            return functional_call(low, dict(zip(names, values, strict=True)), x)

        assert torch.autograd.gradcheck(
            run, tuple(p.detach().requires_grad_() for p in low.parameters()), fast_mode=True
        )

    def test_state_dict_round_trip(self, case):
        dense, x = case.dense(), case.inputs()
        low = self.truncated(dense, 1)
        assert set(low.state_dict()) == {"left_factor", "right_factor"} | ({"bias"} if low.bias is not None else set())
        other = self.like(case.dense(), 1)
        other.load_state_dict(low.state_dict())
        assert torch.equal(other(x), low(x))

    def test_constants_of_the_dense_layer(self, case):
        """What code that walks through a model reads, such as counters of operations."""
        dense = case.dense()
        low = self.factorized(dense, *self.decomposed(dense))
        for name in getattr(dense, "__constants__", ()):
            assert getattr(low, name) == getattr(dense, name), name
        assert getattr(low, "transposed", None) == getattr(dense, "transposed", None)

    def test_deepcopy_and_pickle(self, case):
        low, x = self.truncated(case.dense(), 1), case.inputs()
        for twin in (copy.deepcopy(low), pickle.loads(pickle.dumps(low))):
            assert torch.equal(twin(x), low(x))
            assert twin.left_factor.data_ptr() != low.left_factor.data_ptr()
        file = io.BytesIO()
        torch.save(low.state_dict(), file)
        file.seek(0)
        assert set(torch.load(file, weights_only=True)) == set(low.state_dict())

    def test_to_dense_has_the_type_options_and_function(self, case):
        dense, x = case.dense().double().eval(), case.inputs(torch.float64)
        low = self.truncated(dense, 1)
        back = low.to_dense()
        assert type(back) is type(dense)
        assert repr(back) == repr(dense)
        assert {k: v.shape for k, v in back.state_dict().items()} == {k: v.shape for k, v in dense.state_dict().items()}
        assert_close(back(x), low(x))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_dtype_flags_and_mode_are_kept_both_ways(self, first, dtype):
        dense = first.dense().to(dtype).eval()
        dense.weight.requires_grad_(False)
        low = self.truncated(dense, 2)
        back = low.to_dense()
        assert {p.dtype for p in (*low.parameters(), *back.parameters())} == {dtype}
        assert (low.left_factor.requires_grad, low.right_factor.requires_grad, back.weight.requires_grad) == (
            False,
        ) * 3
        assert low.bias is None or (low.bias.requires_grad and back.bias.requires_grad)
        assert not low.training
        assert not back.training

    def test_nothing_shares_storage_with_the_dense_layer(self, first):
        dense = first.dense()
        low = self.truncated(dense, 2)
        before = {name: value.clone() for name, value in low.state_dict().items()}
        with torch.no_grad():
            for parameter in dense.parameters():
                parameter.zero_()
        assert_close(dict(low.state_dict()), before, rtol=0, atol=0)

    def test_meta_device(self, first):
        with torch.device("meta"):
            dense = first.make()
        low = self.like(dense, 2)
        assert all(p.is_meta for p in low.parameters())
        assert all(p.is_meta for p in low.to_dense().parameters())

    def test_autocast(self, first):
        dense, x = first.dense(), first.inputs()
        low = self.truncated(dense, min(self.matrices(dense).shape[1:]))
        with torch.autocast("cpu", torch.bfloat16):
            y = low(x)
        assert y.dtype == torch.bfloat16
        assert_close(y.float(), dense(x), rtol=0.05, atol=0.1)
        y.float().sum().backward()
        assert low.left_factor.grad.dtype == torch.float32

    @pytest.mark.parametrize("scale", [1e-20, 1e20])
    def test_extreme_weights(self, first, scale):
        dense, x = first.dense(), first.inputs()
        with torch.no_grad():
            for parameter in dense.parameters():
                parameter.mul_(scale)
        left, right = self.decomposed(dense)
        root = right.norm(dim=-1).mean() * scale**0.5
        low = self.factorized(dense, left / root, right * root)
        assert_close(low(x) / scale, dense(x) / scale, rtol=1e-4, atol=1e-4)
        assert_close(low.weight / scale, dense.weight / scale, rtol=1e-4, atol=1e-4)

    def test_compiles_into_one_graph(self, first):
        torch.compiler.reset()
        low, x = self.truncated(first.dense(), 2), first.inputs()
        compiled = torch.compile(low, backend="aot_eager", fullgraph=True)
        assert_close(compiled(x), low(x))

    def test_exports(self, first):
        low, x = self.truncated(first.dense(), 2).eval(), first.inputs()
        program = torch.export.export(low, (x,))
        assert_close(program.module()(x), low(x))

    def test_impossible_ranks_and_factors_are_refused(self, first):
        dense = first.dense()
        full = min(self.matrices(dense).shape[1:])
        for rank in (0, full + 1):
            with pytest.raises(ValueError, match=rf"rank={rank} is outside 1\.\.{full}"):
                self.like(dense, rank)
        low = self.like(dense, 2)
        left, right = low.factors()
        with pytest.raises(ValueError, match="do not fit"):
            low.set_factors(left[..., :1], right)
        with pytest.raises(ValueError, match="do not fit"):
            low.set_factors(left, right[..., :-1])
        with pytest.raises(ValueError, match="does not fit"):
            low.set_bias(None if low.bias is not None else torch.zeros(1))


class ConvConformance(Conformance):
    """Besides: inputs without a batch."""

    def test_inputs_without_a_batch(self, first):
        dense, x = first.dense().double(), first.inputs(torch.float64)[0]
        low = self.truncated(dense, min(self.matrices(dense).shape[1:]))
        assert_close(low(x), dense(x))


class ChannelsLast:
    """Images and volumes keep their memory format; one spatial dimension has no such format."""

    def test_channels_last(self, case):
        dense, x = case.dense(), case.inputs()
        layout = {4: torch.channels_last, 5: torch.channels_last_3d}[x.dim()]
        reference = self.truncated(dense, 2)(x)
        low = self.truncated(dense.to(memory_format=layout), 2)
        assert low.right_factor.is_contiguous(memory_format=layout)
        assert low.left_factor.is_contiguous(memory_format=layout)
        assert low.to_dense().weight.is_contiguous(memory_format=layout)
        assert_close(low(x.to(memory_format=layout)), reference)


class TestLinear(Conformance):
    kind, cases = LowRankLinear, LINEAR


class TestTransposedLinear(Conformance):
    kind, cases = LowRankTransposedLinear, TRANSPOSED_LINEAR

    # the class of the catalogue poses as one of another package, where pickle would look for it
    def test_deepcopy_and_pickle(self, case):
        low, x = self.truncated(case.dense(), 1), case.inputs()
        assert torch.equal(copy.deepcopy(low)(x), low(x))


class TestEmbedding(Conformance):
    kind, cases = LowRankEmbedding, EMBEDDING

    def test_padding_entry_gets_no_gradient_and_keeps_its_value(self):
        dense = nn.Embedding(9, 4, padding_idx=-1)
        low = self.truncated(dense, 2)
        assert low.padding_idx == 8
        assert low.to_dense().padding_idx == 8
        x = torch.tensor([[8, 1], [3, 8]])
        assert_close(low(x)[0, 0], torch.zeros(4))
        low(x).sum().backward()
        assert low.left_factor.grad[8].abs().sum() == 0
        assert low.left_factor.grad[1].abs().sum() > 0

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"max_norm": 1.0}, "max_norm=1 rewrites"),
            ({"sparse": True}, "gradients are sparse"),
            ({"scale_grad_by_freq": True}, "scaled by frequency"),
        ],
    )
    def test_tables_with_side_effects_are_refused(self, options, reason):
        assert reason in LowRankEmbedding.objection(nn.Embedding(9, 4, **options))


class TestConv1d(ConvConformance):
    kind, cases = LowRankConv1d, CONVOLUTIONS[1]


class TestConv2d(ChannelsLast, ConvConformance):
    kind, cases = LowRankConv2d, CONVOLUTIONS[2]


class TestConv3d(ChannelsLast, ConvConformance):
    kind, cases = LowRankConv3d, CONVOLUTIONS[3]


class TestConv1dPointwiseFirst(TestConv1d):
    split = 0


class TestConv2dPointwiseFirst(TestConv2d):
    split = 0


class TestConv3dPointwiseFirst(TestConv3d):
    split = 0


class TestConv2dSpatialSplit(TestConv2d):
    split = 1


class TestConv3dColumnFirst(TestConv3d):
    split = 1


class TestConv3dRowLast(TestConv3d):
    split = 2


class TransposedConformance(ConvConformance):
    """Besides: the size of the output on request."""

    @pytest.mark.parametrize("extra", [0, 1])
    def test_output_size(self, extra):
        options = {"stride": 2, "padding": 1, "dilation": 2, "groups": 2}
        dense = self.kind.dense_type(4, 6, 3, **options).double()
        low = self.truncated(dense, 2)
        x = torch.randn(2, 4, *(5, 4, 3)[: len(dense.kernel_size)], dtype=torch.float64)
        size = [s + extra for s in dense(x).shape[2:]]
        assert_close(low(x, size), dense(x, size))
        assert_close(low(x, [2, 6, *size]), dense(x, [2, 6, *size]))
        with pytest.raises(ValueError, match="cannot be reached"):
            low(x, [s + 2 for s in size])


class TestConvTranspose1d(TransposedConformance):
    kind, cases = LowRankConvTranspose1d, TRANSPOSED[1]


class TestConvTranspose2d(ChannelsLast, TransposedConformance):
    kind, cases = LowRankConvTranspose2d, TRANSPOSED[2]


class TestConvTranspose3d(ChannelsLast, TransposedConformance):
    kind, cases = LowRankConvTranspose3d, TRANSPOSED[3]


def test_every_kind_prints_its_rank():
    for dense in (nn.Linear(4, 5), nn.Conv2d(4, 5, 3), nn.ConvTranspose1d(4, 5, 3), nn.Embedding(7, 5), Conv1D(5, 4)):
        assert "rank=2" in repr(low_rank_type(dense).like(dense, 2))
