import copy
import pickle
import threading

import lightning.pytorch as pl
import pytest
import torch
import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.compile import from_compiled
from small_modules import CLASSES, QUICK, Classifier, loader, network, trainer
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from lrf_lightning import LowRankCompression, restore_dense
from lrf_lightning.callbacks.isolation import detached_copy, undisturbed
from lrf_lightning.copies.uncompiled import UncompiledModule


def fitted(module=None, **options):
    run = trainer(max_epochs=1, **options)
    run.fit(module or Classifier(), loader(), loader(seed=1))
    return run


class TestDetachedCopy:
    def test_shares_nothing_and_has_no_trainer(self):
        module = Classifier()
        run = fitted(module)
        new = detached_copy(module)
        assert new._trainer is None
        assert module.trainer is run
        own = {p.data_ptr() for p in module.parameters()}
        assert all(p.data_ptr() not in own for p in new.parameters())
        torch.testing.assert_close(new.state_dict(), module.state_dict(), rtol=0, atol=0)

    def test_tensors_on_a_graph(self):
        module = Classifier()
        module.outputs = [module.net(torch.ones(1, 12)), {"loss": module.net[0].weight.sum()}]
        with pytest.raises(RuntimeError, match="deepcopy"):
            copy.deepcopy(module)
        new = detached_copy(module)
        assert new.outputs[0].grad_fn is None
        torch.testing.assert_close(new.outputs[1]["loss"], module.outputs[1]["loss"].detach())
        assert module.outputs[0].grad_fn is not None

    def test_attributes_that_cannot_be_copied_are_shared(self):
        class Helper:
            def __init__(self, module):
                self.module = [module]

        module = Classifier()
        module.net.lock = threading.Lock()
        module.helper = Helper(module)
        module.numbers = [1]
        new = detached_copy(module)
        assert new.net.lock is module.net.lock
        assert new.numbers == [1]
        assert new.numbers is not module.numbers
        assert new.helper.module[0] is new, "what can be copied refers to the copy"

    def test_logged_metrics_are_found_in_the_copy(self):
        class WithMetric(Classifier):
            def __init__(self):
                super().__init__()
                self.accuracy = MulticlassAccuracy(CLASSES, average="micro")

            def validation_step(self, batch, batch_idx):
                self.accuracy(self.net(batch[0]), batch[1])
                self.log("val/acc", self.accuracy)

        module = WithMetric()
        run = fitted(module)
        (dense,) = run.validate(module, loader(seed=1), verbose=False)
        assert run.validate(detached_copy(module), loader(seed=1), verbose=False) == [dense]

    def test_compiled_submodules_run_eagerly_under_the_same_names(self):
        module = Classifier()
        module.net[0] = torch.compile(module.net[0], backend="eager")
        module.net[2].compile(backend="eager")
        new = detached_copy(module)
        assert isinstance(new.net[0], UncompiledModule)
        assert new.net[2]._compiled_call_impl is None
        assert module.net[2]._compiled_call_impl is not None
        torch.testing.assert_close(new.state_dict(), module.state_dict(), rtol=0, atol=0)
        seen = []
        new.net[0]._orig_mod.register_forward_hook(lambda *_: seen.append(1))
        new.net(torch.ones(1, 12))
        assert seen == [1]

    def test_a_module_that_is_compiled_as_a_whole(self):
        module = Classifier()
        compiled = from_compiled(torch.compile(module, backend="eager"))
        assert "forward" in compiled.__dict__
        new = detached_copy(compiled)
        assert "forward" not in new.__dict__
        assert new.validation_step.__self__ is new
        torch.testing.assert_close(new.state_dict(), module.state_dict(), rtol=0, atol=0)

    def test_what_wandb_watches_is_the_original(self, monkeypatch, tmp_path):
        monkeypatch.setenv("WANDB_MODE", "offline")
        sink, module = WandbLogger(save_dir=tmp_path, offline=True), Classifier()
        sink.watch(module, log="all", log_freq=1, log_graph=False)
        hooks = [hook for child in module.modules() for hook in child._forward_hooks.values()]
        assert hooks
        module.net[0].register_forward_hook(lambda *_: None)
        copies = [hook for child in detached_copy(module).modules() for hook in child._forward_hooks.values()]
        assert len(copies) == 1, "the user's own"
        wandb.finish()


