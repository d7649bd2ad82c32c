"""Finding layers, and replacing them without breaking what they share."""

import copy

import pytest
import torch
from layer_catalogue import EVERY_CASE, Conv1D
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close

from lrf_lightning.modules import LowRankEmbedding, LowRankLinear, LowRankModule, SplitAttention
from lrf_lightning.surgery import (
    factorized,
    find_layers,
    low_rank_type,
    prepare,
    replace_module,
    restore_dense_structure,
    set_structure,
    settle,
)


def reasons(model, **choice):
    return {item.name: item.reason for item in find_layers(model, **choice)[1]}


def names(model, **choice):
    return [candidate.name for candidate in find_layers(model, **choice)[0]]


def full_rank(dense: nn.Module) -> LowRankModule:
    left, values, right = torch.linalg.svd(low_rank_type(dense).matrices(dense), full_matrices=False)
    return factorized(dense, left * values[:, None], right)


class Tied(nn.Module):
    """Two linear layers with one weight and biases of their own."""

    def __init__(self):
        super().__init__()
        self.first, self.other, self.second = nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.other(self.second(self.first(x).tanh()))


class LanguageModel(nn.Module):
    """An embedding whose table is also the weight of the output layer."""

    def __init__(self):
        super().__init__()
        self.embedding, self.middle, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.middle(self.embedding(x)))


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    return nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 2), "head": nn.Linear(16, 8)}).eval()


