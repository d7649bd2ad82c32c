from collections import OrderedDict

import pytest
import torch
from lightning.pytorch import LightningModule
from small_modules import CLASSES, Classifier, clouds, trainer
from torch import nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy

from lrf_lightning import StepOutput
from lrf_lightning.steps.loss_source import _first_record
from lrf_lightning.steps.step_loss import StepLoss


@pytest.fixture
def batch():
    return clouds(8)


def per_sample(module, batch):
    x, y = batch
    return functional.cross_entropy(module.net(x), y, reduction="none")


class Logs(Classifier):
    names = ("val/loss",)

    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch)
        for name in self.names:
            self.log(name, loss)
        self.log("val/loss_weight", 1.0)


class Silent(Classifier):
    def validation_step(self, batch, batch_idx):
        self.loss(batch)


class ReturnsLogits(Classifier):
    def validation_step(self, batch, batch_idx):
        return self.net(batch[0])


class TestSources:
    """The loss is found wherever the module leaves it."""

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda loss: loss,
            lambda loss: loss.reshape(1),
            lambda loss: {"loss": loss, "other": torch.ones(3)},
            lambda loss: OrderedDict(loss=loss, logits=torch.ones(3)),
            lambda loss: (loss, torch.ones(3)),
            lambda loss: ["text", loss],
        ],
        ids=["tensor", "one entry", "dict", "model output", "tuple", "list"],
    )
    def test_what_validation_step_returns(self, wrap, batch):
        class Wraps(Classifier):
            def validation_step(self, batch, batch_idx):
                return wrap(self.loss(batch))

        module = Wraps()
        torch.testing.assert_close(StepLoss()(module, batch).loss, per_sample(module, batch))

    @pytest.mark.parametrize("name", ["loss", "val/loss", "val_loss", "valid-loss", "Validation/Loss", "loss/val"])
    def test_what_validation_step_logs(self, name, batch):
        module = Logs()
        module.names = (name,)
        torch.testing.assert_close(StepLoss()(module, batch).loss, per_sample(module, batch))

    def test_the_one_loss_that_validation_step_computes(self, batch):
        module = Silent()
        torch.testing.assert_close(StepLoss()(module, batch).loss, per_sample(module, batch))

    def test_training_step_where_validation_step_gives_none(self, batch):
        module = ReturnsLogits()
        step_loss = StepLoss()
        torch.testing.assert_close(step_loss(module, batch).loss, per_sample(module, batch))
        assert step_loss._source.step == "training_step"

    def test_training_step_where_validation_step_fails(self, batch):
        class Fails(Classifier):
            def validation_step(self, batch, batch_idx):
                raise RuntimeError("only in a fit")

        module = Fails()
        torch.testing.assert_close(StepLoss()(module, batch).loss, per_sample(module, batch))

    def test_several_logged_losses_are_ambiguous(self, batch):
        module = Logs()
        module.names = ("val/loss_a", "val/loss_b")
        step_loss = StepLoss()
        step_loss(module, batch)
        assert step_loss._source.step == "training_step"

    def test_a_vector_of_losses_in_a_dict(self, batch):
        class Vector(Classifier):
            def validation_step(self, batch, batch_idx):
                return {"loss": per_sample(self, batch)}

        module = Vector()
        torch.testing.assert_close(StepLoss()(module, batch).loss, per_sample(module, batch))

    def test_loss_of_several_terms_stays_one_number(self, batch):
        class Penalised(Classifier):
            def loss(self, batch):
                return super().loss(batch) + 0.1 * self.net[0].weight.square().sum()

        module = Penalised()
        output = StepLoss()(module, batch)
        torch.testing.assert_close(output.loss, module.loss(batch))
        assert output.score.shape == (8,), "the accuracy is known nevertheless"
        assert output.logits is None

    @pytest.mark.parametrize("shape", [(), (1,)])
    def test_sums_of_losses_are_told_per_sample(self, shape, batch):
        class Two(Classifier):
            def loss(self, batch):
                x, y = batch
                loss = functional.cross_entropy(self.net(x), y, weight=torch.tensor([1.0, 2.0, 3.0, 4.0])[:CLASSES])
                loss += 0.1 * functional.l1_loss(self.net(x)[:, 0], x[:, 0])
                with torch.no_grad():
                    self.copy = functional.cross_entropy(self.net(x), y)
                return loss.reshape(shape)

        module, found = Two(), []
        for grad in (True, False):
            loss = StepLoss()
            for _ in range(2):
                with torch.set_grad_enabled(grad):
                    found.append(loss(module, batch))
                    assert torch.is_grad_enabled() == grad
        for output in found:
            assert output.loss.shape == output.score.shape == (8,)
            torch.testing.assert_close(output.loss, found[0].loss)
            torch.testing.assert_close(output.loss.mean(), module.loss(batch).reshape(()))
            torch.testing.assert_close(output.terms.per_sample, output.loss)
        gradients = [torch.autograd.grad(loss, list(module.parameters())) for loss in
                     (found[0].loss.mean(), module.loss(batch).reshape(()))]  # fmt: skip
        torch.testing.assert_close(*gradients)

    def test_a_mean_over_a_mask_is_one_whatever_comes_first(self, batch):
        class Masked(Classifier):
            def loss(self, batch):
                x, y, mask = batch
                rows = functional.cross_entropy(self.net(x), y, reduction="none")
                return (rows * mask).sum() / mask.sum()

        whole, part = (*batch, torch.ones(8)), (*batch, (torch.arange(8) > 2).float())
        for batches in ((whole, part), (part, whole)):
            loss, module = StepLoss(), Masked()
            for one in batches:
                output = loss(module, one)
                assert output.loss.shape == (8,)
                torch.testing.assert_close(output.loss.mean(), module.loss(one))

    def test_an_accuracy_beside_the_loss_is_still_found(self, batch):
        class Beside(Classifier):
            def loss(self, batch):
                x, y = batch
                logits = self.net(x)
                self.copy = functional.cross_entropy(logits, y)
                wanted = functional.one_hot(y, CLASSES).float()
                return functional.mse_loss(logits, wanted) + functional.l1_loss(logits, wanted)

        output = StepLoss()(Beside(), batch)
        assert output.loss.shape == output.score.shape == (8,)

    def test_compiled_code_that_gets_losses_is_not_traced(self, batch):
        class Mixed(Classifier):
            def __init__(self):
                super().__init__()
                self.mix = torch.compile(lambda a, b: a + 0.1 * b.mean(), backend="eager")

            def loss(self, batch):
                logits = self.net(batch[0])
                return self.mix(functional.cross_entropy(logits, batch[1]), logits.square())

        module = Mixed()
        torch.testing.assert_close(StepLoss()(module, batch).loss, module.loss(batch))

    def test_nothing_of_the_trace_stays_in_the_module(self, batch):
        class Keeps(Classifier):
            def __init__(self):
                super().__init__()
                self.register_buffer("average", torch.zeros(()))

            def loss(self, batch):
                x, y = batch
                loss = functional.cross_entropy(self.net(x), y) + functional.mse_loss(self.net(x)[:, 0], x[:, 0])
                self.average.mul_(0.9).add_(0.1 * loss)
                loss.item(), loss.numpy(force=True)
                return loss

        module, loss = Keeps(), StepLoss()
        with torch.no_grad():
            loss(module, batch)
            module.average = torch.zeros(())
            for _ in range(3):
                assert loss(module, batch).loss.shape == (8,)
        assert module.average.grad_fn is None
        assert module.average > 0

    @pytest.mark.parametrize("shape", [(), (1,)])
    def test_gradients_of_a_loss_that_is_one_number(self, shape, batch):
        """No watched call explains the square of a cross-entropy: the loss itself is what gradients start from."""

        class Squared(Classifier):
            def loss(self, batch):
                return super().loss(batch).square().reshape(shape)

        module = Squared()
        wanted = torch.autograd.grad(module.loss(batch).reshape(()), list(module.parameters()))
        for _ in range(2):
            found = torch.autograd.grad(StepLoss()(module, batch).loss, list(module.parameters()))
            torch.testing.assert_close(found, wanted)

    @pytest.mark.parametrize("grad", [True, False])
    @pytest.mark.parametrize("returned", ["score", "tuple", "nothing"])
    def test_a_returned_score_is_no_loss(self, returned, grad, batch):
        """Accuracy has no gradient and a soft score has one; a validation step without gradients is no source."""

        class Scores(Classifier):
            def validation_step(self, batch, batch_idx):
                loss, logits = self.loss(batch), self.net(batch[0])
                score = -loss.log() if grad else (logits.argmax(1) == batch[1]).float().mean()
                self.log("val_loss", loss)
                return {"score": score, "tuple": (score, loss), "nothing": None}[returned]

        module = Scores()
        for context in (torch.no_grad, torch.enable_grad):
            with context():
                step_loss = StepLoss()
                torch.testing.assert_close(step_loss(module, batch).loss, per_sample(module, batch))
                assert step_loss._source.place == "logged val_loss"

    @pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
    def test_a_validation_step_without_gradients_is_no_source(self, guard, batch):
        class Guarded(Classifier):
            @guard()
            def validation_step(self, batch, batch_idx):
                return self.loss(batch)

        module, step_loss = Guarded(), StepLoss()
        with torch.no_grad(), pytest.warns(UserWarning, match=r"from training_step .*without gradient"):
            step_loss(module, batch)
        assert step_loss._source.step == "training_step"
        torch.testing.assert_close(step_loss(module, batch).loss, per_sample(module, batch))

    @pytest.mark.parametrize("score", [None, "train/acc"])
    def test_steps_that_change_their_batch(self, score, batch):
        class Changes(Classifier):
            def validation_step(self, batch, batch_idx):
                y = batch.pop("y")
                x = batch["x"].sub_(1.0)
                self.log("val_loss", functional.cross_entropy(self.net(x), y))

            def training_step(self, batch, batch_idx):
                logits = self.net(batch["x"].sub_(1.0))
                self.log("train/acc", (logits.argmax(1) == batch.pop("y")).float().mean())

        module, (x, y) = Changes(), batch
        output = StepLoss(score=score)(module, {"x": x.clone(), "y": y})
        torch.testing.assert_close(output.loss, per_sample(module, (x - 1, y)))
        torch.testing.assert_close(output.score.double(), (module.net(x - 1).argmax(1) == y).double())

    @pytest.mark.parametrize(("told", "warned"), [(8, 0), (3, 1), (None, 0)])
    def test_another_batch_size_in_the_log_is_told_once(self, told, warned, batch, recwarn):
        class Told(Classifier):
            def validation_step(self, batch, batch_idx):
                self.log("val_loss", self.loss(batch), batch_size=told)

        module, step_loss = Told(), StepLoss()
        for _ in range(3):
            step_loss(module, batch)
        messages = [str(warning.message) for warning in recwarn if "batch_size=3" in str(warning.message)]
        assert len(messages) == warned
        assert all("counted as 8 samples" in message for message in messages)

    def test_tokens_are_terms_whatever_the_score(self):
        class Tokens(LightningModule):
            def __init__(self):
                super().__init__()
                self.head = nn.Linear(6, CLASSES)

            def validation_step(self, batch, batch_idx):
                x, y = batch
                return functional.cross_entropy(self.head(x).flatten(0, 1), y.flatten())

        module = Tokens()
        x, y = torch.randn(4, 5, 6), torch.randint(CLASSES, (4, 5))
        rows = functional.cross_entropy(module.head(x).transpose(1, 2), y, reduction="none")
        for score in (None, lambda module, batch: torch.ones(4)):
            output = StepLoss(score=score)(module, (x, y))
            torch.testing.assert_close(output.terms.values, rows / 5)
            torch.testing.assert_close(output.loss, output.terms.per_sample)

    def test_a_loss_that_is_not_finite_keeps_its_samples(self, batch):
        class Scaled(Classifier):
            scale, factor = 1.0, 1.0

            def validation_step(self, batch, batch_idx):
                return functional.cross_entropy(self.scale * self.net(batch[0]), batch[1]) * self.factor

        module = Scaled()
        loss = StepLoss()
        assert loss(module, batch).loss.shape == (8,)
        module.scale = torch.nan
        found = loss(module, batch).loss
        assert found.shape == (8,)
        assert not found.isfinite().any()
        module.scale, module.factor = 1.0, torch.inf
        assert not loss(module, batch).loss.isfinite(), "the loss itself is broken, not what it is made of"

    def test_decided_once_for_all_batches(self, batch):
        class Changes(Classifier):
            calls = 0

            def validation_step(self, batch, batch_idx):
                return self.loss(batch) if len(batch[0]) == 8 else None

        step_loss, module = StepLoss(), Changes()
        step_loss(module, batch)
        with pytest.raises(ValueError, match=r"validation_step gave a loss \(returned\) for the first batch, but for"):
            step_loss(module, clouds(7))

    def test_gradients_flow_and_frozen_models_do(self, batch):
        module = Classifier().requires_grad_(False)
        module.net[4].weight.requires_grad_(True)
        loss = StepLoss()(module, batch).loss.mean()
        (gradient,) = torch.autograd.grad(loss, module.net[4].weight)
        assert gradient.abs().sum() > 0
        assert [p.requires_grad for p in module.parameters()] == [False] * 4 + [True, False]

    def test_a_number_made_of_the_loss_is_no_reason_for_a_warning(self, batch):
        """Torch warns of it once in a process, and without a solver there is no gradient in a validation step."""

        class Keeps(Classifier):
            def validation_step(self, batch, batch_idx):
                loss = self.loss(batch)
                self.log("val/best", min(float(loss), 10.0))
                self.log("val/loss", loss)

        record = _first_record(Keeps(), "validation_step", batch)
        assert record.logged["val/loss"].requires_grad
        assert record.logged["val/best"] == pytest.approx(record.logged["val/loss"].item())

    def test_decided_without_gradients(self, batch):
        module = Classifier()
        with torch.no_grad():
            output = StepLoss()(module, batch)
        assert not output.loss.requires_grad
        torch.testing.assert_close(output.loss, per_sample(module, batch).detach())


