"""Which calls a loss consists of: means of one, sums of several, and what a step averages itself."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from lrf_lightning import LossTerms, StepOutput
from lrf_lightning.steps.loss_calls import LossCalls
from lrf_lightning.steps.loss_explanation import ExplainedLoss, combination, explanation

LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([0, 1, 2, 3, 0, 1])


def watched(function):
    with LossCalls() as watch:
        result = function()
    return result, watch.calls


def traced(function):
    with LossCalls(traced=True) as watch:
        result = function()
    return result, watch.calls, watch.trace.shadow_of(result)


def single(function):
    result, (call,) = watched(function)
    return result, call


class TestAgreement:
    def test_other_reductions_do_not_agree(self):
        result, call = single(lambda: functional.cross_entropy(LOGITS, TARGET, reduction="sum"))
        assert explanation([call], result, 6) is None
        assert explanation([call], result / 6, 6)

    @pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
    def test_an_infinite_loss_comes_from_no_finite_call(self, value):
        _, call = single(lambda: functional.cross_entropy(LOGITS, TARGET))
        assert explanation([call], torch.tensor(value), 6) is None
        assert explanation([call], torch.full((6,), value), 6) is None

    def test_tolerance(self):
        result, call = single(lambda: functional.cross_entropy(LOGITS, TARGET))
        assert explanation([call], result * 1.00005, 6)
        assert explanation([call], result * 1.0005, 6) is None
        assert explanation([call], (result * 1.005).bfloat16(), 6), "so coarse is its own rounding"

    def test_a_term_beside_a_coarse_loss_is_not_overlooked(self):
        """A penalty that is smaller than the rounding of the cross-entropy in half precision."""
        result, call = single(lambda: functional.cross_entropy(LOGITS.bfloat16(), TARGET))
        loss = result.float() * 1.008
        assert explanation([call], loss, 6) is None
        assert explanation([call], loss, 6, widened=True)

    def test_the_first_call_that_fits_is_taken(self):
        _, other = single(lambda: functional.cross_entropy(-LOGITS, TARGET))
        result, call = single(lambda: functional.cross_entropy(LOGITS, TARGET))
        assert explanation([other, call], result, 6)[0] is call

    def test_a_call_that_cannot_be_made_again_explains_nothing(self):
        result, call = single(lambda: functional.cross_entropy(LOGITS, TARGET))

        def refuse(*args, **options):
            raise RuntimeError("outside of its transform")

        assert explanation([replace(call, function=refuse)], result, 6) is None


def rows_of(logits, **options):
    return functional.cross_entropy(logits, TARGET, reduction="none", **options)


MASK = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
OTHER = LOGITS.flip(0)


@pytest.mark.parametrize("grad", [True, False], ids=["gradients", "no gradients"])
class TestCombination:
    """Losses per sample against what the same formula gives row by row, with and without gradients of the model."""

    def combined(self, loss, grad, logits=LOGITS, size=6):
        logits = logits.clone().requires_grad_()
        with torch.set_grad_enabled(grad):
            result, calls, shadow = traced(lambda: loss(logits))
            assert result.requires_grad == grad
            assert result.isnan() or explanation(calls, result, size) is None
            return logits, result, combination(calls, result, shadow, size, check=grad)

    @pytest.mark.parametrize(
        ("loss", "per_sample"),
        [
            (
                lambda x: functional.cross_entropy(x, TARGET) + 0.1 * functional.mse_loss(x, OTHER),
                lambda x: rows_of(x) + 0.1 * (x - OTHER).square().mean(1),
            ),
            (lambda x: 0.5 * functional.cross_entropy(x, TARGET), lambda x: 0.5 * rows_of(x)),
            (lambda x: functional.cross_entropy(x, TARGET, reduction="sum"), lambda x: 6 * rows_of(x)),
            (
                lambda x: (functional.cross_entropy(x, TARGET, reduction="none") * MASK).sum() / MASK.sum(),
                lambda x: rows_of(x) * MASK * 6 / 4,
            ),
            (
                lambda x: functional.l1_loss(x, OTHER, reduction="none")[MASK.bool()].mean(),
                lambda x: (x - OTHER).abs().mean(1) * MASK * 6 / 4,
            ),
            (
                lambda x: functional.huber_loss(x, OTHER) - functional.smooth_l1_loss(x, OTHER, beta=0.5),
                lambda x: (functional.huber_loss(x, OTHER, reduction="none")
                           - functional.smooth_l1_loss(x, OTHER, beta=0.5, reduction="none")).mean(1),
            ),
            (
                lambda x: functional.cross_entropy(x, TARGET).add_(functional.cross_entropy(-x, TARGET)).mul_(0.5),
                lambda x: (rows_of(x) + rows_of(-x)) / 2,
            ),
            (
                lambda x: functional.binary_cross_entropy(x.sigmoid(), OTHER.sigmoid(), size_average=False) / 3,
                lambda x: functional.binary_cross_entropy(x.sigmoid(), OTHER.sigmoid(), reduction="none").sum(1) * 2,
            ),
        ],
        ids=["two", "a factor", "sum", "mask", "selected", "difference", "in place", "legacy reduction"],
    )  # fmt: skip
    def test_losses_per_sample(self, loss, per_sample, grad):
        logits, result, found = self.combined(loss, grad)
        expected = per_sample(logits)
        torch.testing.assert_close(found.losses, expected)
        torch.testing.assert_close(found.losses.mean(), result)
        torch.testing.assert_close(found.terms.per_sample, expected)
        if grad:  # the graph is as it was, and what was found depends on the model as the loss does
            gradients = [
                torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (found.losses.mean(), result)
            ]
            torch.testing.assert_close(*gradients)

    def test_curvatures_add_up_with_the_weights(self, grad):
        """Against the weighted sum of every term's own squared derivative, here along one direction of the logits."""
        direction = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
        weight = torch.tensor([1.0, 2.0, 3.0, 4.0])

        def loss(x):
            return functional.cross_entropy(x, TARGET, weight=weight) + 0.1 * functional.cross_entropy(-x, TARGET)

        def slope(function):
            return torch.func.jvp(function, (LOGITS,), (direction,))[1]

        expected = 6 * weight[TARGET] / weight[TARGET].sum() * slope(rows_of).square()
        expected += 0.1 * slope(lambda x: rows_of(-x)).square()

        def scattered(x, seed):
            result, calls, shadow = traced(lambda: loss(x))
            return combination(calls, result, shadow, 6).terms.scattered(torch.Generator().manual_seed(seed))

        squares = []
        for seed in range(400):
            x = LOGITS.clone().requires_grad_()
            rows = scattered(x, seed)
            squares.append((torch.autograd.grad(rows.sum(), x)[0] * direction).sum(1).square())
        torch.testing.assert_close(torch.stack(squares).mean(0), expected, rtol=0.15, atol=1e-3)

    def test_tokens_and_samples(self, grad):
        tokens = torch.randint(4, (2, 3), generator=torch.Generator().manual_seed(1))

        def loss(x):
            heads = x.reshape(2, 3, 4)
            return functional.cross_entropy(x, tokens.flatten()) + functional.cross_entropy(heads[:, 0], tokens[:, 0])

        logits, _, found = self.combined(loss, grad, size=2)
        rows = functional.cross_entropy(logits, tokens.flatten(), reduction="none").reshape(2, 3)
        torch.testing.assert_close(found.losses, rows.mean(1) + rows[:, 0])
        torch.testing.assert_close(found.terms.count, torch.tensor([[3.0, 3.0, 3.0, 1.0]]).expand(2, 4))
        assert found.terms.mean_count == 2.5

    @pytest.mark.parametrize(
        "loss",
        [
            lambda x: functional.cross_entropy(x, TARGET) + 0.01 * x.square().mean(),
            lambda x: functional.mse_loss(x, OTHER).sqrt(),
            lambda x: functional.mse_loss(x, OTHER).detach() * 2 + x.mean(),
            lambda x: functional.cross_entropy(x, TARGET).square(),
            lambda x: functional.cross_entropy(x, TARGET) + functional.mse_loss(x.mean(0), torch.ones(4)),
            lambda x: sum(functional.cross_entropy(x * i, TARGET) for i in range(1, 6)),
            lambda x: torch.vmap(functional.mse_loss)(x, OTHER).mean() * 2,
        ],
        ids=["a penalty", "a root", "no gradient", "a square", "rows of no sample", "too many calls", "a transform"],
    )
    def test_what_is_no_sum_of_rows(self, loss, grad):
        assert self.combined(loss, grad)[2] is None

    def test_results_that_stay_the_callers(self, grad):
        """What the step gets are the plain results, and what it computes has no graph that was not there."""
        kept = []

        def loss(x):
            rows = functional.cross_entropy(x, TARGET, reduction="none")
            total = torch.zeros(())
            total += (rows * MASK).sum()
            kept.extend([rows, total, (2 * rows).detach().numpy()])
            box = torch.zeros(2)
            box[0] = total / MASK.sum()
            return box.sum()

        logits, _, found = self.combined(loss, grad)
        torch.testing.assert_close(found.losses, rows_of(logits) * MASK * 6 / 4)
        assert [value.requires_grad for value in kept[:2]] == [grad, grad]

    def test_rows_outside_of_a_mask_may_be_anything(self, grad):
        logits = LOGITS.clone()
        logits[1] = torch.nan
        _, result, found = self.combined(
            lambda x: 2 * functional.cross_entropy(x, TARGET, reduction="none")[MASK.bool()].mean(), grad, logits
        )
        assert found.losses.isfinite().all()
        torch.testing.assert_close(found.losses.mean(), result)

    def test_a_loss_that_is_not_finite_keeps_its_samples(self, grad):
        logits = LOGITS.clone()
        logits[1] = torch.nan
        _, result, found = self.combined(
            lambda x: functional.cross_entropy(x, TARGET) + functional.mse_loss(x, OTHER), grad, logits
        )
        assert result.isnan()
        assert found.losses.isnan().tolist() == [False, True, False, False, False, False]

    def test_half_precision(self, grad):
        _, result, found = self.combined(
            lambda x: functional.cross_entropy(x.bfloat16(), TARGET).float() + functional.mse_loss(x, OTHER), grad
        )
        torch.testing.assert_close(found.losses.mean(), result, rtol=0.01, atol=0)
        assert found.losses.dtype is torch.float32

    def test_a_penalty_beside_a_coarse_loss_is_not_overlooked(self, grad):
        def loss(x):
            coarse = functional.cross_entropy(x.bfloat16(), TARGET).float()
            return coarse + functional.mse_loss(x, OTHER) + 0.002 * x.square().sum()

        assert self.combined(loss, grad)[2] is None


