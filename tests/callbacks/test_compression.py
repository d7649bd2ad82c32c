import copy
import dataclasses
import pickle
import random
import re
import warnings
from collections import OrderedDict

import fsspec
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, StochasticWeightAveraging
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from small_modules import CLASSES, FEATURES, QUICK, Classifier, clouds, loader, network, trainer
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lrf_lightning import LowRankCompression, StepOutput, load_compressed, safe_files
from lrf_lightning.callbacks import tracking
from lrf_lightning.export import files as export
from lrf_lightning.modules import LowRankModule


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch):
    """Drawing takes longer than everything else here, and has its own tests."""
    monkeypatch.setattr(tracking, "_draw_pictures", lambda *_: {})


def compression(**options):
    return LowRankCompression(**(QUICK | {"save": False, "strict": True, "objective": "budget"} | options))


def observable_state(trainer, module):
    """Everything that a callback may not change."""
    return {
        "tensors": {
            "random state": torch.get_rng_state(),
            **{name: value.clone() for name, value in module.state_dict().items()},
        },
        "requires_grad": {name: p.requires_grad for name, p in module.named_parameters()},
        "grads": {name: p.grad is None for name, p in module.named_parameters()},
        "training": {name: m.training for name, m in module.named_modules()},
        "types": {name: type(m) for name, m in module.named_modules()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in module.named_modules()},
        "attributes": sorted(module.__dict__),
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith("compress/")},
        "trainer": (trainer.state.fn, trainer.state.stage, trainer.global_step, list(trainer.loggers)),
        "trainer of the module": module._trainer,
        "random": (random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]),
        "flags": (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
            torch.get_default_dtype(),
            torch.get_float32_matmul_precision(),
        ),
    }


class Witness(pl.Callback):
    """Notes the observable state in ``on_fit_end``; one stands before the compression and one behind it."""

    def __init__(self):
        self.states = []

    @property
    def state_key(self):
        return f"Witness{id(self)}"

    def on_fit_end(self, trainer, pl_module):
        self.states.append(observable_state(trainer, pl_module))


def fit(module, callback, *, train=None, val=None, callbacks=(), datamodule=None, **options):
    """Fit with the callback, and check that it left everything as it was."""
    before, after = Witness(), Witness()
    run = trainer(callbacks=[*callbacks, before, callback, after], **options)
    if datamodule is None:
        run.fit(module, train or loader(), val)
    else:
        run.fit(module, datamodule=datamodule)
    (first,), (second,) = before.states, after.states
    torch.testing.assert_close(second.pop("tensors"), first.pop("tensors"), rtol=0, atol=0, equal_nan=True)
    assert second == first
    return run


def assert_coherent(result, module):
    """A result that fits the trained module: smaller, finite, and with measured numbers that can be repeated."""
    assert result.ranks, result.message
    assert result.params_model[0] == sum(p.numel() for p in module.parameters())
    assert result.params_model[1] == sum(p.numel() for p in result.model.parameters())
    assert result.params_model[1] < result.params_model[0]
    for name, rank in result.ranks.items():
        assert result.model.get_submodule(name).rank == rank
    certificate = result.certificate
    assert certificate.dense.samples > 0
    assert all(np.isfinite([certificate.dense.loss, certificate.compressed.loss, certificate.loss_change.mean]))
    torch.testing.assert_close(certificate.loss_change.mean, certificate.compressed.loss - certificate.dense.loss)


class ReturnsNothing(Classifier):
    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch), prog_bar=True)


class ReturnsDict(Classifier):
    def training_step(self, batch, batch_idx):
        return {"loss": self.loss(batch), "more": torch.zeros(3)}

    validation_step = training_step


class OnlyTrains(Classifier):
    validation_step = pl.LightningModule.validation_step


class ManualOptimization(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class LogsMetricObjects(Classifier):
    def __init__(self):
        super().__init__()
        self.accuracy = MulticlassAccuracy(num_classes=CLASSES, average="micro")
        self.outputs = []

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        self.accuracy(logits, y)
        self.outputs.append(logits)
        self.log("val/acc", self.accuracy)
        self.log_dict({"val/loss": functional.cross_entropy(logits, y)}, sync_dist=True)

    def on_validation_epoch_end(self):
        self.outputs.clear()


class Regression(Classifier):
    def loss(self, batch):
        x, y = batch
        return functional.mse_loss(self.net(x)[:, 0], y.float())


class Frozen(Classifier):
    def __init__(self):
        super().__init__()
        self.net[0].requires_grad_(False)
        self.net[2].weight.requires_grad_(False)

    def on_train_start(self):
        self.net[0].eval()


class CompiledPart(Classifier):
    def __init__(self):
        super().__init__()
        self.net = torch.compile(network(), backend="eager")


class Segmentation(Classifier):
    """Per-pixel classes of 4 x 3 images."""

    def __init__(self):
        super().__init__(
            nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU())
        )
        self.head = nn.Conv2d(12, 2, 1)

    def loss(self, batch):
        images = batch[0].reshape(-1, 1, 4, 3)
        return functional.cross_entropy(self.head(self.net(images)), (images[:, 0] > 0).long())


class ModelOutput(OrderedDict):
    """Like those of transformers: a mapping whose values are attributes as well."""

    __getattr__ = OrderedDict.__getitem__


