"""Attributes that passes through one model set, while the passes take turns."""

import weakref
from collections import OrderedDict, deque
from contextlib import suppress
from functools import partial

import pytest
import torch
from torch import nn

from lrf_lightning.solver.running import own_attributes
from lrf_lightning.solver.running.own_attributes import Attributes, OwnAttributes


class Keeping(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = nn.Linear(2, 2)
        self.kept, self.gone = "original", None
        self.list, self.deque, self.set = [1], deque([1, 2], maxlen=3), {1}
        self.nested = OrderedDict(a={"b": [1]})
        self.register_buffer("state", torch.zeros(2))


def everything(model):
    """Attributes and contents, without those of torch that stay common."""
    own = {name: value for name, value in model.__dict__.items() if name not in own_attributes.COMMON}
    return repr(own) + repr(list(model.__dict__)) + repr(dict(model.part._buffers)) + repr(model.part.__dict__.keys())


def assign(model, value):
    model.kept = value
    model.new = value


def delete(model, value):
    del model.gone
    model.instead = None  # the same value under another name


def fill(model, value):
    model.list.append(value)
    model.deque.extend([value, value])
    model.set.clear()
    model.nested["a"]["b"].insert(0, value)
    model.nested["c"] = value


def replace_tensors(model, value):
    model.state = torch.full((2,), float(value))
    model.part._parameters["weight"] = nn.Parameter(torch.full((2, 2), float(value)))
    model.part.register_buffer("late", torch.ones(1), persistent=False)


def switch(model, value):
    model.part.eval()
    model.part.output = value  # what a hook leaves on a module of torch


def move(model, value):
    model.nested["a"]["b"].append(model.list.pop())


def rename(model, value):
    del model.gone
    model.training, model.part.training = False, False
    model.list, model.new = model.set, model.list


@pytest.mark.parametrize("change", [assign, delete, fill, replace_tensors, switch, move, rename])
def test_every_pass_finds_what_it_has_changed(change):
    model = Keeping()
    before = everything(model)
    one, two = (OwnAttributes(Attributes(model)) for _ in range(2))
    with one:
        change(model, 5)
        first = everything(model)
    assert everything(model) == before
    with two:
        assert everything(model) == before
        change(model, 7)
        second = everything(model)
    assert everything(model) == before
    assert first != before
    for _ in range(2):
        for own, wanted in ((one, first), (two, second)):
            with own:
                assert everything(model) == wanted
        assert everything(model) == before


def test_an_error_puts_the_attributes_back():
    model = Keeping()
    with suppress(ValueError), OwnAttributes(Attributes(model)):
        model.kept = 1
        raise ValueError("broken")
    assert model.kept == "original"


def test_long_lists_are_not_looked_through():
    model = Keeping()
    model.data = list(range(own_attributes.LONGEST + 1))
    with OwnAttributes(Attributes(model)):
        model.data.append(1)
    assert len(model.data) == own_attributes.LONGEST + 2


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_weights_that_every_pass_computes_are_not_kept_for_every_pass():
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 3)))
    attributes = Attributes(model)
    own, other = OwnAttributes(attributes), OwnAttributes(attributes)
    with torch.no_grad():
        with own:
            model(torch.zeros(1, 3))
            model[0].output = 1
            mine = weakref.ref(model[0].weight)
        with other:
            model(torch.zeros(1, 3))
    with own:
        assert model[0].output == 1
    assert mine() is None


SEEN = {}


class Kept:
    """What fastai's hooks are: objects that store an output, beside things of their own."""

    def __init__(self):
        self.stored, self.calls = None, 0

    def __call__(self, module, args, output):
        self.stored = output
        self.calls += 1

    def method(self, module, args, output):
        self(module, args, output)


def held_by_an_attribute(layer):
    layer.kept = Kept()
    layer.register_forward_hook(lambda module, args, output: module.kept(module, args, output))
    return lambda: layer.kept.stored


