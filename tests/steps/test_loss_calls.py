import pytest
import torch
from torch import nn
from torch.nn import functional

from lrf_lightning.steps.loss_calls import LossCalls
from lrf_lightning.steps.loss_explanation import ExplainedLoss, explanation


def watched(function):
    with LossCalls() as watch:
        result = function()
    return result, watch.calls


def single(function):
    result, (call,) = watched(function)
    return result, call


LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([0, 1, 2, 3, 0, 1])


@pytest.mark.parametrize(
    "loss",
    [
        lambda: functional.cross_entropy(LOGITS, TARGET),
        lambda: functional.cross_entropy(input=LOGITS, target=TARGET, label_smoothing=0.1),
        lambda: nn.CrossEntropyLoss()(LOGITS, TARGET),
        lambda: functional.nll_loss(LOGITS.log_softmax(1), TARGET),
        lambda: nn.BCEWithLogitsLoss()(LOGITS, (LOGITS > 0).float()),
        lambda: functional.mse_loss(LOGITS, LOGITS.flip(0)),
        lambda: functional.cross_entropy(LOGITS, LOGITS.softmax(1)),
    ],
    ids=["cross-entropy", "label smoothing", "module", "nll", "bce", "mse", "soft targets"],
)
class TestPerSample:
    def test_mean_is_the_loss(self, loss):
        result, call = single(loss)
        per_sample = call.per_sample(6)
        assert per_sample.shape == (6,)
        assert explanation([call], result, 6)[0] is call
        assert explanation([call], per_sample, 6)[0] is call
        assert explanation([call], 1.01 * result, 6) is None
        torch.testing.assert_close(result, loss(), rtol=0, atol=0)

    def test_each_entry_is_the_loss_of_that_sample_alone(self, loss):
        _, call = single(loss)
        for i, value in enumerate(call.per_sample(6)):
            options = dict(call.options)
            alone = call.function(call.input[i : i + 1], call.target[i : i + 1], **options)
            torch.testing.assert_close(value, alone)


class TestTimeMajorRows:
    """Recurrent networks and older transformers have the time in front, and flatten it with the batch."""

    LENGTH, SIZE = 5, 3

    @pytest.fixture
    def tokens(self):
        return torch.randint(4, (self.SIZE, self.LENGTH))

    @pytest.fixture
    def logits(self):
        return torch.randn(self.SIZE, self.LENGTH, 4)

    def check(self, function, logits, wanted, given, **options):
        """Compare what a call on time-major rows gives with the same call on rows by sample."""
        result, call = single(
            lambda: function(logits.transpose(0, 1).flatten(0, 1), wanted.transpose(0, 1).flatten(0, 1), **options)
        )
        assert call.arranged(self.SIZE, []) is call
        found, per_sample, _ = explanation([call.arranged(self.SIZE, given)], result, self.SIZE)
        _, expected = single(lambda: function(logits.flatten(0, 1), wanted.flatten(0, 1), **options))
        torch.testing.assert_close(per_sample, expected.per_sample(self.SIZE))
        torch.testing.assert_close(found.terms(self.SIZE).values, expected.terms(self.SIZE).values)
        hits = expected.correct(self.SIZE)
        assert (found.correct(self.SIZE) is None) == (hits is None)
        if hits is not None:
            torch.testing.assert_close(found.correct(self.SIZE), hits)
        if len({round(float(value), 4) for value in per_sample}) > 1:
            assert not torch.allclose(call.per_sample(self.SIZE), per_sample), "or the test tests nothing"

    def test_targets_of_the_batch(self, logits, tokens):
        self.check(functional.cross_entropy, logits, tokens, [torch.randn(self.SIZE, 2), tokens])

    @pytest.mark.parametrize("shift", [slice(1, None), slice(None, -1)])
    def test_targets_without_a_step(self, logits, tokens, shift):
        self.check(functional.cross_entropy, logits[:, shift], tokens[:, shift], [tokens])

    def test_ignored_targets(self, logits, tokens):
        wanted = tokens.clone()
        wanted[1, 3:] = -100
        self.check(functional.cross_entropy, logits, wanted, [tokens])
        self.check(functional.cross_entropy, logits, tokens, [tokens], ignore_index=int(tokens[0, 0]))

    def test_labels_that_became_numbers(self, tokens):
        wanted = (tokens > 1).float()
        self.check(functional.binary_cross_entropy_with_logits, torch.randn(wanted.shape), wanted, [tokens > 1])

    def test_what_cannot_be_looked_at_is_passed_over(self, logits):
        wanted = logits.flip(0).flatten(1)
        _, call = single(lambda: functional.mse_loss(logits.flatten(1), wanted))
        assert call.arranged(self.SIZE, [wanted.to_sparse()]) is call
        result, calls = watched(lambda: torch.vmap(functional.mse_loss)(logits, logits.flip(0)).mean())
        calls = [call.arranged(self.SIZE, [logits.flip(0)]) for call in calls]
        assert explanation(calls, result, self.SIZE) is None

    def test_forecasts(self, logits):
        self.check(functional.mse_loss, logits, logits.flip(0), [logits.flip(0)])

    def test_rows_by_sample_stay(self, logits, tokens):
        result, call = single(lambda: functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()))
        found = explanation([call.arranged(self.SIZE, [tokens])], result, self.SIZE).call
        assert (found.steps, found.given) == (0, True)
        alike = torch.ones_like(tokens)
        _, call = single(lambda: functional.cross_entropy(logits.flatten(0, 1), alike.flatten()))
        assert call.arranged(self.SIZE, [alike]).steps == 0, "both orders are the same"
        assert call.arranged(self.SIZE, [tokens]) is call, "these are other targets"

    def test_a_loss_of_the_users(self, logits, tokens):
        def loss(model, batch):
            return functional.cross_entropy(model(batch[0]).transpose(0, 1).flatten(0, 1), batch[1].T.flatten())

        terms = ExplainedLoss(loss)(nn.Identity(), (logits, tokens)).terms
        _, expected = single(lambda: functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()))
        torch.testing.assert_close(terms.values, expected.terms(self.SIZE).values)