class HuggingFaceStyle(Classifier):
    def forward(self, inputs, labels, names=None):
        logits = self.net(inputs)
        return ModelOutput(loss=functional.cross_entropy(logits, labels), logits=logits)

    def training_step(self, batch, batch_idx):
        return self(**batch).loss

    def validation_step(self, batch, batch_idx):
        output = self(**batch)
        self.log("val_loss", output.loss)
        return output


@dataclasses.dataclass
class Sample:
    x: torch.Tensor
    y: torch.Tensor
    name: str = "batch"


class DataclassBatches(Classifier):
    def loss(self, batch):
        return super().loss((batch.x, batch.y))


def as_dict(items):
    return {
        "names": [f"sample {i}" for i in range(len(items))],
        "inputs": torch.stack([x for x, _ in items]),
        "labels": torch.stack([y for _, y in items]),
    }


def as_dataclass(items):
    return Sample(torch.stack([x for x, _ in items]), torch.stack([y for _, y in items]))


class Attentive(torch.nn.Module):
    """Attention over the features, whose projections are no modules of their own before they are factorized."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Linear(1, 16)
        self.attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = torch.nn.Linear(16, 4)

    def forward(self, x):
        tokens = self.embed(x[..., None])
        return self.head(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))


class TestProjects:
    """Whatever the module and its data look like, it is compressed and nothing else changes."""

    @pytest.mark.parametrize(
        "kind",
        [
            Classifier,
            ReturnsNothing,
            ReturnsDict,
            LogsMetricObjects,
            ManualOptimization,
            Regression,
            Frozen,
            CompiledPart,
            Segmentation,
        ],
    )
    def test_modules(self, kind):
        module, callback = kind(), compression()
        fit(module, callback, val=loader(seed=1))
        assert_coherent(callback.result, module)
        assert callback.result.certificate.loss_change.pairs == callback.result.certificate.dense.samples, (
            "pairs are samples"
        )

    @pytest.mark.parametrize(
        ("kind", "collate"), [(HuggingFaceStyle, as_dict), (DataclassBatches, as_dataclass)], ids=["dict", "dataclass"]
    )
    def test_batches(self, kind, collate):
        module, callback = kind(), compression()
        fit(module, callback, train=loader(collate_fn=collate), val=loader(seed=1, collate_fn=collate))
        assert_coherent(callback.result, module)

    def test_batches_of_one_sample(self):
        module, callback = Classifier(), compression()
        fit(module, callback, val=loader(24, seed=1, batch_size=1))
        assert_coherent(callback.result, module)

    def test_training_step_alone_with_explicit_loaders(self):
        module = OnlyTrains()
        callback = compression(calibration=loader(seed=1), selection=loader(seed=2), verification=loader(seed=3))
        fit(module, callback)
        assert_coherent(callback.result, module)
        assert callback.result.samples == {"calibration": 96, "selection": 96, "verification": 96}

    def test_several_validation_loaders(self):
        class TwoLoaders(Classifier):
            def validation_step(self, batch, batch_idx, dataloader_idx):
                self.log("val/loss", self.loss(batch))

        module, callback = TwoLoaders(), compression()
        fit(module, callback, val=[loader(40, seed=1), loader(seed=2)])
        assert sum(callback.result.samples.values()) == 40, "the first of the two is split"

    def test_boring_model(self):
        module, callback = BoringModel(), compression(keep=0.6)
        fit(module, callback, train=module.train_dataloader(), val=module.val_dataloader())
        assert_coherent(callback.result, module)

    def test_loaders_of_the_datamodule_by_name(self):
        class Data(pl.LightningDataModule):
            def train_dataloader(self):
                return loader()

            def val_dataloader(self):
                return loader(seed=1)

            def calibration_dataloader(self):
                return loader(32, seed=2)

            def held_out(self):
                return loader(30, seed=3)

        module, callback = Classifier(), compression(selection="held_out")
        fit(module, callback, datamodule=Data())
        assert callback.result.samples == {"calibration": 32, "selection": 30, "verification": 96}

    def test_loss_and_score_from_arguments(self):
        def loss(module, batch):
            x, y = batch
            logits = module.net(x)
            return StepOutput(functional.cross_entropy(logits, y, reduction="none", label_smoothing=0.1))

        def score(module, batch):
            return (module.net(batch[0]).argmax(1) == batch[1]).float()

        module, callback = Classifier(), compression(loss=loss, score=score)
        fit(module, callback, val=loader(seed=1))
        assert_coherent(callback.result, module)
        assert callback.result.dense.score > 0.5

    def test_nothing_can_be_factorized(self):
        class Tiny(Classifier):
            def __init__(self):
                super().__init__(nn.Linear(FEATURES, 1))

            def loss(self, batch):
                return functional.mse_loss(self.net(batch[0])[:, 0], batch[1].float())

        callback = compression()
        with pytest.warns(UserWarning, match=r"no layer of Tiny that can be factorized \(net: no rank saves"):
            fit(Tiny(), callback, val=loader(seed=1))
        assert callback.result.ranks == {}
        assert callback.result.certificate.verdict == "unchanged"
        assert "No layer can be factorized" in callback.result.message


class TestTrainers:
    """Whatever the Trainer's options are, the same holds."""

    @pytest.mark.parametrize(
        "options",
        [
            {"fast_dev_run": True},
            {"fast_dev_run": 3},
            {"limit_val_batches": 2},
            {"limit_val_batches": 0.5},
            {"limit_val_batches": 0},
            {"barebones": True, "logger": None, "enable_checkpointing": None},
            {"inference_mode": False},
            {"precision": "bf16-mixed"},
            {"precision": "bf16-true"},
            {"precision": "64-true"},
            {"enable_progress_bar": True},
            {"enable_progress_bar": True, "callbacks": [RichProgressBar()]},
            {"logger": True},
            {"callbacks": [StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)]},
            {"num_sanity_val_steps": 0, "check_val_every_n_epoch": 5},
            {"deterministic": True},
            {"max_epochs": 0},
            {"overfit_batches": 2},
            {"reload_dataloaders_every_n_epochs": 1},
        ],
        ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items())[:40],
    )
    def test_options(self, options):
        module, callback = Classifier(), compression()
        try:
            fit(module, callback, val=loader(seed=1), **options)
        finally:
            torch.use_deterministic_algorithms(False)
        assert_coherent(callback.result, module)

    def test_averaged_weights(self):
        callbacks = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")
        module, callback = Classifier(), compression()
        fit(module, callback, val=loader(seed=1), callbacks=[callbacks.EMAWeightAveraging(decay=0.5)])
        assert_coherent(callback.result, module)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
    def test_called_without_gradients(self, mode):
        class Late(pl.Callback):
            def on_fit_end(self, trainer, pl_module):
                with mode():
                    callback.on_fit_end(trainer, pl_module)
                    assert not torch.is_grad_enabled()
                    assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)

        module, callback = Classifier(), compression()
        trainer(callbacks=[Late()]).fit(module, loader(), loader(seed=1))
        assert_coherent(callback.result, module)
        assert not any(p.is_inference() for p in callback.result.model.parameters())

    def test_nothing_is_logged_by_the_module_meanwhile(self):
        class Chatty(Classifier):
            def validation_step(self, batch, batch_idx):
                self.log("val/loss", loss := self.loss(batch), logger=True, on_step=True)
                self.logger.log_metrics({"direct": 1.0})
                if self.logger.experiment is not None:
                    self.logger.experiment.add_scalar("more", 1.0)
                assert self.trainer.validating or self.trainer.sanity_checking
                return loss

        class Recorder(DummyLogger):
            def __init__(self):
                super().__init__()
                self.rows = []

            def log_metrics(self, metrics, step=None):
                self.rows.append(metrics)

        recorder = Recorder()
        rows = []

        class Count(pl.Callback):
            def on_fit_end(self, trainer, pl_module):
                rows.append(len(recorder.rows))

        callback = compression()
        run = trainer(callbacks=[Count(), callback, Count()], logger=recorder)
        run.fit(Chatty(), loader(), loader(seed=1))
        assert rows[0] > 0
        assert not any("direct" in row for row in recorder.rows[rows[0] :])