class TestFindLayers:
    @pytest.mark.parametrize("case", EVERY_CASE.values(), ids=EVERY_CASE)
    def test_every_kind_is_found_with_its_sizes(self, case):
        dense = case.dense()
        candidates, skipped = find_layers(nn.ModuleDict({"layer": dense}))
        candidate = candidates[0] if candidates else None
        if candidate is None:
            assert "no rank saves parameters" in skipped[0].reason
            return
        assert (candidate.name, candidate.kind, skipped) == ("layer", type(dense).__name__, [])
        assert candidate.dense_params == dense.weight.numel()
        assert candidate.matrices().shape == (candidate.groups, candidate.rows, candidate.columns)
        for rank in (1, candidate.max_rank, candidate.max_rank + 1):
            if rank > candidate.full_rank:
                continue
            low = low_rank_type(dense).like(dense, rank, split=candidate.split)
            params = low.left_factor.numel() + low.right_factor.numel()
            assert params == candidate.low_rank_params(rank)
            assert (params < candidate.dense_params) == (rank <= candidate.max_rank)

    def test_orders_of_a_convolution(self):
        def orders(conv, wanted="best"):
            candidates, _ = find_layers(nn.ModuleDict({"layer": conv}), conv_order=wanted)
            return [(order.order, order.split, order.sides) for found in candidates for order in found.orders(wanted)]

        plain = nn.Conv2d(8, 6, (3, 2))
        kernel, pointwise, split = (
            ("kernel_first", None, (6, 48)),
            ("pointwise_first", 0, (36, 8)),
            ("spatial_split", 1, (12, 24)),
        )
        assert orders(plain) == [kernel, pointwise, split]
        assert [orders(plain, order[0]) for order in (kernel, pointwise, split)] == [[kernel], [pointwise], [split]]
        assert [split for _, split, _ in orders(nn.Conv3d(8, 8, 3))] == [None, 0, 1, 2]
        # a kernel in one dimension has nothing to split, a single entry no order at all
        for conv in (nn.Conv1d(8, 8, 3), nn.Conv2d(8, 8, (1, 3))):
            assert [name for name, _, _ in orders(conv)] == ["kernel_first", "pointwise_first"]
            assert [name for name, _, _ in orders(conv, "spatial_split")] == ["kernel_first"]
        assert orders(nn.Conv2d(8, 8, 1), "pointwise_first") == [(None, None, (8, 8))]
        assert orders(nn.ConvTranspose2d(8, 8, 3), "pointwise_first")[0][:2] == (None, None)

    def test_one_output_channel_saves_in_other_orders(self):
        model = nn.ModuleDict({"layer": nn.Conv2d(16, 1, 3)})
        (candidate,), _ = find_layers(model)
        assert [order.order for order in candidate.orders()] == ["pointwise_first", "spatial_split"]
        assert candidate.max_rank > 0
        assert reasons(model, conv_order="kernel_first") == {"layer": "no rank saves parameters (1 x 1 x 144)"}

    def test_subclasses_that_only_begin_differently(self):
        class Begun(nn.Linear):
            """Other initial weights."""

            def __init__(self, size: int) -> None:
                super().__init__(size, size)

            def reset_parameters(self) -> None:
                nn.init.orthogonal_(self.weight)

            @staticmethod
            def stride() -> int:
                return 1

        class Scaled(Begun):
            def __init__(self):
                super().__init__(8)
                self.scale = 2.0

        class Parent(nn.Conv2d):
            def size(self):
                return self.weight.numel()

        class Extra(nn.Linear):
            def __init__(self):
                super().__init__(8, 8)
                self.register_buffer("offset", torch.zeros(8))

        class Private(Begun):
            def __init__(self):
                super().__init__(8)
                self._scale = 2.0

        class Static(nn.Linear):
            @staticmethod
            def forward(x):
                return x

        class Mixin:
            def __call__(self, x):
                return x

        class Mixed(Mixin, nn.Embedding):
            pass

        torch.manual_seed(0)
        model = nn.Sequential(Begun(8), Scaled(), Parent(4, 4, 3), Extra(), Mixed(9, 9), Private(), Static(8, 8))
        model[0]._is_hf_initialized = True
        assert names(model) == ["0"]
        model[0].forward = model[0].forward
        assert low_rank_type(model[0]) is LowRankLinear, "the solver may be observing it"
        assert "forward of its own" in reasons(model)["0"], "but a user may have replaced it"
        del model[0].forward
        assert reasons(model)["1"] == "Scaled is not supported"
        (candidate,), _ = find_layers(model)
        weight = model[0].weight.detach()
        left, values, right = torch.linalg.svd(candidate.matrices())
        stand_in = candidate.stand_in((left * values[:, None])[..., :3], right[:, :3])
        replace_module(model, "0", stand_in)
        assert type(model[0]) is LowRankLinear
        cut = (left[0, :, :3] * values[0, :3]) @ right[0, :3]
        torch.testing.assert_close(model[0].to_dense().weight, cut)
        assert (cut - weight).norm() > 1e-3

    def test_what_cannot_be_factorized_is_listed_with_the_reason(self):
        model = nn.ModuleDict(
            {
                "depthwise": nn.Conv2d(8, 8, 3, groups=8),
                "narrow": nn.Linear(8, 1),
                "parametrized": parametrizations.weight_norm(nn.Linear(8, 8)),
                "pruned": prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5),
                "lazy": nn.LazyLinear(8),
                "lazy_conv": nn.LazyConv2d(8, 3),
                "meta": nn.Linear(8, 8, device="meta"),
                "bfloat16_": nn.Linear(8, 8, dtype=torch.bfloat16),
                "complex": nn.Linear(8, 8, dtype=torch.complex64),
                "recurrent": nn.LSTM(8, 8),
                "bilinear": nn.Bilinear(4, 4, 4),
                "bag": nn.EmbeddingBag(20, 8),
                "renormed": nn.Embedding(20, 8, max_norm=1.0),
                "quantized": torch.ao.nn.quantized.dynamic.Linear(8, 8),
                "norm": nn.BatchNorm2d(8),
            }
        )
        model["sparse"] = nn.Linear(8, 8)
        model["sparse"].weight = nn.Parameter(torch.eye(8).to_sparse())
        model["wrapped"] = nn.Linear(8, 8)
        model["wrapped"].weight = type("Special", (nn.Parameter,), {})(torch.eye(8))
        model["low"] = LowRankLinear(8, 8, 2)

        class Custom(nn.Linear):
            def forward(self, x):
                return super().forward(x).relu()

        model["custom"] = Custom(8, 8)
        found = reasons(model)
        assert names(model) == ["bfloat16_"]
        expected = {
            "depthwise": "is depthwise",
            "narrow": "no rank saves parameters",
            "parametrized": "is parametrized",
            "pruned": "computed from other parameters",
            "lazy": "LazyLinear is not supported",
            "lazy_conv": "LazyConv2d is not supported",
            "meta": "not a dense floating-point tensor",
            "complex": "not a dense floating-point tensor",
            "recurrent": "LSTM is not supported",
            "bilinear": "Bilinear is not supported",
            "bag": "EmbeddingBag is not supported",
            "renormed": "max_norm=1 rewrites",
            "quantized": "is quantized",
            "sparse": "not a dense floating-point tensor",
            "wrapped": "its weight is a Special",
            "low": "is low-rank already",
            "custom": "Custom is not supported",
        }
        assert set(found) == set(expected)
        for name, reason in expected.items():
            assert reason in found[name], name

    def test_the_model_itself_is_left_alone(self):
        for model in (nn.Linear(8, 8), nn.MultiheadAttention(8, 2)):
            assert reasons(model) == {"": "is the model itself; wrap it in a module"}

    def test_names_types_predicate_frozen_and_size(self):
        model = nn.ModuleDict(
            {"conv": nn.Conv2d(8, 8, 3), "linear": nn.Linear(8, 8), "attn": nn.MultiheadAttention(8, 2)}
        )
        attn = [f"attn.{part}" for part in SplitAttention.PROJECTIONS]
        assert names(model) == ["conv", "linear", *attn]
        assert names(model, include=("conv", "*.q_proj")) == ["conv", "attn.q_proj"]
        assert names(model, exclude=("attn", "conv")) == ["linear"]
        assert names(model, types=("Conv*",)) == ["conv"]
        assert names(model, types=("Linear",)) == ["linear", *attn]
        assert names(model, types=("MultiheadAttention",)) == attn
        assert names(model, exclude_types=("MultiheadAttention", "Conv2d")) == ["linear"]
        assert names(model, predicate=lambda name, module: isinstance(module, nn.Conv2d) or "v" in name) == [
            "conv",
            "attn.v_proj",
        ]
        model["linear"].weight.requires_grad_(False)
        assert "linear" in names(model, frozen=True)
        assert reasons(model) == {"linear": "is frozen (frozen=True factorizes it)"}
        model["linear"].weight.requires_grad_(True)
        assert reasons(model, min_params=65)["linear"] == "has 64 weights, fewer than min_params=65"
        assert reasons(model, types=("Conv2d",))["linear"] == "its type is not matched by types"
        assert reasons(model, exclude_types=("Linear",))["linear"] == "its type is matched by exclude_types"
        assert reasons(model, include=("conv",))["linear"] == "not matched by include"
        assert reasons(model, exclude=("linear",))["linear"] == "matched by exclude"
        assert reasons(model, predicate=lambda *_: False)["conv"] == "refused by predicate"

    @pytest.mark.parametrize("argument", ["include", "exclude", "types", "exclude_types"])
    def test_a_pattern_without_a_match_is_refused(self, argument):
        with pytest.raises(ValueError, match=rf"{argument}='conv2D\*' matches no .*"):
            find_layers(nn.Sequential(nn.Conv2d(8, 8, 3)), **{argument: ("conv2D*",)})

    def test_looking_changes_nothing(self):
        model = nn.ModuleDict({"body": encoder(), "tied": Tied()})
        before = str(model), {name: id(p) for name, p in model.named_parameters()}
        find_layers(model)
        assert (str(model), {name: id(p) for name, p in model.named_parameters()}) == before

    def test_attention_is_seen_alike_before_and_after_it_is_split(self):
        model = encoder()
        before = [(c.name, c.kind, c.rows, c.columns) for c in find_layers(model)[0]]
        matrices = [c.matrices().clone() for c in find_layers(model)[0]]
        prepare(model)
        assert [(c.name, c.kind, c.rows, c.columns) for c in find_layers(model)[0]] == before
        assert len(before) == 2 * 6 + 1
        for got, expected in zip((c.matrices() for c in find_layers(model)[0]), matrices, strict=True):
            assert torch.equal(got, expected)

    def test_attention_that_cannot_be_split_is_left_alone_with_its_encoder_layer(self):
        class Custom(nn.MultiheadAttention):
            pass

        model = nn.ModuleDict({"layer": nn.TransformerEncoderLayer(16, 2, 32), "head": nn.Linear(16, 16)})
        model["layer"].self_attn = Custom(16, 2)
        assert names(model) == ["head"]
        assert reasons(model) == {
            "layer.self_attn": "Custom is not supported",
            "layer.linear1": "its weight is read directly by TransformerEncoderLayer",
            "layer.linear2": "its weight is read directly by TransformerEncoderLayer",
        }
        prepare(model)
        assert type(model["layer"].self_attn) is Custom
        assert set(reasons(model["layer"])) == {"self_attn", "linear1", "linear2"}

    def test_layers_that_share_a_weight_are_one_candidate(self):
        candidates, skipped = find_layers(Tied())
        assert [(c.name, c.twins) for c in candidates] == [("first", ("second",)), ("other", ())]
        assert [(s.name, s.reason) for s in skipped] == [
            ("second", "shares the weight of 'first' and is factorized with it")
        ]

    def test_layers_that_share_a_weight_are_left_alone_together(self):
        found = reasons(Tied(), exclude=("second",))
        assert found["first"] == "its weight is shared with 'second', which is left alone: matched by exclude"
        assert names(Tied(), exclude=("second",)) == ["other"]
        small = reasons(Tied(), min_params=65)
        assert small["second"] == "shares the weight of 'first', which is left alone"

    def test_weights_that_are_shared_in_other_ways_are_left_alone(self):
        model = Tied()
        model.raw = model.other.weight
        assert reasons(model)["other"] == "its weight is shared with '', which is not supported"
        strides = nn.ModuleList([nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, stride=2)])
        strides[1].weight = strides[0].weight
        assert reasons(strides)["0"] == "its weight is shared with '1', a Conv2d that uses it differently"

    def test_an_output_layer_that_shares_the_table_of_an_embedding_goes_with_it(self):
        candidates, skipped = find_layers(LanguageModel())
        assert [(c.name, c.twins, c.transposed) for c in candidates] == [
            ("embedding", ("head",), ("head",)),
            ("middle", (), ()),
        ]
        assert [s.reason for s in skipped] == ["shares the weight of 'embedding' and is factorized with it"]

    def test_a_module_that_hangs_in_two_places_is_found_once(self):
        shared = nn.Linear(8, 8)
        model = nn.ModuleDict({"a": shared, "b": shared})
        assert [(c.name, c.twins) for c in find_layers(model)[0]] == [("a", ())]


