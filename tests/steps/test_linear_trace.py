import pytest
import torch
from torch.overrides import TorchFunctionMode

from lrf_lightning.steps.linear_trace import LinearTrace


class Follow(TorchFunctionMode):
    def __init__(self, trace):
        super().__init__()
        self.trace = trace

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.trace.call(func, args, kwargs or {})


X = torch.tensor([1.0, 2.0, 3.0])


def followed(function):
    """The function's value at X without gradients, and its derivative by X as the shadow tells it."""
    trace, x = LinearTrace(), X.clone()
    leaf = trace.start(x)
    with torch.no_grad(), Follow(trace):
        result = function(x)
    shadow = trace.shadow_of(result)
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
        lambda x: torch.stack([x, x * X]).sum(0),
        lambda x: sum([x, x], torch.zeros(3)),
        lambda x: x.unbind()[2] * 4,
        lambda x: torch.where(X > 1, x, 0 * x),
        lambda x: x[X > 1].mean(),
        lambda x: x.double().reshape(3, 1).t().squeeze(0),
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
    assert followed(lambda x: (x * 2).copy_(torch.ones(3)))[1] is None


def test_side_effects_happen_once():
    total = torch.zeros(3)
    followed(total.add_)
    assert total.tolist() == X.tolist()


def test_errors_are_those_of_the_function():
    with pytest.raises(RuntimeError, match="must match"):
        followed(lambda x: x + torch.ones(2))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * x,
        lambda x: 1 / x,
        lambda x: x / x.sum(),
        lambda x: x.square(),
        lambda x: x * x.detach(),
        lambda x: x[x > 1],
        lambda x: x[x.topk(2).indices],
        lambda x: torch.where(x > 1, x, 0),
        lambda x: x.topk(2).values,
        lambda x: x.max(),
        lambda x: x.norm(),
        lambda x: x * (x.data > 1),
        lambda x: (2 * x).clamp_(max=3) + x,
        lambda x: x * torch.ones(3, requires_grad=True),
        lambda x: x / torch.ones(3, requires_grad=True),
    ],
)
def test_what_is_not_linear_has_no_shadow(function):
    assert followed(function)[1] is None


def test_what_only_looks_at_the_shape_is_a_constant():
    assert followed(lambda x: x * torch.zeros_like(x).add(2))[1].tolist() == [2.0, 2.0, 2.0]
    assert followed(lambda x: x / x.numel() + x.new_zeros(3))[1].tolist() == pytest.approx([1 / 3] * 3)


def test_random_numbers_are_drawn_once():
    torch.manual_seed(0)
    expected = X * torch.rand_like(X) + torch.rand(3)
    torch.manual_seed(0)
    result, found = followed(lambda x: x * torch.rand_like(x) + torch.rand(3))
    assert torch.equal(result, expected)
    assert found is not None


def test_tensors_that_are_gone_are_forgotten():
    trace, x = LinearTrace(), X.clone()
    trace.start(x)
    with Follow(trace):
        for _ in range(10):
            x = x * 2
    assert len(trace._known) <= 2


def test_what_is_made_of_chosen_tensors_is_not_chosen():
    trace, x = LinearTrace(), X.clone()
    trace.start(x)
    with Follow(trace):
        square = x.square()
        assert trace.start(square) is None
        assert trace.start(x * 2) is None


def test_integers_have_none():
    assert LinearTrace().start(torch.arange(3)) is None


def test_inference_mode():
    trace = LinearTrace()
    with torch.inference_mode(), Follow(trace):
        x = X + 0
        leaf = trace.start(x)
        result = (2 * x).sum()
    assert result.is_inference()
    torch.testing.assert_close(torch.autograd.grad(trace.shadow_of(result), leaf)[0], torch.full((3,), 2.0))
