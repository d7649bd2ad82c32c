"""Observation of layers: what is seen, that results stay, and that nothing is left behind."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lrf_lightning.solver.running.hooks import frozen_parameters, observe_gradients, observe_inputs


class ByKeyword(nn.Module):
    """Calls its layer with the input as a keyword."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(input=x)


def observed(layers, run, loss):
    """Inputs, outputs and gradients by call, in the order of the forward pass."""
    seen = []

    def on_forward(name, x, output):
        entry = {"name": name, "x": x, "output": output}
        seen.append(entry)
        return lambda grad: entry.update(grad=grad)

    with observe_gradients(layers, on_forward):
        loss(run()).backward()
    return seen


def hooks(model):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]


def test_hooks_are_there_while_observing():
    model = nn.Linear(3, 2)
    with observe_gradients({"a": model}, lambda *_: None), observe_inputs({"a": model}, lambda *_: None):
        assert sum(hooks(model)) == 2
    assert sum(hooks(model)) == 0


def test_gradients_are_those_of_the_outputs():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.randn(5, 3).double()
    with frozen_parameters([model]):
        seen = observed({"a": model[0], "b": model[2]}, lambda: model(x), lambda y: y.square().sum())
    hidden = model[0](x).detach().requires_grad_()
    output = model[2](hidden.tanh())
    output.retain_grad()
    output.square().sum().backward()
    assert [entry["name"] for entry in seen] == ["a", "b"]
    assert_close(seen[0]["x"], x)
    assert_close(seen[0]["output"], hidden.detach())
    assert_close(seen[0]["grad"], hidden.grad)
    assert_close(seen[1]["x"], hidden.detach().tanh())
    assert_close(seen[1]["grad"], output.grad)
    assert not any(tensor.requires_grad for entry in seen for tensor in (entry["x"], entry["output"], entry["grad"]))
    assert all(parameter.grad is None for parameter in model[0].parameters())


def test_an_in_place_activation_does_not_change_what_was_seen():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True)), torch.randn(5, 3)
    with frozen_parameters([model]):  # the output is a leaf then, which nothing may change in place
        seen = observed({"a": model[0]}, lambda: model(x), lambda y: y.sum())
    assert_close(seen[0]["output"], model[0](x).detach())
    assert_close(seen[0]["grad"], (model[0](x) > 0).float())


def test_an_output_is_seen_before_a_hook_of_the_user_changes_it():
    layer = nn.Linear(3, 2)
    layer.register_forward_hook(lambda module, args, output: 2 * output)
    x, outputs, gradients = torch.randn(4, 3), [], []

    def on_forward(name, x, output):
        outputs.append(output)
        return gradients.append

    with frozen_parameters([layer]), observe_gradients({"layer": layer}, on_forward):
        layer(x).sum().backward()
    assert_close(outputs[0], torch.nn.functional.linear(x, layer.weight, layer.bias))
    assert_close(gradients[0], torch.full((4, 2), 2.0))


def test_inputs_by_keyword():
    model, x, seen = ByKeyword(), torch.randn(5, 3), []
    assert_close(observed({"a": model.layer}, lambda: model(x), lambda y: y.sum())[0]["x"], x)
    with observe_inputs({"a": model.layer}, lambda name, x: seen.append((name, x))):
        model(x)
    assert seen[0][0] == "a"
    assert_close(seen[0][1], x)


def test_a_call_without_a_tensor_is_named():
    class Constant(nn.Module):
        def forward(self, value):
            return torch.ones(value)

    model = Constant()
    with observe_inputs({"a": model}, lambda *_: None), pytest.raises(TypeError, match="'a' was called without"):
        model(3)


@pytest.mark.parametrize(
    ("first", "second", "x"),
    [
        (nn.Linear(3, 3), nn.Linear(3, 3), torch.randn(5, 3)),
        (nn.Linear(3, 3, bias=False), nn.Linear(3, 3), torch.randn(5, 2, 3)),
        (nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1, bias=False), torch.randn(5, 3, 4, 4)),
        (nn.ConvTranspose1d(3, 3, 1), nn.ConvTranspose1d(3, 3, 1), torch.randn(5, 3, 4)),
    ],
)
def test_layers_with_one_weight_are_seen_as_one(first, second, x):
    second.weight = first.weight
    model = nn.Sequential(first, second)
    seen = observed({"a": (first, second)}, lambda: model(x), lambda y: y.square().sum())
    assert [entry["name"] for entry in seen] == ["a", "a"]
    assert_close(seen[1]["output"], first(seen[1]["x"]).detach())
    assert_close(seen[1]["grad"], 2 * model(x).detach())
    inputs = []
    with observe_inputs({"a": (first, second)}, lambda name, x: inputs.append(x)):
        model(x)
    assert_close(inputs, [x, first(x).detach()])


def test_a_layer_without_interest_is_left_alone():
    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    with observe_gradients({"a": model}, lambda *_: None), torch.no_grad():
        assert not model(x).requires_grad


def test_frozen_layers_get_gradients_and_keep_their_flags():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(5, 3)
    model[0].requires_grad_(False)
    with torch.no_grad(), frozen_parameters([model]):
        seen = observed({"a": model[0]}, lambda: model(x), lambda y: y.sum())
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert_close(seen[0]["grad"], model[1].weight.detach().sum(0).expand(5, 4))
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, False, True, True]


def test_nothing_is_left_after_an_error():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    layers = {"a": model[0], "b": (model[1],)}
    for context in (observe_gradients(layers, lambda *_: None), observe_inputs(layers, lambda *_: None)):
        with pytest.raises(RuntimeError, match="shapes"), context, frozen_parameters([model]):
            model(torch.randn(5, 4))
        assert sum(hooks(model)) == 0
        assert all(parameter.requires_grad for parameter in model.parameters())
