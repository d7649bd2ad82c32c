"""Predicted changes for all ranks at once, against per-sample gradients, literal loops and finite differences."""

import itertools
import math

import pytest
import torch
from literal_curves import LAYERS, as_matrices, mean_loss, per_sample, predictions, problem, sample_gradients, solved
from torch import nn

from lrf_lightning.solver.layers.layer_curve import Prediction, shrink
from lrf_lightning.solver.predictions.curves import Tails, predict
from lrf_lightning.solver.running.evaluation import StepOutput
from lrf_lightning.solver.running.loss_terms import LossTerms

METRICS = ["euclidean", "activation", "fisher"]


def truncations(model, factors, name):
    """The change d_k of a layer's weight at the ranks 1 to r, in the weight's shape."""
    module = model.get_submodule(name)
    weight = module.weight.detach()
    for rank in range(1, factors.left.shape[-1] + 1):
        left, right = factors.truncated(rank)
        yield (left @ right).reshape(weight.shape) - weight


@pytest.mark.parametrize("name", LAYERS)
def test_component_derivatives_are_those_of_per_sample_gradients(name):
    model, batches = problem()
    factors, derivatives = solved(model, batches)
    heads, totals = derivatives[name].loss
    gradients = sample_gradients(model, batches, name)
    groups = getattr(model.get_submodule(name), "groups", 1)
    per_group = torch.stack([as_matrices(gradient, groups) for gradient in gradients])
    expected = torch.einsum("sgmn,gmk,gkn->sk", per_group, factors[name].left, factors[name].right)
    torch.testing.assert_close(heads, expected, rtol=1e-9, atol=1e-12)
    weight = model.get_parameter(f"{name}.weight").detach()
    torch.testing.assert_close(totals, (gradients * weight).flatten(1).sum(1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", LAYERS)
def test_all_ranks_at_once_equal_the_loop_over_ranks(name, metric):
    model, batches = problem()
    factors, derivatives = solved(model, batches, metric)
    prediction = predict(derivatives[name].tails(), factors[name].relative_tail())
    gradients = sample_gradients(model, batches, name)
    for index, change in enumerate(truncations(model, factors[name], name)):
        directional = (gradients * change).flatten(1).sum(1)
        close = {"rtol": 1e-7, "atol": 1e-12}
        torch.testing.assert_close(prediction.first_order[index], directional.mean(), **close)
        error = directional.std() / math.sqrt(len(directional))
        torch.testing.assert_close(prediction.standard_error[index], error, **close)
        torch.testing.assert_close(prediction.curvature[index], directional.square().mean() / 2, **close)
    assert len(prediction.first_order) == factors[name].left.shape[-1]


@pytest.mark.parametrize("name", LAYERS)
def test_first_order_is_the_finite_difference_of_the_loss(name):
    model, batches = problem()
    factors, _ = solved(model, batches)
    prediction = predictions(model, batches)[name]
    weight = model.get_parameter(f"{name}.weight")
    original, step = weight.detach().clone(), 1e-5

    def loss():
        return torch.cat([per_sample(model, batch) for batch in batches]).mean()

    with torch.no_grad():
        for index, change in enumerate(truncations(model, factors[name], name)):
            weight.copy_(original + step * change)
            up = loss()
            weight.copy_(original - step * change)
            down = loss()
            weight.copy_(original)
            torch.testing.assert_close(prediction.first_order[index], (up - down) / (2 * step), rtol=1e-6, atol=1e-9)


def test_a_mean_over_the_batch_gives_the_same_curves():
    model, batches = problem()
    vector, scalar = predictions(model, batches), predictions(model, batches, loss=mean_loss)
    for name in LAYERS:
        torch.testing.assert_close(scalar[name].first_order, vector[name].first_order)
        torch.testing.assert_close(scalar[name].curvature, vector[name].curvature)
        torch.testing.assert_close(scalar[name].standard_error, vector[name].standard_error)


def test_curves_do_not_depend_on_the_batches():
    model, batches = problem()
    singles = [(x[i : i + 1], y[i : i + 1]) for x, y in batches for i in range(len(y))]
    together, alone = predictions(model, batches), predictions(model, singles)
    for name in LAYERS:
        torch.testing.assert_close(alone[name].curvature, together[name].curvature)


class Repeating(nn.Module):
    """Calls its layer twice, or not at all where the first input of the batch is negative."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        if x[0, 0] >= 0:
            x = torch.tanh(self.layer(torch.tanh(self.layer(x))))
        return self.head(x)


@pytest.mark.parametrize("signs", [(1, 1, 1), (1, -1, 1), (-1, 1, -1)])
def test_calls_add_up_and_missing_ones_count_as_zero(signs):
    torch.manual_seed(0)
    model = Repeating().double()
    batches = [(torch.randn(4, 6, dtype=torch.float64).abs() * sign, torch.randint(4, (4,))) for sign in signs]
    factors, derivatives = solved(model, batches)
    weight = model.layer.weight
    directional = []
    for inputs, target in batches:
        for i in range(len(target)):
            loss = per_sample(model, (inputs[i : i + 1], target[i : i + 1])).sum()
            (gradient,) = torch.autograd.grad(loss, weight, allow_unused=True)
            directional.append(torch.zeros_like(weight) if gradient is None else gradient)
    prediction = predict(derivatives["layer"].tails(), factors["layer"].relative_tail())
    for index, change in enumerate(truncations(model, factors["layer"], "layer")):
        values = torch.stack([(gradient * change).sum() for gradient in directional])
        torch.testing.assert_close(prediction.first_order[index], values.mean())
        torch.testing.assert_close(prediction.curvature[index], values.square().mean() / 2)
        torch.testing.assert_close(prediction.standard_error[index], values.std() / math.sqrt(len(values)))


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_weights_of_any_size_in_float32(scale):
    """Scaling one layer and undoing it in the next leaves the function, and so the predictions, as they were."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 6, bias=False))
    batches = [(torch.randn(16, 8), torch.randint(6, (16,)))]
    plain = predictions(model, batches)["0"]
    with torch.no_grad():
        model[0].weight.mul_(scale)
        model[1].weight.div_(scale)
    scaled = predictions(model, batches)["0"]
    torch.testing.assert_close(scaled.first_order, plain.first_order, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(scaled.curvature, plain.curvature, rtol=1e-3, atol=1e-7)


def test_one_sample_has_no_standard_error():
    tails = torch.tensor([[-0.5, -0.3]])
    prediction = predict(Tails(tails, tails), torch.tensor([0.6, 0.3, 0.0]))
    torch.testing.assert_close(prediction.first_order, torch.tensor([-0.5, -0.3]))
    torch.testing.assert_close(prediction.perturbation, torch.tensor([0.6, 0.3]))
    assert prediction.standard_error.tolist() == [math.inf, math.inf]
    # an infinite error leaves nothing of the first-order term; taken at face value all of it
    torch.testing.assert_close(prediction.change(1.0), prediction.curvature)
    torch.testing.assert_close(prediction.change(0.0), prediction.first_order + prediction.curvature)


def test_change_believes_the_first_order_term_beyond_its_noise():
    prediction = Prediction(
        first_order=torch.tensor([-0.5, 0.1, 0.3]),
        standard_error=torch.tensor([0.1, 0.1, 0.1]),
        curvature=torch.tensor([0.2, 0.2, 0.2]),
        perturbation=torch.zeros(3),
    )
    torch.testing.assert_close(prediction.change(2.0), torch.tensor([-0.3 + 0.2, 0.2, 0.1 + 0.2]))


def test_shrink_is_the_soft_threshold():
    values = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0])
    torch.testing.assert_close(shrink(values, torch.full((5,), 2.0)), torch.tensor([-1.0, 0.0, 0.0, 0.0, 1.0]))
    for first, second in itertools.pairwise(shrink(torch.linspace(-2, 2, 50), torch.full((50,), 0.5)).tolist()):
        assert second >= first


class Tokens(nn.Module):
    """Mixes the tokens of a sample, then a linear layer gives every token logits."""

    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x):
        return self.head(torch.tanh(self.mix(x) + x.mean(1, keepdim=True)))