class TestRows:
    def test_pixels_and_tokens_are_averaged_within_their_sample(self):
        logits, target = torch.randn(3, 4, 5, 2), torch.randint(4, (3, 5, 2))
        result, call = single(lambda: functional.cross_entropy(logits, target))
        torch.testing.assert_close(
            call.per_sample(3), functional.cross_entropy(logits, target, reduction="none").mean((1, 2))
        )
        flat, tokens = torch.randn(6, 4), torch.randint(4, (6,))
        result, call = single(lambda: functional.cross_entropy(flat, tokens))
        expected = functional.cross_entropy(flat, tokens, reduction="none").reshape(2, 3).mean(1)
        torch.testing.assert_close(call.per_sample(2), expected)
        assert explanation([call], result, 2)
        assert call.logits(2) is None, "logits of tokens are not kept"
        assert call.per_sample(4) is None, "6 rows fit no 4 samples"
        assert call.terms(4) is None
        assert call.terms(6) is None, "one row per sample"
        assert call.terms(2).count == 3
        torch.testing.assert_close(call.terms(2).values.sum(1), expected)

    @pytest.mark.parametrize("ignore_index", [-100, 2])
    def test_ignored_tokens_leave_the_mean_over_the_others(self, ignore_index):
        logits, target = torch.randn(3, 5, 4), torch.tensor([[0, 1, 3, 1, 0], [1, 3, 0, 0, 3], [3, 0, 0, 1, 1]])
        target[0, 3:] = target[1, 1:] = ignore_index
        result, call = single(
            lambda: functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=ignore_index)
        )
        sums = [functional.cross_entropy(x[y != ignore_index], y[y != ignore_index], reduction="sum")
                for x, y in zip(logits, target, strict=True)]  # fmt: skip
        tokens = 3 + 1 + 5
        torch.testing.assert_close(call.per_sample(3), torch.stack(sums) / (tokens / 3))
        assert explanation([call], result, 3)
        terms = call.terms(3)
        assert terms.count == tokens / 3
        torch.testing.assert_close(terms.per_sample, call.per_sample(3))
        assert ((terms.values == 0) == (target == ignore_index)).all()
        hits = (logits.argmax(2) == target) & (target != ignore_index)
        torch.testing.assert_close(call.correct(3), hits.sum(1) / (tokens / 3))

    def test_a_batch_of_ignored_tokens_only_has_no_finite_loss(self):
        result, call = single(lambda: functional.cross_entropy(LOGITS, torch.full((6,), -100)))
        losses = explanation([call], result, 6).losses
        assert losses.isnan().all()
        assert losses.shape == (6,)
        assert explanation([call], torch.tensor(0.1), 6) is None

    def test_gradients_flow(self):
        logits = LOGITS.clone().requires_grad_()
        _, call = single(lambda: functional.cross_entropy(logits, TARGET))
        (gradient,) = torch.autograd.grad(call.per_sample(6).mean(), logits)
        torch.testing.assert_close(gradient, (LOGITS.softmax(1) - functional.one_hot(TARGET, 4)) / 6)

    def test_half_precision_is_widened(self):
        logits = LOGITS.bfloat16()
        result, call = single(lambda: functional.cross_entropy(logits, TARGET))
        assert call.per_sample(6).dtype is torch.float32
        assert explanation([call], result, 6)