class TestReplaceModule:
    def test_a_shared_module_is_replaced_everywhere(self):
        shared = nn.Linear(8, 8)
        model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
        new = LowRankLinear(8, 8, 2)
        replace_module(model, "b.0", new)
        assert model["a"] is model["b"][0] is new

    @pytest.mark.parametrize("name", ["", "missing", "a.b"])
    def test_unknown_names_are_refused(self, name):
        with pytest.raises(ValueError, match="no replaceable module"):
            replace_module(nn.ModuleDict({"a": nn.Linear(8, 8)}), name, nn.Identity())

    @pytest.mark.parametrize("name", ["first", "second"])
    def test_layers_that_share_a_weight_share_the_factors_and_keep_their_biases(self, name):
        model, x = Tied().double(), torch.randn(3, 8, dtype=torch.float64)
        expected, dense = model(x), model.get_submodule(name)
        biases = model.first.bias.clone(), model.second.bias.clone()
        model.first.train()
        model.second.eval()
        replace_module(model, name, full_rank(dense))
        assert_close(model(x), expected)
        assert model.first.left_factor is model.second.left_factor
        assert model.first.right_factor is model.second.right_factor
        assert_close((model.first.bias, model.second.bias), biases)
        assert (model.first.training, model.second.training) == (True, False)
        replace_module(model, name, dense)
        assert model.first.weight is model.second.weight is dense.weight
        assert type(model.first) is type(model.second) is nn.Linear
        assert_close(model(x), expected)

    def test_a_shared_bias_stays_shared(self):
        model = Tied()
        model.second.bias = model.first.bias
        replace_module(model, "first", full_rank(model.first))
        assert model.first.bias is model.second.bias
        restore_dense_structure(model)
        assert model.first.bias is model.second.bias
        assert model.first.weight is model.second.weight

    def test_an_embedding_and_the_output_layer_share_their_factors(self):
        model, x = LanguageModel().double(), torch.randint(20, (2, 5))
        expected = model(x)
        replace_module(model, "embedding", full_rank(model.embedding))
        assert isinstance(model.embedding, LowRankEmbedding)
        assert isinstance(model.head, LowRankLinear)
        assert model.head.left_factor is model.embedding.left_factor
        assert_close(model(x), expected)
        restore_dense_structure(model)
        assert model.head.weight is model.embedding.weight
        assert_close(model(x), expected)

    def test_another_kind_of_module_leaves_layers_that_share_the_weight_alone(self):
        model = Tied()
        second = model.second
        replace_module(model, "first", nn.Identity())
        assert model.second is second

    def test_a_projection_of_packed_attention_can_be_replaced(self):
        model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
        replace_module(model, "attn.v_proj", LowRankLinear(8, 8, 2))
        assert isinstance(model["attn"], SplitAttention)
        assert model["attn"].v_proj.rank == 2