class Reversed(torch.autograd.Function):
    """A gradient of its own."""

    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: ((1 - (-rows_of(x)).exp()).square() * rows_of(x)).mean(),
        lambda x: (functional.cross_entropy(x, TARGET) * functional.mse_loss(x, OTHER)).sqrt(),
        lambda x: 2 * rows_of(x).topk(3).values.mean(),
        lambda x: 2 * rows_of(x).max(),
        lambda x: rows_of(x).norm(),
        lambda x: (functional.cross_entropy(x, TARGET) - 0.1).abs() + 0.1,
        lambda x: functional.cross_entropy(x, TARGET) * x.mean(),
        lambda x: functional.cross_entropy(x, TARGET) / functional.mse_loss(x, OTHER),
        lambda x: rows_of(x)[rows_of(x) > 1].mean() * 2,
        lambda x: rows_of(x).mul(rows_of(x).detach().softmax(0)).sum(),
        lambda x: 2 * Reversed.apply(functional.cross_entropy(x, TARGET)),
    ],
    ids=["focal", "homogeneous", "hard examples", "largest", "norm", "flooding", "factor of the model", "ratio",
         "threshold", "weights of losses", "another gradient"],
)  # fmt: skip
def test_factors_that_are_not_constant(loss):
    """Such losses may well be the sum of the results times their derivatives, but change otherwise."""
    logits = LOGITS.clone().requires_grad_()
    result, calls, shadow = traced(lambda: loss(logits))
    assert combination(calls, result, shadow, 6, check=True) is None