class TestLifecycle:
    def test_fit_twice_and_pickle(self):
        module, callback = Classifier(), compression()
        empty = pickle.loads(pickle.dumps(callback))
        assert (empty.settings, empty.result) == (callback.settings, None)
        for _ in range(2):
            trainer(callbacks=[callback]).fit(module, loader(), loader(seed=1))
            assert_coherent(callback.result, module)
        for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
            assert twin.result.ranks == callback.result.ranks
            torch.testing.assert_close(twin.result.model.state_dict(), callback.result.model.state_dict())

    def test_same_seed_same_result(self):
        module, first, second = Classifier(), compression(), compression()
        trainer(callbacks=[first, second]).fit(module, loader(), loader(seed=1))
        assert first.result.ranks == second.result.ranks
        torch.testing.assert_close(first.result.model.state_dict(), second.result.model.state_dict(), rtol=0, atol=0)

    def test_state_is_empty(self):
        assert compression().state_dict() == {}, "two of them may stand in one trainer, and checkpoints stay small"

    def test_result_is_measured_on_the_validation_data(self):
        module, callback = Classifier(), compression()
        trainer(callbacks=[callback]).fit(module, loader(), loader(seed=1))
        x, y = clouds(seed=1)
        with torch.no_grad():
            losses = functional.cross_entropy(module.net(x), y, reduction="none").double()
        dense, certificate = callback.result.dense, callback.result.certificate
        # 38 of the 96 samples calibrate, so their loss is what the other two splits leave
        rest = losses.sum() - dense.loss * dense.samples - certificate.dense.loss * certificate.dense.samples
        assert (dense.samples, certificate.dense.samples) == (29, 29)
        assert losses.sort().values[:38].sum() - 1e-5 <= rest <= losses.sort().values[-38:].sum() + 1e-5

    def test_best_weights(self, tmp_path):
        checkpoint = ModelCheckpoint(tmp_path, monitor="val/loss", filename="best")

        class GetsWorse(Classifier):
            def on_train_epoch_end(self):
                if self.current_epoch == 1:
                    with torch.no_grad():
                        self.net[4].weight.neg_()

        module = GetsWorse()
        verification = loader(40, seed=5)
        callback = compression(weights="best", verification=verification)
        fit(module, callback, val=loader(seed=1), callbacks=[checkpoint], enable_checkpointing=True, max_epochs=3)
        best = Classifier()
        best.load_state_dict(torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"])
        x, y = clouds(40, seed=5)
        expected = functional.cross_entropy(best.net(x), y)
        torch.testing.assert_close(callback.result.certificate.dense.loss, expected.item(), rtol=1e-5, atol=1e-6)

    def test_in_place(self):
        module, callback = Classifier(), compression(in_place=True)
        module.net[0].requires_grad_(False)
        run = trainer(callbacks=[callback])
        run.fit(module, loader(), loader(seed=1))
        assert callback.result.ranks
        for name in callback.result.ranks:
            live, kept = module.get_submodule(name), callback.result.model.get_submodule(name)
            assert isinstance(live, LowRankModule)
            assert live is not kept
            assert live.left_factor.requires_grad == (name != "net.0")
        x, _ = clouds()
        torch.testing.assert_close(module.net(x), callback.result.model.net(x), rtol=0, atol=0)
        assert module.net.training

    def test_in_place_inside_attention(self):
        module, callback = Classifier(Attentive()), compression(in_place=True, keep=0.4, objective="budget")
        trainer(callbacks=[callback]).fit(module, loader(), loader(seed=1))
        assert any(name.startswith("net.attention.") for name in callback.result.ranks)
        assert isinstance(module.get_submodule(next(iter(callback.result.ranks))), LowRankModule)
        x, _ = clouds()
        torch.testing.assert_close(module.eval().net(x), callback.result.model.eval().net(x), rtol=0, atol=0)

    def test_in_place_twice_leaves_low_rank_layers_alone(self):
        module = Classifier()
        for callback in (compression(in_place=True), compression(in_place=True)):
            trainer(callbacks=[callback]).fit(module, loader(), loader(seed=1))
        reasons = {layer.name: layer.reason for layer in callback.result.layers}
        assert "is low-rank already" in reasons.values()

    def test_validate_and_test_do_not_compress(self):
        module, callback = Classifier(), compression()
        run = trainer(callbacks=[callback])
        run.validate(module, loader(seed=1), verbose=False)
        run.test(module, loader(seed=1), verbose=False)
        assert callback.result is None
        assert "compress/failed" not in run.callback_metrics


class TestFiles:
    """What is written can be taken up again; the formats have their own tests."""

    def test_test_the_best_checkpoint_after_replacement_in_place(self, tmp_path):
        module, checkpoint = Classifier(), ModelCheckpoint(tmp_path / "checkpoints")
        callback = compression(save=True, in_place=True, dirpath=tmp_path / "compressed")
        run = trainer(callbacks=[checkpoint, callback], enable_checkpointing=True)
        run.fit(module, loader(), loader(seed=1))
        before = run.test(module, loader(seed=3), verbose=False)[0]["test/loss"]
        best = run.test(dataloaders=loader(seed=3), ckpt_path="best", verbose=False)[0]["test/loss"]
        assert not any(isinstance(m, LowRankModule) for m in module.modules()), "the best checkpoint is dense"
        file = str(tmp_path / "compressed" / "compressed.ckpt")
        after = run.test(dataloaders=loader(seed=3), ckpt_path=file, verbose=False)[0]["test/loss"]
        assert any(isinstance(m, LowRankModule) for m in module.modules())
        assert (after == before, best == before) == (True, False)

    def test_resume_from_what_was_saved_after_replacement_in_place(self, tmp_path):
        module, callback = Classifier(), compression(in_place=True)
        run = trainer(callbacks=[callback])
        run.fit(module, loader(), loader(seed=1))
        (untouched,) = (name for name in ("net.0", "net.2", "net.4") if name not in callback.result.ranks)
        moment = run.optimizers[0].state[module.get_submodule(untouched).weight]["exp_avg"].clone()
        run.save_checkpoint(tmp_path / "last.ckpt")

        class Resumed(Classifier):
            def on_train_start(self):
                states = self.optimizers().state
                names = {weight: name for name, weight in self.named_parameters()}
                self.moments = {names[weight]: state["exp_avg"].clone() for weight, state in states.items()}

        resumed = Resumed()
        again = trainer(callbacks=[compression()], max_epochs=3)
        again.fit(resumed, loader(), loader(seed=1), ckpt_path=tmp_path / "last.ckpt")
        assert again.current_epoch == 3
        assert callback.result.ranks.keys() == {
            name for name, part in resumed.named_modules() if isinstance(part, LowRankModule)
        }
        torch.testing.assert_close(resumed.moments[f"{untouched}.weight"], moment)
        assert not any("factor" in name for name in resumed.moments)

    def test_folder_is_loaded_into_a_new_module(self, tmp_path):
        callback = compression(save=True, dirpath=tmp_path)
        trainer(callbacks=[callback]).fit(CompiledPart(), loader(), loader(seed=1))
        x, _ = clouds()
        loaded = load_compressed(CompiledPart(), tmp_path)
        with torch.no_grad():
            torch.testing.assert_close(loaded.eval().net(x), callback.result.model.net(x), rtol=0, atol=0)

    def test_fast_dev_run_leaves_no_files(self, tmp_path):
        callback = compression(save=True)
        trainer(callbacks=[callback], fast_dev_run=True).fit(Classifier(), loader(), loader(seed=1))
        assert callback.result.ranks
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []

    def test_default_folder_lies_beside_the_logs(self, tmp_path):
        callback = compression(save=True)
        trainer(callbacks=[callback], logger=CSVLogger(tmp_path)).fit(Classifier(), loader(), loader(seed=1))
        assert (tmp_path / "lightning_logs" / "version_0" / "compressed" / "model.safetensors").is_file()

    def test_every_budget_is_written(self, tmp_path):
        module = Classifier()
        options = {"objective": "frontier", "budgets": [0.5, 0.3], "save": True}
        callback = compression(**options, dirpath=tmp_path / "all")
        fit(module, callback, val=loader(seed=1))
        result = callback.result
        assert result.score_name == "accuracy"
        assert {path.name for path in (tmp_path / "all" / "points").iterdir()} == {"keep_50", "keep_30"}
        loaded = load_compressed(Classifier(), tmp_path / "all" / "points" / "keep_30")
        torch.testing.assert_close(loaded.state_dict(), result.at(0.3).model.state_dict(), rtol=0, atol=0)
        fit(Classifier(), compression(**options, save_points=False, dirpath=tmp_path / "one"), val=loader(seed=1))
        assert not (tmp_path / "one" / "points").exists()

    @pytest.mark.parametrize("where", ["dirpath", "default_root_dir"])
    def test_remote_folder(self, where, tmp_path):
        options = {where: "memory://bucket/run"}
        callback = compression(save=True, **(options if where == "dirpath" else {}))
        run = trainer(callbacks=[callback], **(options if where == "default_root_dir" else {}))
        try:
            run.fit(Classifier(), loader(), loader(seed=1))
            url = "memory://bucket/run" + ("" if where == "dirpath" else "/compressed")
            for path in (url, f"{url}/compressed.ckpt"):
                loaded = load_compressed(Classifier(), path)
                torch.testing.assert_close(loaded.state_dict(), callback.result.model.state_dict(), rtol=0, atol=0)
            assert fsspec.filesystem("memory").isfile(f"{url}/summary.csv")
            fresh = Classifier()
            trainer(callbacks=[compression()]).test(fresh, loader(), ckpt_path=f"{url}/compressed.ckpt", verbose=False)
            torch.testing.assert_close(fresh.state_dict(), callback.result.model.state_dict(), rtol=0, atol=0)
        finally:
            fsspec.filesystem("memory").rm("/bucket", recursive=True)
        assert {path.name for path in tmp_path.iterdir()} <= {".wandb"}

    def test_a_remote_folder_that_cannot_be_written_is_a_warning(self, monkeypatch):
        def failing(path, content):
            raise PermissionError(13, "Access denied")

        monkeypatch.setattr(safe_files, "write_bytes", lambda path, content: failing(path, content))
        callback = compression(dirpath="memory://bucket/run", strict=False)
        with pytest.warns(UserWarning, match=r"could not copy the files to memory://bucket/run .*Access denied.*kept"):
            run = fit(Classifier(), callback, val=loader(seed=1))
        assert callback.result is not None
        assert run.callback_metrics["compress/failed"] == 0

    def test_export(self, tmp_path, capsys):
        class Called(Classifier):
            def forward(self, x):
                return self.net(x)

        callback = compression(dirpath=tmp_path / "out", export=["pt2"])
        run = fit(Called(), callback, val=loader(seed=1))
        program = torch.export.load(tmp_path / "out" / "model.pt2").module()
        x, _ = clouds(7)
        torch.testing.assert_close(program(x), callback.result.model.eval()(x), rtol=0, atol=1e-4)
        size = (tmp_path / "out" / "model.pt2").stat().st_size
        assert run.callback_metrics["compress/pt2_bytes"] == size
        assert run.callback_metrics["compress/pt2_bytes_dense"] != size
        assert "Exported model.pt2: 0.0" in capsys.readouterr().out

    def test_an_export_that_fails_is_a_warning(self, tmp_path):
        callback = compression(dirpath=tmp_path, export=["pt2"], save=True, strict=False)
        with pytest.warns(UserWarning, match=r"could not export pt2 \(ExportError: Classifier cannot be exported"):
            run = fit(Classifier(), callback, val=loader(seed=1))  # has no forward
        assert run.callback_metrics["compress/failed"] == 0
        assert "compress/pt2_bytes" not in run.callback_metrics
        loaded = load_compressed(Classifier(), tmp_path)
        torch.testing.assert_close(loaded.state_dict(), callback.result.model.state_dict(), rtol=0, atol=0)
        assert (tmp_path / "summary.csv").is_file()


class Diverges(Classifier):
    """Its loss overflows in validation."""

    def validation_step(self, batch, batch_idx):
        return self.loss(batch) * torch.inf


class TestFailures:
    """Whatever fails, the trained model and its checkpoints stay, and the fit ends as it does without the callback."""

    def run(self, callback, tmp_path, module=None):
        module, checkpoint, later = module or Classifier(), ModelCheckpoint(tmp_path / "checkpoints"), Witness()
        run = trainer(callbacks=[checkpoint, callback, later], enable_checkpointing=True)
        run.fit(module, loader(), loader(seed=1))
        assert len(later.states) == 1, "later callbacks still run"
        assert run.state.finished
        saved = torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"]
        torch.testing.assert_close(dict(module.state_dict()), dict(saved), rtol=0, atol=0)
        return run

    def test_a_failure_is_reported(self, tmp_path):
        callback = compression(strict=False)
        with pytest.warns(UserWarning, match=r"failed \(ValueError: .*finite.*the trained model and its checkpoints"):
            run = self.run(callback, tmp_path, Diverges())
        assert callback.result is None
        assert run.callback_metrics["compress/failed"] == 1
        assert run.test(dataloaders=loader(), ckpt_path="best", verbose=False)[0]["test/loss"] > 0

    def test_success_is_reported(self, tmp_path):
        assert self.run(compression(), tmp_path).callback_metrics["compress/failed"] == 0

    def test_strict_raises(self):
        callback = compression(strict=True)
        module = Diverges()
        with pytest.raises(ValueError, match="finite"):
            fit(module, callback, val=loader(seed=1))
        assert module.net[0].weight.isfinite().all()

    def test_an_interrupted_solve_ends_the_fit_normally(self, tmp_path):
        def loss(module, batch):
            raise KeyboardInterrupt

        callback = compression(strict=False, loss=loss)
        with pytest.warns(UserWarning, match="was interrupted; the trained model and its checkpoints are untouched"):
            self.run(callback, tmp_path)
        assert callback.result is None

    def test_a_fit_that_fails_leaves_no_old_result(self):
        class Stops(Classifier):
            def on_train_epoch_end(self):
                if callback.settings.seed == 0 and len(runs) == 2:
                    raise RuntimeError("stop")

        runs, module, callback = [], Stops(), compression()
        runs.append(trainer(callbacks=[callback]))
        runs[0].fit(module, loader(), loader(seed=1))
        assert callback.result is not None
        runs.append(trainer(callbacks=[callback]))
        with pytest.raises(RuntimeError, match="stop"):
            runs[1].fit(module, loader(), loader(seed=1))
        assert callback.result is None

    def test_nan_weights(self, tmp_path):
        class Breaks(Classifier):
            def on_train_end(self):
                with torch.no_grad():
                    self.net[2].weight[0, 0] = torch.nan

        callback = compression(strict=False)
        with pytest.warns(UserWarning, match=r"weights of 'net\.2\.weight' hold NaN or infinite values"):
            trainer(callbacks=[callback]).fit(Breaks(), loader(), loader(seed=1))

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (torch.zeros(2, 2), r"loss has shape \(2, 2\) for a batch of 16 samples"),
            ("a word", "loss returned str"),
            (torch.tensor(torch.nan), "loss of the original model on selection is nan"),
        ],
    )
    def test_losses_of_the_wrong_kind(self, value, message):
        callback = compression(strict=False, loss=lambda module, batch: value)
        with pytest.warns(UserWarning, match=message):
            trainer(callbacks=[callback]).fit(Classifier(), loader(), loader(seed=1))

    def test_a_module_without_a_loss(self):
        class NoLoss(ManualOptimization):
            def validation_step(self, batch, batch_idx):
                self.log("val/acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

        callback = compression(strict=False)
        with pytest.warns(UserWarning, match=r"no step of NoLoss gives a .* loss.*or pass loss="):
            trainer(callbacks=[callback]).fit(NoLoss(), loader(), loader(seed=1))

    def test_a_loader_that_turns_out_empty(self):
        class Data(pl.LightningDataModule):
            def train_dataloader(self):
                return loader()

            val_dataloader = train_dataloader

            def verification_dataloader(self):
                return DataLoader([], batch_size=4)

        callback = compression(strict=False)
        with pytest.warns(UserWarning, match="verification holds no batch"):
            trainer(callbacks=[callback]).fit(Classifier(), datamodule=Data())

    def test_a_folder_that_vanishes(self, tmp_path):
        folder = tmp_path / "compressed"

        class Blocks(pl.Callback):
            def on_train_end(self, trainer, pl_module):
                folder.rmdir()
                folder.write_text("a file")

        callback = compression(strict=False, save=True, dirpath=folder)
        with pytest.warns(UserWarning, match="could not write the compressed model .*kept in the callback's attribute"):
            trainer(callbacks=[Blocks(), callback]).fit(Classifier(), loader(), loader(seed=1))
        assert callback.result.ranks
        assert folder.read_text() == "a file"


class Popped:
    """A batch of a class of the user's, without a method to move it."""

    def __init__(self, items):
        self.items = dict(items)
        self.batch_size = len(self.items["y"])

    def __getitem__(self, name):
        return self.items[name]

    def pop(self, name):
        return self.items.pop(name)


def stacked(rows):
    return [torch.stack(column) for column in zip(*rows, strict=True)]


class TestBadArguments:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"objective": "loseless"}, "objective='loseless' is unknown, .*did you mean 'lossless'"),
            ({"objective": None}, "objective=None is unknown"),
            ({"metric": "Fischer"}, "metric='Fischer' is unknown.*did you mean 'fisher'"),
            ({"keep": 0}, r"keep=0 is not a number in \(0, 1\]"),
            ({"keep": 1.5}, r"keep=1.5 is not a number in \(0, 1\]"),
            ({"keep": "half"}, "keep='half' is not a number"),
            ({"cost": "speed"}, "cost='speed' is unknown"),
            ({"points": 1}, "points=1 is not a whole number of at least 2"),
            ({"weights": "bst"}, "weights='bst' is unknown.*did you mean 'best'"),
            ({"loss": 3}, "loss=3 is no callable"),
            ({"score": 3}, "score=3 is neither a callable"),
            ({"selection": 3}, "selection=3 is no loader"),
            ({"dirpath": 3}, "dirpath=3 is no path"),
            ({"dirpath": "nowhere://x"}, "dirpath='nowhere://x' cannot be used: Protocol not known: nowhere"),
            ({"export": "onx"}, "export='onx' is no list of formats; allowed are 'onnx', 'pt2'"),
            ({"export": ["pt2", 3]}, "is no list of formats"),
            ({"include": 3}, "include=3 is not a list of patterns"),
            ({"cache_dir": 5}, "cache_dir=5 is no path"),
            ({"probes": "no"}, "probes='no' is neither True nor False"),
            *(
                ({name: value}, f"{name}={value!r} is neither True nor False; give one of them")
                for name in ("in_place", "save", "save_points", "log_artifact", "strict")
                for value in ("no", 1, None)
            ),
        ],
    )
    def test_construction(self, options, message):
        with pytest.raises(MisconfigurationException, match=message):
            LowRankCompression(**options)

    def test_packages_for_an_export(self, monkeypatch):
        monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(MisconfigurationException, match=r"export='onnx' needs onnx, .*lrf_lightning\[export\]"):
            LowRankCompression(export="onnx")
        assert LowRankCompression(export=["pt2", "pt2"]).export == ("pt2",)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "there is no data for calibration"),
            ({"calibration": "clibration"}, "calibration='clibration' is no method of Counting"),
            ({"selection": DataLoader([], batch_size=2)}, "there is no data for calibration"),
            ({"calibration": DataLoader([], batch_size=2)}, "calibration holds no batch"),
            ({"calibration": []}, "calibration holds no batch"),
        ],
    )
    def test_missing_and_empty_loaders_before_training(self, options, message):
        self.assert_refused(compression(**options), message)

    def test_empty_validation_data_before_training(self):
        self.assert_refused(compression(), "validation data", val=DataLoader([], batch_size=2))

    def test_patterns_before_training(self):
        self.assert_refused(compression(include="head.*"), r"include='head\.\*' matches no module", val=loader(seed=1))

    def test_best_weights_without_checkpoints_before_training(self):
        self.assert_refused(compression(weights="best"), "needs a ModelCheckpoint", val=loader(seed=1))

    def test_unwritable_folder_before_training(self, tmp_path):
        (tmp_path / "file").touch()
        callback = compression(save=True, dirpath=tmp_path / "file" / "folder")
        self.assert_refused(callback, "dirpath=.* cannot be written.*or save=False", val=loader(seed=1))

    def test_one_folder_for_two_callbacks_before_training(self, tmp_path):
        twin = compression(save=True, dirpath=tmp_path)
        callback = compression(save=True, dirpath=tmp_path)
        self.assert_refused(callback, "two LowRankCompression callbacks write into", val=loader(seed=1), also=[twin])

    def assert_refused(self, callback, message, *, val=None, also=()):
        class Counting(Classifier):
            steps = 0

            def training_step(self, batch, batch_idx):
                self.steps += 1
                return super().training_step(batch, batch_idx)

        module = Counting()
        with pytest.raises(MisconfigurationException, match=message):
            trainer(callbacks=[callback, *also], num_sanity_val_steps=0).fit(module, loader(), val)
        assert module.steps == 0

    def told_in_the_sanity_check(self, module, callback, message):
        class Starts(pl.Callback):
            def on_train_start(self, trainer, pl_module):
                trainer.should_stop = True
                self.seen = [str(warning.message) for warning in caught]

        starts = Starts()
        run = trainer(callbacks=[callback, starts], max_steps=1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                run.fit(module, loader(), loader(seed=1))
            except ValueError:  # strict
                assert callback.strict
        return any(re.search(message, text) for text in starts.seen)

    def test_a_loss_that_is_not_found_is_told_in_the_sanity_check(self):
        """As in detectors, whose losses exist in training mode only."""

        class Detector(Classifier):
            def training_step(self, batch, batch_idx):
                if not self.training:
                    raise AttributeError("'list' object has no attribute 'values'")
                return super().training_step(batch, batch_idx)

            def validation_step(self, batch, batch_idx):
                self.log("val/found", float(len(self.net(batch[0]))))

        message = "may fail after the training: no step of Detector gives a floating-point scalar loss"
        assert self.told_in_the_sanity_check(Detector(), compression(), message)
        assert not self.told_in_the_sanity_check(Detector(), compression(loss=lambda m, b: m.loss(b)), "may fail")
        own = {role: loader(seed=seed) for seed, role in enumerate(("calibration", "selection", "verification"))}
        unless = message.replace(":", ", unless the loaders of its splits yield batches of another kind:")
        assert self.told_in_the_sanity_check(Detector(), compression(**own), unless)
        del own["selection"]
        assert self.told_in_the_sanity_check(Detector(), compression(**own), message), "a part of the validation data"
        assert not self.told_in_the_sanity_check(Classifier(), compression(strict=True), "may fail")

    def test_a_score_that_is_not_logged_is_told_in_the_sanity_check(self):
        message = "may fail after the training: score='val/acc' is not logged by a step of Classifier"
        assert self.told_in_the_sanity_check(Classifier(), compression(strict=True, score="val/acc"), message)

    def test_lazy_weights_are_not_touched_by_the_sanity_check(self):
        module = Classifier(nn.Sequential(nn.LazyLinear(24), nn.ReLU(), nn.Linear(24, CLASSES)))
        callback = compression(strict=True)
        run = trainer(callbacks=[callback])
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "LowRankCompression tried")
            run.fit(module, loader(), loader(seed=1))
        assert callback.result.ranks

    @pytest.mark.parametrize("kind", [dict, Popped])
    def test_the_sanity_check_changes_nothing(self, kind):
        """Steps may draw noise, count, write to buffers and change their batch."""

        class Careless(Classifier):
            def __init__(self):
                super().__init__()
                self.register_buffer("calls", torch.zeros(()))
                self.seen, self.metric = [], MeanMetric()

            def validation_step(self, batch, batch_idx):
                x = batch.pop("x")
                loss = functional.cross_entropy(self.net(x + torch.rand_like(x)), batch["y"])
                self.calls += 1
                self.metric(loss)
                self.seen.append(float(loss.detach()))
                self.log("val/loss", loss, batch_size=len(x))

            def training_step(self, batch, batch_idx):
                return functional.cross_entropy(self.net(batch["x"] + torch.rand_like(batch["x"])), batch["y"])

        def data(seed):
            x, y = clouds(96, seed)
            return DataLoader(
                TensorDataset(x, y), 16, collate_fn=lambda rows: kind(zip("xy", stacked(rows), strict=True))
            )

        ends = []
        for callbacks in ([], [compression(save=False)]):
            torch.manual_seed(0)
            module = Careless()
            run = trainer(callbacks=callbacks, max_epochs=1)
            run.fit(module, data(0), data(1))
            ends.append((module.state_dict(), module.seen, run.callback_metrics["val/loss"]))
        torch.testing.assert_close(*ends, rtol=0, atol=0)

    def test_lists_of_batches(self):
        calibration, selection, verification = (list(loader(seed=seed)) for seed in (2, 3, 4))
        callback = compression(calibration=calibration, selection=selection, verification=verification)
        trainer(callbacks=[callback]).fit(Classifier(), loader(), loader(seed=1))
        assert callback.result.samples == {"calibration": 96, "selection": 96, "verification": 96}

    @pytest.mark.parametrize("make", [loader, lambda seed: list(loader(seed=seed))])
    def test_one_loader_for_choice_and_verdict(self, make):
        shared = make(seed=2)
        callback = compression(selection=shared, verification=shared)
        run = trainer(callbacks=[callback])
        with pytest.warns(UserWarning, match="selection and verification are the same loader"):
            run.fit(Classifier(), loader(), loader(seed=1))

    def test_overlapping_loaders(self):
        data = TensorDataset(*clouds(seed=2))
        callback = compression(
            selection=DataLoader(Subset(data, range(60)), 16), verification=DataLoader(Subset(data, range(50, 96)), 16)
        )
        with pytest.warns(UserWarning, match="selection and verification share data \\(10 of 46 samples"):
            trainer(callbacks=[callback]).fit(Classifier(), loader(), loader(seed=1))