class TestHooks:
    """Hooks of users stay where they were registered, whatever stands there."""

    @staticmethod
    def observed(model, name):
        """Register hooks of all kinds; returns what they note, and their handles."""
        seen, layer = [], model.get_submodule(name)
        return seen, [
            layer.register_forward_pre_hook(lambda m, args: seen.append("before")),
            layer.register_forward_pre_hook(lambda m, args, kwargs: seen.append("before+"), with_kwargs=True),
            layer.register_forward_hook(lambda m, args, output: seen.append("after")),
            layer.register_forward_hook(
                lambda m, args, kwargs, output: seen.append("after+"), with_kwargs=True, always_call=True
            ),
            layer.register_full_backward_pre_hook(lambda m, output: seen.append("backward before")),
            layer.register_full_backward_hook(lambda m, inputs, output: seen.append("backward")),
        ]

    EVERY = ("before", "before+", "after", "after+", "backward before", "backward")

    def assert_called(self, model, x, seen):
        seen.clear()
        model(x).sum().backward()
        assert tuple(seen) == self.EVERY

    def test_when_a_layer_is_replaced_and_put_back(self):
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        seen, handles = self.observed(model, "0")
        x = torch.ones(2, 6)
        self.assert_called(model, x, seen)
        set_structure(model, {"0": 2})
        with torch.no_grad():
            for parameter in model[0].parameters():
                parameter.fill_(0.1)
        self.assert_called(model, x, seen)
        set_structure(model, {"0": 3})
        assert type(model[0]) is LowRankLinear
        self.assert_called(model, x, seen)
        self.assert_called(copy.deepcopy(model), x, seen)
        restore_dense_structure(model)
        assert type(model[0]) is nn.Linear
        self.assert_called(model, x, seen)
        for handle in handles:
            handle.remove()
        model(x).sum().backward()
        assert tuple(seen) == self.EVERY, "not called again"

    def test_when_a_layer_that_shares_its_weight_is_replaced(self):
        model = Tied()
        seen, _ = self.observed(model, "second")
        replace_module(model, "first", full_rank(model.first))
        assert isinstance(model.second, LowRankModule)
        assert not model.first._forward_hooks
        self.assert_called(model, torch.ones(2, 8), seen)

    def test_when_attention_is_split_and_packed(self):
        model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
        weights = []
        model["attention"].register_forward_hook(lambda m, args, output: weights.append(output[1]))
        x = torch.randn(3, 1, 8)
        for change in (lambda _: None, prepare, settle):
            change(model)
            model["attention"](x, x, x)
        assert [w.shape for w in weights] == [(1, 3, 3)] * 3

    def test_a_replacement_keeps_its_own(self):
        model = nn.Sequential(nn.Linear(6, 6))
        seen, _ = self.observed(model, "0")
        new = full_rank(model[0])
        new.register_forward_hook(lambda m, args, output: seen.append("own"))
        replace_module(model, "0", new)
        model(torch.ones(1, 6))
        assert seen == ["own"]


