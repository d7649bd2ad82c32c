"""The same training is done once; anything that changes the weights trains anew."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small_modules import CLASSES, FEATURES, QUICK, Classifier, clouds, loader, trainer
from torch.utils.data import DataLoader, TensorDataset

from lrf_lightning import LowRankCompression
from lrf_lightning.callbacks import tracking
from lrf_lightning.sweeps.training_cache import fit_once, source_files


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch):
    monkeypatch.setattr(tracking, "_draw_pictures", lambda result, images: {})


class Clouds(pl.LightningDataModule):
    def __init__(self, seed=0):
        super().__init__()
        self.seed = seed

    def train_dataloader(self):
        return DataLoader(TensorDataset(*clouds(seed=self.seed)), batch_size=16, shuffle=True)

    def val_dataloader(self):
        return loader(seed=1)


class Job:
    """One job of a sweep: the same seed, whatever state the generators are in."""

    def __init__(self, folder, *, settings=None, seed=0, data_seed=0, callbacks=(), **options):
        pl.seed_everything(seed, verbose=False)
        self.module, self.data = Classifier(), Clouds(data_seed)
        self.trainer = trainer(callbacks=list(callbacks), default_root_dir=str(folder.parent), **options)
        self.loaded = fit_once(self.trainer, self.module, self.data, folder=folder, settings=settings or {"rate": 0.01})

    @property
    def weights(self):
        return self.module.state_dict()


def same(first, second):
    torch.testing.assert_close(first.weights, second.weights, rtol=0, atol=0)


def test_the_second_job_has_the_weights_and_metrics_of_the_first(tmp_path):
    first, second = Job(tmp_path / "cache"), Job(tmp_path / "cache")
    assert (first.loaded, second.loaded) == (False, True)
    same(first, second)
    assert first.trainer.global_step == 12
    assert second.trainer.global_step == 0
    assert dict(second.trainer.callback_metrics) == dict(first.trainer.callback_metrics)
    assert {"train/loss", "val/loss"} <= set(second.trainer.callback_metrics)


def test_a_shared_training_is_the_one_that_a_plain_fit_does(tmp_path):
    first = Job(tmp_path / "cache")
    pl.seed_everything(0, verbose=False)
    module = Classifier()
    trainer(default_root_dir=str(tmp_path)).fit(module, datamodule=Clouds())
    torch.testing.assert_close(module.state_dict(), first.weights, rtol=0, atol=0)


@pytest.mark.parametrize(
    "change", [{"settings": {"rate": 0.02}}, {"seed": 1}, {"data_seed": 1}], ids=["settings", "initial weights", "data"]
)
def test_whatever_changes_the_weights_trains_anew(tmp_path, change):
    Job(tmp_path / "cache")
    assert not Job(tmp_path / "cache", **change).loaded
    assert Job(tmp_path / "cache").loaded


def test_changed_code_trains_anew(tmp_path):
    source = tmp_path / "model.py"

    def job():
        pl.seed_everything(0, verbose=False)
        run = trainer(default_root_dir=str(tmp_path))
        return fit_once(run, Classifier(), Clouds(), folder=tmp_path / "cache", settings={}, sources=[source])

    source.write_text("layers = 2")
    assert [job(), job()] == [False, True]
    source.write_text("layers = 3")
    assert not job()


def test_the_compression_finds_the_same_after_a_fit_and_after_loading(tmp_path):
    def job(**options):
        compression = LowRankCompression(
            **QUICK, objective="budget", save=False, strict=True, dirpath=tmp_path / "out", **options
        )
        found = Job(tmp_path / "cache", callbacks=[compression])
        if found.loaded:
            compression.compress_now(found.trainer, found.module)
        return found, compression.result

    (first, fitted), (second, loaded) = job(), job()
    assert (first.loaded, second.loaded) == (False, True)
    assert fitted.ranks == loaded.ranks
    assert fitted.certificate == loaded.certificate
    torch.testing.assert_close(fitted.model.state_dict(), loaded.model.state_dict(), rtol=0, atol=0)


def test_a_replaced_live_module_is_kept_as_it_was_trained(tmp_path):
    compression = LowRankCompression(**QUICK, objective="budget", save=False, in_place=True)
    first = Job(tmp_path / "cache", callbacks=[compression])
    assert any(name.endswith("left_factor") for name in first.weights)
    second = Job(tmp_path / "cache")
    assert second.loaded
    assert not any(name.endswith("left_factor") for name in second.weights)


def test_the_best_checkpoint_goes_along(tmp_path):
    def job(name):
        periodic = ModelCheckpoint(dirpath=tmp_path / f"{name} periodic")
        checkpoint = ModelCheckpoint(dirpath=tmp_path / name, monitor="val/loss", mode="max")
        return Job(tmp_path / "cache", callbacks=[periodic, checkpoint], enable_checkpointing=True), checkpoint

    _, own = job("first")
    second, other = job("second")
    assert second.loaded
    states = [torch.load(c.best_model_path, weights_only=True)["state_dict"] for c in (own, other)]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    assert str(tmp_path / "cache") in other.best_model_path


def test_a_fit_that_fails_leaves_nothing(tmp_path):
    class Fails(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        Job(tmp_path / "cache", callbacks=[Fails()])
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"] == []
    assert not Job(tmp_path / "cache").loaded, "and its lock is free"


def test_sources_are_those_of_the_project(project):
    import recipes.digits  # noqa: F401

    found = source_files(["recipes.digits.Digits", "lightning.Trainer", "torch.optim.Adam"])
    assert project / "recipes" / "digits.py" in found
    assert {path.parent.name for path in found} == {"recipes"}


class Late(Classifier):
    """Builds its network when it is configured, with data that knows the trainer."""

    def configure_model(self):
        if self.net is None:
            self.net = torch.nn.Linear(FEATURES, CLASSES)


class Knowing(Clouds):
    def setup(self, stage):
        assert self.trainer.world_size == 1


class Unfriendly(Clouds):
    def train_dataloader(self):
        assert self.trainer.state.fn == "fit", "only in a fit"
        return super().train_dataloader()


def late_job(folder, data):
    pl.seed_everything(0, verbose=False)
    module, run = Late(), trainer(default_root_dir=str(folder.parent))
    module.net = None
    return fit_once(run, module, data, folder=folder, settings={}), module


def test_models_that_are_built_late_share_trainings(tmp_path):
    (first, module), (second, loaded) = (late_job(tmp_path / "cache", Knowing()) for _ in range(2))
    assert (first, second) == (False, True)
    torch.testing.assert_close(loaded.state_dict(), module.state_dict(), rtol=0, atol=0)


def test_data_that_cannot_be_looked_at_is_trained_on_anew(tmp_path, caplog):
    for _ in range(2):
        assert not late_job(tmp_path / "cache", Unfriendly())[0]
    assert "the training data cannot be looked at (AssertionError: only in a fit" in caplog.text