def held_by_a_hook(layer):
    kept = Kept()
    layer.register_forward_hook(kept)
    return lambda: kept.stored


def held_by_a_method(layer):
    kept = Kept()
    layer.register_forward_hook(kept.method)
    return lambda: kept.stored


def in_a_closure(layer):
    seen, outputs = {}, []

    def store(output):
        seen["output"] = output

    def hook(module, args, output):
        store(output)
        outputs.append(output)

    layer.register_forward_hook(hook)
    return lambda: seen.get("output") if len(outputs) == 1 else None


def in_an_argument(layer):
    seen = {}
    layer.register_forward_hook(partial(lambda seen, module, args, output: seen.update(output=output), seen))
    return lambda: seen.get("output")


def in_a_global(layer):
    layer.register_forward_pre_hook(lambda module, args: SEEN.update(output=args[0]))
    return lambda: SEEN.get("output")


@pytest.mark.parametrize(
    "keep", [held_by_an_attribute, held_by_a_hook, held_by_a_method, in_a_closure, in_an_argument, in_a_global]
)
def test_activations_that_hooks_keep_belong_to_a_pass(keep):
    model = nn.Sequential(nn.Linear(2, 2))
    kept = keep(model[0])
    attributes = Attributes(model)
    one, two = OwnAttributes(attributes), OwnAttributes(attributes)
    outputs = []
    for own in (one, two):
        with own:
            model(torch.randn(3, 2))
            outputs.append(kept())
        assert kept() is None
    assert outputs[0] is not outputs[1]
    for own, output in zip((one, two), outputs, strict=True):
        with own:
            assert kept() is output


def test_an_object_without_tensors_is_left_alone():
    model = nn.Sequential(nn.Linear(2, 2))
    model.kept = Kept()
    with OwnAttributes(Attributes(model)):
        model.kept.calls += 1
    assert model.kept.calls == 1


def test_what_speaks_of_a_tensor_goes_with_it():
    model = nn.Sequential(nn.Linear(2, 2))
    model.kept = Kept()
    one, two = (OwnAttributes(Attributes(model)) for _ in range(2))
    for own in (one, two):
        with own:
            model.kept(None, None, torch.ones(1))
            model.kept.later = lambda: None  # neither a tensor nor a plain value
            assert model.kept.calls == 1
        assert (model.kept.stored, model.kept.calls) == (None, 0)
    with one:
        assert (model.kept.stored.item(), model.kept.calls) == (1, 1)


class Store(dict):
    """A dictionary that may have attributes."""


def test_subclasses_of_containers_are_containers():
    model = nn.Sequential(nn.Linear(2, 2))
    model.features = Store(skip=None)
    with OwnAttributes(Attributes(model)):
        model.features["skip"] = torch.ones(1)
        model.features.size = torch.ones(1)
    assert model.features["skip"] is None
    assert not vars(model.features)


def test_thousands_of_buffers_are_looked_through():
    model = nn.Module()
    for i in range(own_attributes.LONGEST + 1):
        model.register_buffer(f"b{i}", torch.zeros(1))
    first = model.b0
    with OwnAttributes(Attributes(model)):
        model.b0 = torch.ones(1)
    assert model.b0 is first


def test_what_many_modules_share_is_looked_through_once():
    model = nn.Sequential(*[nn.Linear(1, 1) for _ in range(own_attributes.MOST_ENTRIES // own_attributes.LONGEST + 2)])
    shared = dict.fromkeys(range(own_attributes.LONGEST))
    for module in model:
        module.shared = shared
    model[-1].list = [1]
    with OwnAttributes(Attributes(model)):
        model[-1].list.append(2)
    assert model[-1].list == [1]


def test_references_that_are_dead_are_passed_over():
    model, other = nn.Sequential(nn.Linear(1, 1)), Kept()
    model.other = weakref.proxy(other)
    del other
    with OwnAttributes(Attributes(model)):
        model.new = 1
    assert not hasattr(model, "new")
