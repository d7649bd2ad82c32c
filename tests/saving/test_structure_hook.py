import copy
import pickle

import pytest
import torch
from compressed_models import RANKS, Net, compressed
from torch import nn

from lrf_lightning.modules import LowRankConv2d, LowRankLinear, LowRankModule, SplitAttention
from lrf_lightning.saving.structure_hook import ranks_in, register_structure_hook, splits_in
from lrf_lightning.surgery import replace_module


def hooked(model):
    register_structure_hook(model)
    return model


def ranks_of(model):
    return {name: m.rank for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, LowRankModule)}


def assert_loaded(model, state):
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())


def test_ranks_are_read_from_the_shapes():
    state = compressed(nn.ModuleDict({"a": Net(), "b": Net()}), {"a.conv": 3, "a.body": 4, "b.head": 2}).state_dict()
    assert ranks_in(state) == {"a.conv": 3, "a.body": 4, "b.head": 2}
    assert ranks_in(state, "a.") == {"conv": 3, "body": 4}
    assert ranks_in(Net().state_dict()) == {}


@pytest.mark.parametrize(
    ("kernel", "split", "found"), [(3, None, None), (3, 0, 0), (3, 1, 1), ((3, 1), 0, 0), ((1, 3), 1, 0)]
)
def test_the_order_of_the_factors_is_read_from_the_shapes(kernel, split, found):
    dense = nn.ModuleDict({"conv": nn.Conv2d(4, 6, kernel, stride=2, padding=1, bias=False)})
    low = copy.deepcopy(dense)
    replace_module(low, "conv", LowRankConv2d.like(dense["conv"], 2, split=split))
    for factor in low.parameters():
        nn.init.normal_(factor)
    state = low.state_dict()
    assert splits_in(state) == ({} if found is None else {"conv": found})
    for start in (dense, low):
        model = hooked(copy.deepcopy(start))
        model.load_state_dict(state)
        x = torch.randn(2, 4, 9, 8)
        torch.testing.assert_close(model["conv"](x), low["conv"](x))


def test_the_structure_follows_in_every_direction():
    dense, low, other = Net().state_dict(), compressed(Net(), RANKS).state_dict(), compressed(Net(), {"head": 1})
    model = hooked(Net())
    for state, ranks in ((low, RANKS), (other.state_dict(), {"head": 1}), (dense, {}), (low, RANKS), (low, RANKS)):
        assert str(model.load_state_dict(state)) == "<All keys matched successfully>"
        assert ranks_of(model) == ranks
        assert_loaded(model, state)


def test_layers_of_the_right_rank_are_not_replaced():
    model = hooked(compressed(Net(), RANKS))
    factors = [model.body.left_factor, model.conv.right_factor]
    model.load_state_dict(compressed(Net(), RANKS).state_dict())
    assert factors == [model.body.left_factor, model.conv.right_factor]


def test_registered_once_and_survives_copies_and_pickles():
    model = hooked(hooked(Net()))
    assert len(model._load_state_dict_pre_hooks) == 1
    state = compressed(Net(), RANKS).state_dict()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(hooked(copied)._load_state_dict_pre_hooks) == 1
        copied.load_state_dict(state)
        assert ranks_of(copied) == RANKS
    assert ranks_of(model) == {}


def test_below_a_module_without_the_hook():
    parent = nn.ModuleDict({"inner": hooked(Net()), "outer": nn.Linear(12, 12)})
    state = compressed(nn.ModuleDict({"inner": Net(), "outer": nn.Linear(12, 12)}), {"inner.conv": 2}).state_dict()
    parent.load_state_dict(state)
    assert_loaded(parent, state)


def test_partial_state_dicts_leave_other_layers_alone():
    model = hooked(compressed(Net(), RANKS))
    model.load_state_dict({"head.bias": torch.ones(5), "body.bias": torch.ones(12)}, strict=False)
    assert ranks_of(model) == RANKS
    model.load_state_dict({"body.weight": torch.ones(12, 12)}, strict=False)
    assert ranks_of(model) == {"conv": 3}
    assert torch.equal(model.body.weight, torch.ones(12, 12))
    model.load_state_dict({"head.left_factor": torch.ones(5, 2), "head.right_factor": torch.ones(2, 12)}, strict=False)
    assert ranks_of(model) == {"conv": 3, "head": 2}