def test_what_was_changed_in_place_is_left_alone():
    logits = LOGITS.clone().requires_grad_()

    def loss():
        scores = logits * 2
        total = 2 * functional.mse_loss(scores, OTHER)
        scores.detach().mul_(1)
        return total

    result, calls, shadow = traced(loss)
    with pytest.raises(RuntimeError, match="inplace"):
        torch.autograd.grad(result, logits, retain_graph=True)
    assert combination(calls, result, shadow, 6, check=True) is None


def test_parts_that_nearly_cancel():
    for scale in (1.0, 1.02, 1.0002):
        result, calls, shadow = traced(
            lambda scale=scale: functional.mse_loss(LOGITS, OTHER) - scale * functional.mse_loss(LOGITS, OTHER + 1e-3)
        )
        assert combination(calls, result, shadow, 6) is not None


def test_a_call_that_depends_on_no_model_is_a_part_as_well():
    logits = LOGITS.clone().requires_grad_()
    result, calls, shadow = traced(
        lambda: functional.cross_entropy(logits, TARGET) + functional.cross_entropy(OTHER, TARGET)
    )
    found = combination(calls, result, shadow, 6, check=True)
    torch.testing.assert_close(found.losses, rows_of(logits) + rows_of(OTHER))


@pytest.mark.parametrize("factor", [0.1, 0.11, 0.3])
def test_coarse_derivatives(factor):
    """A factor is rounded like the result that it stands before."""
    result, calls, shadow = traced(
        lambda: (
            functional.cross_entropy(LOGITS.bfloat16(), TARGET).float()
            + factor * functional.mse_loss(5 * LOGITS.bfloat16(), OTHER.bfloat16()).float()
        )
    )
    assert combination(calls, result, shadow, 6) is not None


