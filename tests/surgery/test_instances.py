"""What users do to single layers: another forward, attributes, references beside the tree of modules, shared biases."""

import copy
import types
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune

from lrf_lightning import compress, load_compressed, restore_dense, save_compressed
from lrf_lightning.copies.model_copy import copied_model
from lrf_lightning.modules import LowRankLinear
from lrf_lightning.surgery import factorized, find_layers, prepare, replace_module

QUICK = {"objective": "budget", "keep": 0.3, "speed": "none", "probes": False}


def loss(model, batch):
    return model(batch[0]).square().mean(1)


def data(*shape):
    return [[(torch.randn(*shape),)] for _ in range(3)]


def reasons(model):
    return {skipped.name: skipped.reason for skipped in find_layers(model)[1]}


def low_rank(layer, rank=2):
    groups, rows, columns = LowRankLinear.matrices(layer).shape
    return factorized(layer, torch.randn(groups, rows, rank), torch.randn(groups, rank, columns))


def with_own_forward(layer):
    layer.forward = types.MethodType(lambda self, x: 3 * torch.tanh(functional.linear(x, self.weight)), layer)
    return layer


def test_a_layer_with_a_forward_of_its_own_is_left_alone_and_keeps_it():
    model = nn.Sequential(nn.Linear(12, 12), with_own_forward(nn.Linear(12, 12)), nn.Linear(12, 12))
    x = torch.randn(5, 12)
    assert reasons(model) == {"1": "has a forward of its own, which replaces that of its class"}
    result = compress(model, loss, *data(20, 12), **QUICK)
    assert set(result.ranks) == {"0", "2"}
    dense = copy.deepcopy(model)
    for name in ("0", "2"):
        dense[int(name)] = result.model[int(name)].to_dense()
    torch.testing.assert_close(result.model(x), dense(x))
    assert "forward" in vars(result.model[1])


def test_attention_with_a_forward_or_attributes_of_its_own_is_left_alone():
    model = nn.ModuleList([nn.MultiheadAttention(8, 2) for _ in range(5)])
    model[0].forward = types.MethodType(lambda self, x: x, model[0])
    model[1].flag = True
    model[2].register_buffer("scale", torch.ones(1))
    prune.l1_unstructured(model[3], "in_proj_bias", 0.5)
    prepare(model)
    assert [type(attention).__name__ for attention in model] == ["MultiheadAttention"] * 4 + ["SplitAttention"]
    assert "has attributes of its own (flag)" in reasons(model)["1"]


@pytest.mark.parametrize("kind", ["buffer", "pruned"])
def test_a_bias_that_is_no_parameter_keeps_a_layer_dense(kind):
    layer = nn.Linear(12, 12)
    if kind == "pruned":
        prune.l1_unstructured(layer, "bias", 0.5)
    else:
        bias = layer.bias.detach()
        del layer.bias
        layer.register_buffer("bias", bias)
    model = nn.Sequential(layer, nn.Linear(12, 12))
    assert reasons(model) == {"0": "its bias is no parameter (remove pruning first)"}
    assert set(compress(model, loss, *data(20, 12), **QUICK).ranks) == {"1"}