def test_foreign_names_are_reported_by_torch():
    state = Net().state_dict() | {"no.left_factor": torch.ones(3, 1), "no.right_factor": torch.ones(1, 3)}
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"no.left_factor"'):
        hooked(Net()).load_state_dict(state)


def test_ranks_that_do_not_fit_are_refused():
    state = compressed(Net(), {"head": 2}).state_dict()
    state["head.left_factor"] = torch.ones(5, 9)
    with pytest.raises(ValueError, match=r"module 'head': rank=9 is outside 1\.\.5"):
        hooked(Net()).load_state_dict(state)


def test_a_users_module_with_parameters_of_the_same_names():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.left_factor, self.right_factor = nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.ones(2, 4))

    model = hooked(nn.Sequential(Own(), nn.Linear(4, 4)))
    state = nn.Sequential(Own(), nn.Linear(4, 4)).state_dict()
    model.load_state_dict(state)
    assert isinstance(model[0], Own)
    assert_loaded(model, state)


def test_mode_dtype_and_trainability_are_kept():
    model = hooked(Net()).double().eval()
    model.body.requires_grad_(False)
    state = compressed(Net(), RANKS).double().state_dict()
    model.load_state_dict(state)
    assert not model.body.training
    assert model.body.left_factor.dtype == torch.float64
    assert not model.body.left_factor.requires_grad
    model.load_state_dict(Net().double().state_dict())
    assert not model.body.weight.requires_grad
    assert not model.body.training


@pytest.mark.parametrize("ranks", [{"attn.q_proj": 2}, {"attn.out_proj": 3, "attn.v_proj": 1}])
def test_attention_is_split_and_packed_again(ranks):
    def make():
        return nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "other": nn.Linear(8, 8)})

    model, dense, low = hooked(make()), make().state_dict(), compressed(make(), ranks).state_dict()
    for state in (low, dense, low):
        model.load_state_dict(state)
        assert isinstance(model["attn"], SplitAttention) == (state is low)
        assert_loaded(model, state)


def test_tied_layers_stay_tied():
    def make():
        model = nn.ModuleDict({"embed": nn.Embedding(20, 8), "head": nn.Linear(8, 20, bias=False)})
        model["head"].weight = model["embed"].weight
        return model

    model, dense, low = hooked(make()), make().state_dict(), compressed(make(), {"embed": 3}).state_dict()
    model.load_state_dict(low)
    assert isinstance(model["head"], LowRankLinear)
    assert model["head"].left_factor is model["embed"].left_factor
    assert_loaded(model, low)
    model.load_state_dict(dense)
    assert model["head"].weight is model["embed"].weight
    assert_loaded(model, dense)


class Language(nn.Module):
    def __init__(self, width=8, *, tied=False):
        super().__init__()
        self.embed, self.body = nn.Embedding(20, width), nn.Linear(width, width)
        self.head = nn.Linear(width, 20, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def test_two_weights_are_not_loaded_into_one():
    low = compressed(Language(), {"body": 2})
    with pytest.raises(RuntimeError, match=r"'embed\.weight' and 'head\.weight' differ in the weights that are loaded"):
        hooked(Language(tied=True)).load_state_dict(low.state_dict())
    with torch.no_grad():
        low.head.weight.copy_(low.embed.weight)
    model = hooked(Language(tied=True))
    model.load_state_dict(low.state_dict())
    assert_loaded(model, low.state_dict())


def test_other_sizes_are_named_with_the_layer():
    state = compressed(Language(), {"body": 2}).state_dict()
    expected = (
        r"layer 'body', a LowRankLinear, have shapes \(6, 2\) and \(2, 6\), in the .* loaded \(8, 2\) and \(2, 8\)"
    )
    with pytest.raises(RuntimeError, match=expected):
        hooked(Language(6)).load_state_dict(state)