@pytest.mark.parametrize(
    ("loss", "is_mean"),
    [
        (lambda x: functional.cross_entropy(x, TARGET), True),
        (lambda x: functional.cross_entropy(x, TARGET).clone(), True),
        (lambda x: rows_of(x).mean(), False),
        (lambda x: 2 * functional.cross_entropy(x, TARGET), False),
    ],
)
def test_the_mean_of_one_call_needs_no_trace(loss, is_mean):
    result, calls, shadow = traced(lambda: loss(LOGITS))
    assert combination(calls, result, shadow, 6).is_mean == is_mean


def test_weights_of_classes():
    weight, target = torch.tensor([1.0, 2.0, 3.0, 4.0]), TARGET.clone()
    target[2] = -100
    for options in ({}, {"label_smoothing": 0.1}):
        result, call = single(lambda options=options: functional.cross_entropy(LOGITS, target, weight, **options))
        found, losses, weighted = explanation([call], result, 6)
        assert found is call
        assert weighted
        torch.testing.assert_close(losses.mean(), result)
        rows = functional.cross_entropy(LOGITS, target, weight, reduction="none", **options)
        weights = weight[TARGET] * (target >= 0)
        torch.testing.assert_close(losses, rows * 6 / weights.sum())
        terms = call.terms(6)
        torch.testing.assert_close(terms.per_sample, losses)
        torch.testing.assert_close(terms.count[weights > 0, 0], weights.sum() / 6 / weights[weights > 0])
        torch.testing.assert_close(call.correct(6), (LOGITS.argmax(1) == target) * 6 / 5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [True, False], ids=["by the weights", "by their number"])
def test_means_that_a_step_takes_with_weights_of_classes(reduction, weighted):
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    weights = weight[TARGET]
    result, call = single(lambda: functional.cross_entropy(LOGITS, TARGET, weight, reduction=reduction))
    total = result * weights.sum() if reduction == "mean" else result.sum()
    found = explanation([call], total / (weights.sum() if weighted else 6), 6)
    torch.testing.assert_close(found.losses, rows_of(LOGITS, weight=weight) * (6 / weights.sum() if weighted else 1))
    terms = found.terms(6)
    torch.testing.assert_close(terms.per_sample, found.losses)
    torch.testing.assert_close(terms.count[:, 0], weights.sum() / 6 / weights if weighted else 1 / weights)


def test_weights_that_depend_on_the_model():
    logits = LOGITS.clone().requires_grad_()
    weight = logits.sigmoid() * (OTHER > 0)
    result, call = single(lambda: functional.mse_loss(logits, OTHER, weight=weight))
    terms = explanation([call], result, 6).terms(6)
    (gradient,) = torch.autograd.grad(terms.scattered(torch.Generator()).sum(), logits)
    assert gradient.isfinite().all()


def test_weights_of_outputs():
    weight = torch.rand(6, 4, generator=torch.Generator().manual_seed(3))
    result, call = single(lambda: functional.mse_loss(LOGITS, OTHER, weight=weight))
    losses = explanation([call], result, 6).losses
    torch.testing.assert_close(losses, ((LOGITS - OTHER).square() * weight).sum(1) * 6 / weight.sum())