class Scaled(nn.Module):
    """Reads what it has put on its layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 12)
        self.layer.scale = 0.5
        self.layer.register_buffer("shift", torch.ones(12))
        self.layer.register_buffer("hidden", torch.ones(12), persistent=False)
        self.layer.gain = nn.Parameter(torch.full((12,), 2.0))
        self.layer.gate = nn.Linear(12, 1)

    def forward(self, x):
        own = self.layer
        return (own(x) * own.scale * own.gain + own.shift + own.hidden) * own.gate(x)


def test_what_is_put_on_a_layer_stays_there(tmp_path):
    model, x = Scaled(), torch.randn(5, 12)
    result = compress(model, loss, *data(20, 12), **QUICK)
    assert isinstance(result.model.layer, LowRankLinear)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        expected.layer.weight.copy_(result.model.layer.weight)
    torch.testing.assert_close(result.model(x), expected(x))
    result.save(tmp_path)
    torch.testing.assert_close(load_compressed(Scaled(), tmp_path)(x), result.model(x))
    dense = restore_dense(result.model)
    assert type(dense.layer) is nn.Linear
    torch.testing.assert_close(dense(x), result.model(x))
    assert dense.state_dict().keys() == model.state_dict().keys()


class Pyramid(nn.Module):
    """Runs its layers from a list, as feature pyramids do, and from a closure, a tuple and a dictionary."""

    def __init__(self):
        super().__init__()
        laterals = [nn.Linear(12, 12) for _ in range(2)]
        for index, layer in enumerate(laterals):
            self.add_module(f"lateral{index}", layer)
        self.laterals = laterals[::-1]
        self.last, self.other, self.third = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        last = self.last
        self.call = lambda x: last(x)
        self.pair, self.named = (1, (self.other,)), {"third": [self.third]}

    def forward(self, x):
        for layer in self.laterals:
            x = torch.tanh(layer(x))
        return self.call(x) + self.pair[1][0](x) + self.named["third"][0](x)


def test_layers_that_run_from_lists_and_closures_are_replaced_there_too(tmp_path):
    model, x = Pyramid(), torch.randn(5, 12)
    result = compress(model, loss, *data(20, 12), **QUICK)
    assert len(result.ranks) == 5
    assert all(isinstance(layer, LowRankLinear) for layer in result.model.laterals)
    assert all(type(layer) is nn.Linear for layer in model.laterals), "those of the original stay"
    result.save(tmp_path)
    torch.testing.assert_close(load_compressed(Pyramid(), tmp_path)(x), result.model(x))
    before = result.model(x)
    with torch.no_grad():
        for layer in (result.model.lateral0, result.model.last, result.model.other, result.model.third):
            layer.left_factor.zero_()
            layer.bias.zero_()
    assert not torch.allclose(result.model(x), before)
    assert result.model(x).abs().max() == 0, "no other layers run"
    dense = restore_dense(result.model)
    assert [type(layer) for layer in (*dense.laterals, dense.pair[1][0])] == [nn.Linear] * 3


def test_a_bias_of_several_layers_stays_one():
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    model[1].bias = model[0].bias
    replace_module(model, "0", low_rank(model[0]))
    assert model[0].bias is model[1].bias
    replace_module(model, "0", model[0].to_dense())
    assert model[0].bias is model[1].bias


def test_copies_do_not_run_the_originals_layers_through_references():
    class Child(nn.Module):
        def __init__(self, parent):
            super().__init__()
            self.parent = weakref.ref(parent)

        def forward(self, x):
            return self.parent().layer(x)

    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.child = Child(self)
            self.functions = [lambda x: self.layer(x)]
            self.long = list(range(2000))

        def forward(self, x):
            return self.child(x) + self.functions[0](x)

    model, x = Parent(), torch.randn(3, 4)
    twin = copied_model(model)
    expected = model(x)
    with torch.no_grad():
        model.layer.weight.zero_()
    torch.testing.assert_close(twin(x), expected)
    assert model.functions[0] is not twin.functions[0]


def test_scripted_submodules_are_refused():
    model = nn.Sequential(nn.Linear(12, 12), torch.jit.script(nn.Linear(12, 12)))
    with pytest.raises(ValueError, match=r"the module '1' is scripted by torch.jit.*or script restore_dense"):
        compress(model, loss, *data(20, 12), **QUICK)


def test_compiled_submodules_run_as_they_are_and_a_compiled_model_is_refused(tmp_path):
    inner = nn.Sequential(nn.Linear(12, 12), nn.Tanh())
    model = nn.Sequential(torch.compile(inner, backend="eager"), nn.Linear(12, 12))
    result = compress(model, loss, *data(20, 12), **QUICK)
    assert set(result.ranks) == {"0._orig_mod.0", "1"}
    compiled, folder = torch.compile(inner, backend="eager"), result.save(tmp_path / "model")
    for call in (
        lambda: compress(compiled, loss, *data(20, 12), **QUICK),
        lambda: load_compressed(compiled, folder),
        lambda: save_compressed(compiled, tmp_path / "other"),
    ):
        with pytest.raises(TypeError, match=r"result of torch.compile.*give what was compiled, model._orig_mod"):
            call()


class TestComputedFactors:
    """Pruning and norms of factors, whose values are computed before every call."""

    @pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
    @pytest.mark.parametrize(
        "compute",
        [
            lambda layer: prune.l1_unstructured(layer, "left_factor", 0.5),
            lambda layer: prune.random_unstructured(prune.l1_unstructured(layer, "bias", 0.5), "bias", 0.5),
            lambda layer: nn.utils.weight_norm(layer, "left_factor"),
            lambda layer: nn.utils.spectral_norm(layer, "right_factor"),
        ],
        ids=["pruning", "pruning twice", "weight norm", "spectral norm"],
    )
    def test_are_multiplied_in(self, compute):
        model, x = nn.Sequential(low_rank(nn.Linear(6, 5))), torch.randn(3, 6)
        with torch.no_grad():
            model[0].bias.normal_()
            compute(model[0])
            model(x)
            for parameter in model.parameters():
                parameter.mul_(2)  # what an optimizer does after the last call
        model.eval()
        dense, alone = restore_dense(model), restore_dense(model[0])
        assert type(dense[0]) is type(alone) is nn.Linear
        for layer in (dense, alone):
            torch.testing.assert_close(layer(x), model(x))
        assert not dense[0]._forward_pre_hooks
        assert len(model[0]._forward_pre_hooks) == 1, "the model was changed"