class TestContrastiveLosses:
    """Classes that are the samples of the batch; the loss of a sample depends on the others."""

    @pytest.mark.parametrize("size", [3, 8])
    @pytest.mark.parametrize(
        "call",
        [
            lambda n: functional.cross_entropy(torch.randn(n, n), torch.arange(n)),
            lambda n: functional.cross_entropy(torch.randn(n, n), torch.eye(n)),
            lambda n: functional.cross_entropy(torch.randn(2 * n, 2 * n), torch.arange(2 * n).roll(n)),
            lambda n: functional.cross_entropy(torch.randn(2 * n, 2 * n - 1), torch.zeros(2 * n, dtype=torch.long)),
            lambda n: functional.cross_entropy(torch.randn(n, 4 * n), torch.arange(n) + n),
            lambda n: functional.cross_entropy(torch.randn(n, 2 * n), 2 * torch.arange(n)),
            lambda n: functional.cross_entropy(torch.randn(n, n), 0.9 * torch.eye(n) + 0.1 / n),
            lambda n: functional.binary_cross_entropy_with_logits(torch.randn(n, n), torch.eye(n)),
            lambda n: functional.mse_loss(torch.randn(n, n), torch.randn(n, n)),
        ],
        ids=[
            "numbered",
            "one-hot",
            "two views",
            "the positive first",
            "of several processes",
            "with negatives",
            "soft",
            "pairwise",
            "relations",
        ],
    )
    def test_have_no_losses_per_sample(self, call, size):
        result, (found,) = watched(lambda: call(size))
        found = found.arranged(size, [torch.randn(size, 5)])
        assert found.per_sample(size) is None
        assert found.weighted(size, 1.0) is None
        assert explanation([found], result, size) is None
        accuracy = found.correct(size)
        assert accuracy is None or accuracy.shape == ()

    @pytest.mark.parametrize(
        ("classes", "target"),
        [
            (1000, torch.zeros(8, dtype=torch.long)),
            (7, torch.zeros(8, dtype=torch.long)),
            (10, torch.arange(8)),
            (8, torch.tensor([0, 1, 2, 3, 4, 5, 6, 6])),
        ],
        ids=["a sorted data set", "with as many classes less one", "numbers", "as many classes as samples"],
    )
    def test_targets_of_the_batch_are_classes(self, classes, target):
        _, call = single(lambda: functional.cross_entropy(torch.randn(8, classes), target))
        call = call.arranged(8, [torch.randn(8, 5), target.int()])
        assert call.per_sample(8).shape == call.correct(8).shape == (8,)

    def test_as_many_tokens_as_words(self):
        tokens = torch.randint(40, (40,))
        _, call = single(lambda: functional.cross_entropy(torch.randn(40, 40), tokens))
        assert call.arranged(5, []).per_sample(5).shape == (5,)

    def test_other_targets_are_classes(self):
        _, call = single(lambda: functional.cross_entropy(torch.randn(8, 10), torch.arange(8).flip(0)))
        assert call.arranged(8, []).per_sample(8).shape == (8,)


def test_of_many_calls_the_last_ones_are_kept():
    _, calls = watched(lambda: [functional.cross_entropy(LOGITS[:i], TARGET[:i]) for i in range(1, 7)])
    assert [len(call.target) for call in calls] == [3, 4, 5, 6]


class TestScores:
    def test_accuracy(self):
        _, call = single(lambda: functional.cross_entropy(LOGITS, TARGET))
        assert call.correct(6).tolist() == (LOGITS.argmax(1) == TARGET).float().tolist()
        torch.testing.assert_close(call.logits(6), LOGITS)

    def test_ignored_targets_do_not_count(self):
        target = TARGET.clone()
        target[:4] = -100
        _, call = single(lambda: functional.cross_entropy(LOGITS, target))
        torch.testing.assert_close(call.correct(6).mean(), (LOGITS[4:].argmax(1) == TARGET[4:]).float().mean())
        torch.testing.assert_close(call.correct(4), call.correct(6).mean(), msg="6 rows fit no 4 samples")
        assert call.logits(6) is None
        _, call = single(lambda: functional.cross_entropy(LOGITS, torch.full((6,), 3), ignore_index=3))
        assert call.correct(6) is None

    @pytest.mark.parametrize(
        "loss",
        [
            lambda: functional.mse_loss(LOGITS, LOGITS + 1),
            lambda: functional.binary_cross_entropy_with_logits(LOGITS, (LOGITS > 0).float()),
            lambda: functional.cross_entropy(LOGITS, LOGITS.softmax(1)),
        ],
    )
    def test_no_classes_no_accuracy(self, loss):
        _, call = single(loss)
        assert call.correct(6) is None
        assert call.logits(6) is None

    @pytest.mark.parametrize("options", [{"weight": torch.ones(4)}, {"label_smoothing": 0.1}])
    def test_a_temperature_is_fitted_to_plain_cross_entropies_only(self, options):
        _, call = single(lambda: functional.cross_entropy(LOGITS, TARGET, **options))
        assert call.logits(6) is None


def test_all_calls_are_noted_in_order_and_others_are_not():
    def step():
        functional.kl_div(LOGITS, LOGITS)
        return functional.mse_loss(LOGITS, LOGITS + 1) + functional.cross_entropy(LOGITS, TARGET)

    _, calls = watched(step)
    assert [call.function for call in calls] == [functional.mse_loss, functional.cross_entropy]
    functional.mse_loss(LOGITS, LOGITS)
    assert len(calls) == 2, "nothing is watched afterwards"