class TestStructure:
    @pytest.mark.parametrize("case", EVERY_CASE.values(), ids=EVERY_CASE)
    def test_round_trip_of_every_kind(self, case):
        model, x = nn.ModuleDict({"layer": case.dense().double()}), case.inputs(torch.float64)
        fresh = copy.deepcopy(model)
        expected = model["layer"](x)
        replace_module(model, "layer", full_rank(model["layer"]))
        rank = model["layer"].rank
        set_structure(fresh, {"layer": rank})
        fresh.load_state_dict(model.state_dict())
        assert_close(fresh["layer"](x), expected)
        same = fresh["layer"]
        set_structure(fresh, {"layer": rank})
        assert fresh["layer"] is same
        set_structure(fresh, {"layer": 1})
        assert fresh["layer"].rank == 1
        set_structure(model, {})
        assert type(model["layer"]) is type(case.dense())
        assert_close(model["layer"](x), expected)

    def test_flags_are_kept(self):
        model = nn.ModuleDict({"layer": nn.Linear(8, 8)})
        model["layer"].weight.requires_grad_(False)
        model.eval()
        set_structure(model, {"layer": 2})
        low = model["layer"]
        assert (low.left_factor.requires_grad, low.bias.requires_grad, low.training) == (False, True, False)

    def test_what_cannot_be_rebuilt_is_refused(self):
        model = nn.ModuleDict(
            {
                "layer": nn.Linear(8, 8),
                "norm": nn.LayerNorm(8),
                "parametrized": parametrizations.orthogonal(nn.Linear(8, 8)),
                "attn": type("Custom", (nn.MultiheadAttention,), {})(8, 2),
            }
        )
        for ranks, message in (
            ({"missing": 2}, "no module named 'missing'"),
            ({"norm": 2}, "'norm' is a LayerNorm; a rank can be given to Linear, Conv1d"),
            ({"layer": 9}, r"'layer': rank=9 is outside 1\.\.8"),
            ({"parametrized": 2}, "'parametrized' is a ParametrizedLinear"),
            ({"attn.q_proj": 2}, "cannot be split into its projections: Custom is not supported"),
        ):
            with pytest.raises(ValueError, match=message):
                set_structure(model, ranks)

    def test_factorized_refuses_other_kinds(self):
        with pytest.raises(ValueError, match="a LayerNorm cannot be factorized"):
            factorized(nn.LayerNorm(8), torch.ones(1, 8, 1), torch.ones(1, 1, 8))

    def test_shared_weights_are_shared_again(self):
        model, fresh, x = Tied(), Tied(), torch.randn(3, 8)
        set_structure(model, {"first": 3})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        set_structure(fresh, {"first": 3})
        assert fresh.first.left_factor is fresh.second.left_factor
        fresh.load_state_dict(model.state_dict())
        assert_close(fresh(x), model(x))
        set_structure(fresh, {"first": 2})
        assert fresh.second.rank == 2
        assert fresh.first.right_factor is fresh.second.right_factor
        copied = copy.deepcopy(model)
        assert copied.first.left_factor is copied.second.left_factor
        set_structure(model, {"other": 2})
        assert model.first.weight is model.second.weight

    def test_meta_models_get_a_structure(self):
        with torch.device("meta"):
            model = encoder()
        set_structure(model, {"encoder.layers.0.self_attn.q_proj": 2, "head": 3})
        assert model["head"].left_factor.shape == (8, 3)
        assert isinstance(model["encoder"].layers[1].self_attn, SplitAttention)

    def test_only_attention_that_needs_it_stays_split(self):
        model = nn.ModuleDict({"a": encoder(), "b": encoder(), "attn": nn.MultiheadAttention(16, 2)})
        parameters = dict(model.named_parameters())
        set_structure(model, {"a.encoder.layers.0.linear1": 2})
        kinds = {name: type(m).__name__ for name, m in model.named_modules() if "attn" in name.rpartition(".")[2]}
        assert kinds == {
            "a.encoder.layers.0.self_attn": "SplitAttention",
            "a.encoder.layers.1.self_attn": "SplitAttention",
            "b.encoder.layers.0.self_attn": "MultiheadAttention",
            "b.encoder.layers.1.self_attn": "MultiheadAttention",
            "attn": "MultiheadAttention",
        }
        assert (model["a"]["encoder"].use_nested_tensor, model["b"]["encoder"].use_nested_tensor) == (False, True)
        assert model["attn"].in_proj_weight is parameters["attn.in_proj_weight"]
        set_structure(model, {})
        assert set(dict(model.named_parameters())) == set(parameters)
        assert model["a"]["encoder"].use_nested_tensor

    def test_prepare_and_settle_are_inverse(self):
        model = nn.ModuleDict({"body": encoder(), "attn": nn.MultiheadAttention(16, 4, kdim=8, add_bias_kv=True)})
        state, text = {k: v.clone() for k, v in model.state_dict().items()}, str(model)
        prepare(model)
        assert "MultiheadAttention" not in {type(module).__name__ for module in model.modules()}
        settle(model)
        assert str(model) == text
        assert_close(dict(model.state_dict()), state, rtol=0, atol=0)

    def test_an_attention_module_in_two_places_is_split_once(self):
        shared = nn.MultiheadAttention(16, 2)
        model = nn.ModuleDict({"a": shared, "b": shared})
        set_structure(model, {"b.q_proj": 3})
        assert model["a"] is model["b"]
        assert model["a"].q_proj.rank == 3

    def test_hugging_face_conv1d_is_known_by_name_alone(self):
        model = nn.ModuleDict({"layer": Conv1D(8, 6)})
        assert names(model) == ["layer"]
        other = nn.ModuleDict({"layer": type("Conv1D", (nn.Module,), {})()})
        other["layer"].weight = nn.Parameter(torch.ones(8, 6))
        assert reasons(other) == {"layer": "Conv1D is not supported"}

    @pytest.mark.parametrize(
        "name", ["timm.layers.linear.Linear", "transformers.models.falcon.modeling_falcon.FalconLinear"]
    )
    def test_linear_layers_of_other_libraries(self, name):
        place, _, cls = name.rpartition(".")
        dense = getattr(pytest.importorskip(place), cls)(8, 6)
        model = nn.ModuleDict({"layer": dense})
        assert names(model) == ["layer"]
        low = LowRankLinear.like(dense, 6)
        left, right = torch.linalg.qr(dense.weight.detach())
        low.set_factors(left[None], right[None])
        low.set_bias(dense.bias.detach())
        x = torch.randn(3, 8)
        assert_close(low(x), dense(x))

    def test_other_subclasses_of_the_same_name_are_told_apart(self):
        changed = {"__module__": "elsewhere", "forward": lambda self, x: x}
        model = nn.ModuleDict({"layer": type("Linear", (nn.Linear,), changed)(8, 8)})
        assert reasons(model) == {"layer": "elsewhere.Linear is not supported"}

    def test_plain_parameters_are_listed_where_they_could_be_layers(self):
        model = nn.ModuleDict({"experts": nn.Module(), "norm": nn.Module()})
        model["experts"].gate_up_proj = nn.Parameter(torch.ones(2, 8, 16))
        model["experts"].down_proj = nn.Parameter(torch.ones(2, 8, 8))
        model["norm"].weight = nn.Parameter(torch.ones(1, 1, 8))
        shown = "holds plain parameters (gate_up_proj, down_proj) instead of layers, which is not supported"
        assert reasons(model) == {"experts": shown}