class OwnCopy(nn.Linear):
    """A layer that copies itself in its own way."""

    def __deepcopy__(self, memo):
        new = OwnCopy(self.in_features, self.out_features)
        new.load_state_dict(self.state_dict())
        return new


class TestUncompiledModule:
    def test_looks_like_the_module_and_survives_copies(self):
        module = UncompiledModule(OwnCopy(3, 2))
        assert (module.in_features, list(module.state_dict())) == (3, ["_orig_mod.weight", "_orig_mod.bias"])
        with pytest.raises(AttributeError, match="missing"):
            _ = module.missing
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert type(twin) is UncompiledModule
            torch.testing.assert_close(twin(torch.ones(1, 3)), module(torch.ones(1, 3)))


class TestUndisturbed:
    def test_everything_is_restored_after_an_exception(self):
        run = fitted()
        logger, metrics, random = list(run.loggers), dict(run.callback_metrics), torch.get_rng_state()
        assert metrics
        with pytest.raises(RuntimeError, match="stop"), undisturbed(run):  # noqa: PT012
            assert run.validating
            torch.rand(3)
            torch.set_default_dtype(torch.float64)
            torch.backends.cudnn.benchmark = True
            torch.use_deterministic_algorithms(True)
            run.callback_metrics["val/loss"] = torch.tensor(7.0)
            run.callback_metrics["more"] = torch.tensor(7.0)
            raise RuntimeError("stop")
        assert torch.equal(torch.get_rng_state(), random)
        assert torch.get_default_dtype() is torch.float32
        assert not torch.backends.cudnn.benchmark
        assert not torch.are_deterministic_algorithms_enabled()
        assert run.callback_metrics == metrics
        assert run.loggers == logger
        assert not run.validating

    def test_operations_without_a_deterministic_version_warn_meanwhile(self):
        run = fitted()
        torch.use_deterministic_algorithms(True)
        try:
            with undisturbed(run):
                assert torch.is_deterministic_algorithms_warn_only_enabled()
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        finally:
            torch.use_deterministic_algorithms(False)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
    def test_gradients_are_on(self, mode):
        run = fitted()
        with mode(), undisturbed(run):
            assert network()(torch.ones(1, 12)).requires_grad


def test_loggers_are_silent():
    class Recorder(pl.loggers.logger.DummyLogger):
        rows = 0

        def log_metrics(self, metrics, step=None):
            self.rows += 1

    recorder = Recorder()
    run = fitted(logger=recorder)
    rows = recorder.rows
    with undisturbed(run):
        run.logger.log_metrics({"a": 1.0})
        run.logger.experiment.add_scalar("a", 1.0)
    assert recorder.rows == rows
    run.logger.log_metrics({"a": 1.0})
    assert recorder.rows == rows + 1


@pytest.mark.parametrize("bound", [True, False], ids=["method", "closure"])
def test_a_loss_of_features_that_a_hook_collects(bound):
    class WithFeatures(Classifier):
        def __init__(self):
            super().__init__()
            self.features = {}
            collect = self.collect if bound else lambda m, args, output: self.features.update(hidden=output)
            self.net[2].register_forward_hook(collect)

        def collect(self, module, args, output):
            self.features["hidden"] = output

        def loss(self, batch):
            return super().loss(batch) + 0.1 * self.features.pop("hidden").abs().mean()

    module = WithFeatures()
    options = {"objective": "budget", "keep": 0.4, "save": False, "strict": True, "in_place": True, **QUICK}
    compression = LowRankCompression(loss=lambda net, batch: net.loss(batch), **options)
    fitted(module, callbacks=[compression])
    model = compression.result.model
    assert "net.2" in compression.result.ranks
    assert module.features == {}, "every call of the solver was about a copy"
    for net in (model, restore_dense(model), module):
        (hook,) = net.net[2]._forward_hooks.values()
        owner = hook.__self__ if bound else hook.__closure__[0].cell_contents
        assert owner is net
        assert torch.isfinite(net.loss(next(iter(loader(seed=2)))))