def contrastive(net, batch):
    """As many classes as the batch has samples; the last batch is short."""
    embedded = functional.normalize(net(batch[0]), dim=1)
    return functional.cross_entropy(5 * embedded @ embedded.T, torch.arange(len(embedded)))


def two_terms(net, batch):
    logits = net(batch[0])
    return functional.cross_entropy(logits, batch[1]) + 0.3 * functional.mse_loss(logits, torch.zeros_like(logits))


def by_hand(net, batch):
    return -net(batch[0]).log_softmax(1)[torch.arange(len(batch[1])), batch[1]].mean()


def weighted(net, batch):
    return functional.cross_entropy(net(batch[0]), batch[1], weight=torch.tensor([1.0, 2.0, 3.0, 4.0]))


def summed(net, batch):
    return functional.cross_entropy(net(batch[0]), batch[1], reduction="sum") / len(batch[1])


def huber(net, batch):
    return functional.smooth_l1_loss(net(batch[0]), functional.one_hot(batch[1], CLASSES).float())


@pytest.mark.parametrize("loss", [contrastive, two_terms, by_hand, weighted, summed, huber])
def test_losses_of_all_kinds_are_compressed_and_reported(loss):
    """Explained by a watched call or not: layers are factorized, and the reported loss is that of the module."""

    class Module(Classifier):
        def loss(self, batch):
            return loss(self.net, batch)

    callback = compression()
    module = Module()
    verification = loader(90, seed=3)
    callback.loaders |= {"calibration": loader(90, seed=1), "selection": loader(90, seed=2)}
    callback.loaders |= {"verification": verification}
    fit(module, callback)
    result = callback.result
    assert result.ranks
    for net, measured in ((module.net, result.certificate.dense), (result.model.net, result.certificate.compressed)):
        with torch.no_grad():
            sizes = [len(batch[0]) for batch in verification]
            wanted = sum(size * loss(net, batch) for size, batch in zip(sizes, verification, strict=True)) / sum(sizes)
        assert measured.loss == pytest.approx(float(wanted), rel=1e-5)


def test_a_loss_without_gradient_is_an_error():
    def accuracy(module, batch):
        return (module.net(batch[0]).argmax(1) != batch[1]).float()

    with pytest.raises(ValueError, match="the loss does not depend differentiably on any of the 3 layers"):
        fit(Classifier(), compression(loss=accuracy), val=loader(90, seed=1))
    other = Classifier()
    with pytest.raises(ValueError, match="computed from the model that it is given"):
        fit(Classifier(), compression(loss=lambda module, batch: other.loss(batch)), val=loader(90, seed=1))