class TestRefusals:
    def test_no_lightning_module(self, batch):
        with pytest.raises(TypeError, match="module is a Linear; StepLoss takes a LightningModule"):
            StepLoss()(nn.Linear(2, 2), batch)

    def test_no_loss_anywhere(self, batch):
        class Nothing(LightningModule):
            def __init__(self):
                super().__init__()
                self.automatic_optimization = False
                self.net = nn.Linear(12, CLASSES)

            def training_step(self, batch, batch_idx):
                raise AssertionError("a manual step must not run: it would train")

            def validation_step(self, batch, batch_idx):
                return {"accuracy": self.net(batch[0])}

        with pytest.raises(
            ValueError, match=r"no step of Nothing .*mapping with the keys \['accuracy'\]; training_step cannot be used"
        ):
            StepLoss()(Nothing(), batch)

    def test_a_loss_without_gradient(self, batch):
        class Detached(Classifier):
            def training_step(self, batch, batch_idx):
                return self.net(batch[0]).abs().mean().detach()

            validation_step = training_step

        with pytest.raises(ValueError, match=r"shape \(\) and torch.float32 without gradient"):
            StepLoss()(Detached(), batch)

    def test_the_cause_is_kept(self, batch):
        class Fails(Classifier):
            def training_step(self, batch, batch_idx):
                raise KeyError("missing")

            validation_step = training_step

        with pytest.raises(ValueError, match="training_step raised KeyError") as caught:
            StepLoss()(Fails(), batch)
        assert isinstance(caught.value.__cause__, KeyError)