def token_losses(model, batch):
    logits, target = model(batch[0]), batch[1]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), target, reduction="none")


def token_loss(model, batch):
    terms = LossTerms.of(token_losses(model, batch))
    return StepOutput(terms.per_sample, terms=terms)


def token_problem(samples=12, tokens=7):
    """Labels are drawn from the model itself."""
    torch.manual_seed(0)
    model = Tokens().double()
    with torch.no_grad():
        x = torch.randn(samples, tokens, 6, dtype=torch.float64)
        target = torch.distributions.Categorical(logits=model(x)).sample()
    return model, [(x[: samples // 2], target[: samples // 2]), (x[samples // 2 :], target[samples // 2 :])]


@pytest.mark.parametrize("name", ["mix", "head"])
def test_the_curvature_of_a_mean_over_tokens_is_that_of_its_tokens(name):
    model, batches = token_problem()
    factors, _ = solved(model, batches, loss=token_loss)
    found = [
        predict(solved(model, batches, loss=token_loss, seed=seed)[1][name].tails(), factors[name].relative_tail())
        for seed in range(100)
    ]
    weight = model.get_parameter(f"{name}.weight")
    # (samples, tokens, *weight): the gradient of every token's own loss
    gradients = torch.stack(
        [
            torch.stack([torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in sample])
            for batch in batches
            for sample in token_losses(model, batch)
        ]
    )
    for index, change in enumerate(truncations(model, factors[name], name)):
        directional = (gradients * change).flatten(2).sum(2)
        for prediction in found:
            torch.testing.assert_close(prediction.first_order[index], directional.mean(), rtol=1e-7, atol=1e-12)
        curvatures = torch.stack([prediction.curvature[index] for prediction in found])
        expected = directional.square().mean() / 2
        assert curvatures.std() > 0
        assert abs(curvatures.mean() - expected) < 4 * curvatures.std() / math.sqrt(len(found))


def test_the_curvature_of_a_mean_over_tokens_is_the_second_derivative_of_the_loss():
    """For the last layer, with labels drawn from the model, both have the same expectation."""
    model, batches = token_problem(samples=300, tokens=20)
    prediction = predictions(model, batches, loss=token_loss)["head"]
    factors, _ = solved(model, batches, loss=token_loss)
    weight = model.head.weight
    original, step = weight.detach().clone(), 1e-3

    def loss_at(factor, change):
        with torch.no_grad():
            weight.copy_(original + factor * change)
            value = torch.cat([token_loss(model, batch).loss for batch in batches]).mean()
            weight.copy_(original)
        return value

    for index, change in enumerate(truncations(model, factors["head"], "head")):
        second = (loss_at(step, change) - 2 * loss_at(0, change) + loss_at(-step, change)) / step**2
        assert float(prediction.curvature[index]) == pytest.approx(float(second) / 2, rel=0.2)


def test_tokens_that_do_not_count_change_nothing():
    model, batches = token_problem()

    def padded(model, batch):
        counts = torch.ones(len(batch[1]), 10)
        counts[:, 7:] = 0
        terms = LossTerms.of(nn.functional.pad(token_losses(model, batch), (0, 3), value=math.inf), counts)
        signs = nn.functional.pad(terms.values[:, :7], (0, 0))
        return StepOutput(terms.per_sample, terms=LossTerms(signs, terms.count))

    plain, other = predictions(model, batches, loss=token_loss), predictions(model, batches, loss=padded)
    torch.testing.assert_close(other["mix"].curvature, plain["mix"].curvature)
    torch.testing.assert_close(other["mix"].first_order, plain["mix"].first_order)


def test_one_term_per_sample_is_no_different():
    model, batches = problem()

    def single(model, batch):
        terms = LossTerms.of(per_sample(model, batch)[:, None])
        return StepOutput(terms.per_sample, terms=terms)

    for name, prediction in predictions(model, batches, loss=single).items():
        torch.testing.assert_close(prediction.curvature, predictions(model, batches)[name].curvature)


@pytest.mark.parametrize("compiled", ["part", "whole"])
def test_compiled_modules_bear_the_passes_of_tokens(compiled):
    """Going back through a compiled region twice is an error of torch's."""
    model, batches = token_problem()
    expected = predictions(model, batches, loss=token_loss)
    if compiled == "whole":
        model.compile(backend="aot_eager")
    else:
        model.mix.compile(backend="aot_eager")
    found = predictions(model, batches, loss=token_loss)
    torch.testing.assert_close(found["mix"].curvature, expected["mix"].curvature)
    torch.testing.assert_close(found["head"].first_order, expected["head"].first_order)
