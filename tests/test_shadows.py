import pytest
import torch
from torch.overrides import TorchFunctionMode

from lrf_lightning.shadows import Shadows, is_linear


class Follow(TorchFunctionMode):
    def __init__(self, shadows):
        super().__init__()
        self.shadows = shadows

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.shadows.call(func, args, kwargs or {})


X = torch.tensor([1.0, 2.0, 3.0])


def followed(function):
    """The function's value at X without gradients, and its derivative by X as the shadow tells it."""
    shadows, x = Shadows(), X.clone()
    leaf = shadows.start(x)
    with torch.no_grad(), Follow(shadows):
        result = function(x)
    shadow = shadows.of(result)
    return result, None if shadow is None else torch.autograd.grad(shadow.sum(), leaf)[0]


def add_in_place(x):
    total = torch.zeros(3)
    total += 2 * x
    total.mul_(3)
    return total


def set_items(x):
    box = torch.zeros(2, 3)
    box[1] = 5 * x
    return box.sum(0)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: 2 * x + 1,
        lambda x: torch.stack([x, x * x]).sum(0),
        lambda x: sum([x, x], torch.zeros(3)),
        lambda x: x.unbind()[2] * 4,
        lambda x: torch.where(x > 1, x, 0 * x),
        lambda x: x[x > 1].mean(),
        lambda x: x.double().reshape(3, 1).T.squeeze(0),
        lambda x: x.add_(1).mul_(2),
        add_in_place,
        set_items,
        lambda x: torch.add(x, other=x, alpha=2),
    ],
)
def test_derivatives_are_those_of_autograd(function):
    x = X.clone().requires_grad_()
    with torch.enable_grad():
        expected = function(x.clone())
        (gradient,) = torch.autograd.grad(expected.sum(), x)
    result, found = followed(function)
    assert not result.requires_grad
    torch.testing.assert_close(result, expected.detach(), rtol=0, atol=0)
    torch.testing.assert_close(found, gradient)


def test_what_is_cut_off_has_no_shadow():
    assert followed(lambda x: x.detach() * 2)[1] is None
    assert followed(lambda x: torch.as_tensor(x.tolist()))[1] is None
    assert followed(lambda x: torch.zeros(3))[1] is None
    assert followed(lambda x: torch.add(x, x, out=torch.empty(3)))[1] is None
    assert followed(lambda x: (x * 2).copy_(torch.ones(3)))[1].tolist() == [0.0, 0.0, 0.0]


def test_side_effects_happen_once():
    total = torch.zeros(3)
    followed(total.add_)
    assert total.tolist() == X.tolist()


def test_errors_are_those_of_the_function():
    with pytest.raises(RuntimeError, match="must match"):
        followed(lambda x: x + torch.ones(2))


@pytest.mark.parametrize(
    ("function", "linear"),
    [
        (lambda x: (2 * x[:2]).sum() / 3 - x.mean(), True),
        (lambda x: torch.stack([x, -x]).sum(), True),
        (lambda x: x.topk(2).values.sum(), False),
        (lambda x: x.max(), False),
        (lambda x: x.square().sum(), False),
        (lambda x: x.sum().sqrt(), False),
    ],
)
def test_linear_functions(function, linear):
    assert is_linear(function(X.clone().requires_grad_())) == linear


def test_integers_have_none():
    assert Shadows().start(torch.arange(3)) is None


def test_inference_mode():
    shadows = Shadows()
    with torch.inference_mode(), Follow(shadows):
        x = X + 0
        leaf = shadows.start(x)
        result = (2 * x).sum()
    assert result.is_inference()
    torch.testing.assert_close(torch.autograd.grad(shadows.of(result), leaf)[0], torch.full((3,), 2.0))