class TestExplainedLoss:
    """What a user's own loss is a mean of."""

    LOGITS = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))
    TOKENS = torch.tensor([[0, 1, 3, 1, 0], [1, 3, 0, 0, 3], [3, 0, 0, 1, 1]])

    def rows(self):
        return functional.cross_entropy(self.LOGITS.transpose(1, 2), self.TOKENS, reduction="none")

    def test_a_mean_over_all_tokens(self):
        output = ExplainedLoss(
            lambda model, batch: functional.cross_entropy(batch[0].flatten(0, 1), batch[1].flatten())
        )(nn.Identity(), (self.LOGITS, self.TOKENS))
        assert output.loss.shape == (), "pairs of the comparison stay what they are"
        torch.testing.assert_close(output.terms.values, self.rows() / 5)
        assert output.terms.count == 5
        assert output.score is None

    def test_a_loss_per_sample_with_a_score(self):
        given = StepOutput(self.rows().mean(1), torch.ones(3))
        output = ExplainedLoss(lambda model, batch: (self.rows(), given)[1])(nn.Identity(), self.TOKENS)
        assert output.loss is given.loss
        assert output.score is given.score
        torch.testing.assert_close(output.terms.per_sample, given.loss)

    def test_a_copy_for_a_log_is_not_the_loss(self):
        logits = self.LOGITS.clone().requires_grad_()

        def loss(model, batch):
            flat = logits.flatten(0, 1)
            functional.cross_entropy(flat.detach(), batch.flatten())
            return functional.cross_entropy(flat, batch.flatten())

        assert ExplainedLoss(loss)(nn.Identity(), self.TOKENS).terms.values.requires_grad

    def test_bfloat16_that_is_widened_afterwards(self):
        logits = self.LOGITS.bfloat16()
        for seed in range(20):
            tokens = torch.randint(4, (3, 5), generator=torch.Generator().manual_seed(seed))
            explained = ExplainedLoss(lambda m, b: functional.cross_entropy(logits.flatten(0, 1), b.flatten()).float())
            assert explained(nn.Identity(), tokens).terms is not None

    def test_a_loss_that_is_not_finite_does_not_end_the_watch(self):
        scale = torch.ones(())
        explained = ExplainedLoss(lambda m, b: functional.cross_entropy(scale * self.LOGITS.transpose(1, 2), b))
        assert explained(nn.Identity(), self.TOKENS).terms is not None
        scale.fill_(torch.nan)
        assert isinstance(explained(nn.Identity(), self.TOKENS), torch.Tensor)
        scale.fill_(1.0)
        assert explained(nn.Identity(), self.TOKENS).terms is not None

    def test_a_function_transform_is_left_alone(self):
        def loss(model, batch):
            return torch.func.vmap(functional.cross_entropy)(self.LOGITS, batch)

        torch.testing.assert_close(ExplainedLoss(loss)(nn.Identity(), self.TOKENS), self.rows().mean(1))

    def test_a_loss_that_fails_is_not_tried_again(self):
        calls = []

        def loss(model, batch):
            calls.append(batch)
            raise ArithmeticError

        with pytest.raises(ArithmeticError):
            ExplainedLoss(loss)(nn.Identity(), self.TOKENS)
        assert len(calls) == 1

    def test_compiled_code_further_down_that_fails_is_called_without_a_watch(self):
        def backend(graph, inputs):
            if torch.overrides._get_current_function_mode_stack():
                raise RuntimeError("watched")
            return graph

        inner = torch.compile(lambda x: x.sin().sum(), backend=backend)
        explained = ExplainedLoss(lambda model, batch: inner(batch.float()))
        torch.testing.assert_close(explained(nn.Identity(), self.TOKENS), self.TOKENS.float().sin().sum())

    def test_compiled_models_and_losses_are_not_watched(self):
        def loss(model, batch):
            assert not torch.overrides._get_current_function_mode_stack()
            return batch.sum()

        compiled = nn.Linear(2, 2)
        compiled.compile(backend="eager")
        wrapped = torch.compile(nn.Linear(2, 2), backend="eager")
        for model in (compiled, wrapped, nn.Sequential(wrapped)):
            ExplainedLoss(loss)(model, self.TOKENS)
        assert ExplainedLoss(torch.compile(loss, backend="eager"))._plain

    def test_terms_that_were_given_are_kept(self):
        terms = LossTerms.of(2 * self.rows())
        given = StepOutput(terms.per_sample, terms=terms)
        assert ExplainedLoss(lambda model, batch: given)(nn.Identity(), self.TOKENS) is given

    @pytest.mark.parametrize(
        "loss",
        [
            lambda model, batch: functional.cross_entropy(batch[0][:, 0], batch[1][:, 0], reduction="none"),
            lambda model, batch: 3 * functional.cross_entropy(batch[0].transpose(1, 2), batch[1]),
            lambda model, batch: batch[0].mean(),
        ],
        ids=["one term per sample", "another factor", "no watched function"],
    )
    def test_what_no_call_explains_is_watched_once(self, loss):
        seen = []

        def noted(model, batch):
            seen.append(len(torch.overrides._get_current_function_mode_stack()))
            return loss(model, batch)

        explained = ExplainedLoss(noted)
        batch = self.LOGITS, self.TOKENS
        for _ in range(2):
            torch.testing.assert_close(explained(nn.Identity(), batch), loss(None, batch))
        assert seen == [1, 0]