class TestScores:
    def test_accuracy_of_a_cross_entropy(self, batch):
        module = Classifier()
        output = StepLoss()(module, batch)
        assert output.score.tolist() == (module.net(batch[0]).argmax(1) == batch[1]).float().tolist()
        torch.testing.assert_close(output.logits, module.net(batch[0]).detach())
        assert torch.equal(output.target, batch[1])

    @pytest.mark.parametrize("name", ["val/acc", "val/acc_epoch", "val/acc_step", "val/acc/dataloader_idx_0"])
    def test_logged_metric_objects(self, name, batch):
        class Metric(Classifier):
            def __init__(self):
                super().__init__()
                self.accuracy = MulticlassAccuracy(num_classes=CLASSES, average="macro")

            def validation_step(self, batch, batch_idx):
                self.accuracy(self.net(batch[0]), batch[1])
                self.log("val/acc", self.accuracy)
                return self.loss(batch)

        module = Metric()
        expected = MulticlassAccuracy(num_classes=CLASSES, average="macro")(module.net(batch[0]), batch[1])
        score = StepLoss(score=name)(module, batch).score
        torch.testing.assert_close(score.double().mean(), expected.double())

    def test_a_logged_accuracy_is_told_per_sample(self, batch):
        class Accuracy(Classifier):
            def validation_step(self, batch, batch_idx):
                self.log("val/acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())
                return self.loss(batch)

        assert StepLoss(score="val/acc")(Accuracy(), batch).score.shape == (8,)

    def test_a_value_of_the_other_step(self, batch):
        class InTraining(ReturnsLogits):
            def validation_step(self, batch, batch_idx):
                self.log("val/f1", torch.tensor(0.25))

        output = StepLoss(score="val/f1")(InTraining(), batch)
        assert output.score == 0.25

    def test_callables(self, batch):
        output = StepLoss(score=lambda module, batch: torch.arange(8.0))(Classifier(), batch)
        assert output.score.tolist() == list(range(8))

    def test_unknown_name(self, batch):
        with pytest.raises(ValueError, match=r"score='val/f1' is not logged .*logged are \['train/loss', 'val/loss'\]"):
            StepLoss(score="val/f1")(Classifier(), batch)

    def test_a_value_that_is_no_number(self, batch):
        class Vector(Classifier):
            def validation_step(self, batch, batch_idx):
                self.log("val/all", torch.ones(3))
                return self.loss(batch)

        with pytest.raises(ValueError, match=r"score='val/all' is logged with shape \(3,\)"):
            StepLoss(score="val/all")(Vector(), batch)


class TestOwnLoss:
    def test_tensor_and_step_output(self, batch):
        module = Classifier()
        assert StepLoss(loss=per_sample)(module, batch).loss.shape == (8,)
        output = StepOutput(torch.tensor(1.0), torch.tensor(0.5))
        assert StepLoss(loss=lambda m, b: output)(module, batch) is output

    def test_with_the_score_of_a_step(self, batch):
        output = StepLoss(loss=per_sample, score="val/loss")(module := Classifier(), batch)
        torch.testing.assert_close(output.score.float(), module.loss(batch).detach())


class TestTrainer:
    def test_is_lent_during_the_call(self, batch):
        class Asks(Classifier):
            def validation_step(self, batch, batch_idx):
                assert self.trainer is run
                return self.loss(batch)

        run, module = trainer(), Asks()
        StepLoss(run)(module, batch)
        assert module._trainer is None

    def test_precision(self, batch):
        class Notes(Classifier):
            def loss(self, batch):
                logits = self.net(batch[0])
                assert logits.dtype is torch.bfloat16
                return functional.cross_entropy(logits, batch[1])

        module = Notes()
        output = StepLoss(trainer(precision="bf16-mixed"))(module, batch)
        assert output.loss.dtype is torch.float32
        torch.testing.assert_close(output.loss, per_sample(module, batch), rtol=0.05, atol=0.02)


def test_the_name_of_the_score():
    def recall(module, batch):
        return torch.tensor(1.0)

    assert StepLoss().score_name == "accuracy"
    assert StepLoss(score="val/f1").score_name == "val/f1"
    assert StepLoss(score=recall).score_name == "recall"
    assert StepLoss(score=lambda module, batch: torch.tensor(1.0)).score_name == ""
    assert StepLoss(loss=recall).score_name == ""


class Noisy(Classifier):
    """Trains on inputs with noise, as a diffusion model does, in validation too."""

    def loss(self, batch):
        return functional.cross_entropy(self.net(batch[0] + torch.randn_like(batch[0])), batch[1])


def test_looking_for_the_loss_takes_no_random_numbers(batch):
    """The original, which comes first, would be measured under other noise than its compressed copies."""
    module, find = Noisy().eval(), StepLoss()
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(find(module, batch).loss)
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_rows_of_a_time_major_network_go_to_their_samples():
    class TimeMajor(LightningModule):
        """A recurrent network that takes its batch to pieces."""

        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.RNN(5, 6), nn.Linear(6, 4)

        def validation_step(self, batch, batch_idx):
            hidden, _ = self.inner(batch.pop("x").transpose(0, 1))
            return functional.cross_entropy(self.outer(hidden).flatten(0, 1), batch.pop("y").T.flatten())

    module, x, y = TimeMajor(), torch.randn(3, 7, 5), torch.randint(4, (3, 7))
    output = StepLoss()(module, {"x": x, "y": y})
    for i in range(3):
        alone = StepLoss()(module, {"x": x[i : i + 1], "y": y[i : i + 1]})
        torch.testing.assert_close(output.loss[i : i + 1], alone.loss)
        torch.testing.assert_close(output.score[i : i + 1], alone.score)
