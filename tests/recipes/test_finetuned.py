import sys

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from safetensors.torch import save_file
from small_modules import Classifier, loader, network

import train as application
from recipes.finetuned import load_datamodule, load_module


class Points(LightningDataModule):
    def __init__(self, samples=64):
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        return loader(self.hparams.samples, 0)

    def val_dataloader(self):
        return loader(self.hparams.samples, 1)

    def test_dataloader(self):
        return loader(self.hparams.samples, 2)


class Untested(LightningDataModule):
    """What many projects have: no test split."""

    def train_dataloader(self):
        return loader(96, 0)

    def val_dataloader(self):
        return loader(96, 1)


class Module(Classifier):
    def __init__(self, width, net=None):
        super().__init__(net or network(width))
        self.save_hyperparameters(ignore=["net"])

    def validation_step(self, batch, batch_idx):
        return super().validation_step(batch, batch_idx)


class Pickled(Classifier):
    def __init__(self, net):
        super().__init__(net)
        self.save_hyperparameters()


MODULE, DATA = f"{__name__}.Module", f"{__name__}.Points"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])


def checkpoint(module, datamodule, path="model.ckpt"):
    """Train for an epoch and save."""
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=1, default_root_dir="run", **options)
    trainer.fit(module, datamodule=datamodule)
    trainer.save_checkpoint(path)
    return path


def assert_same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=0)


def test_hyperparameters_come_from_the_checkpoint():
    trained = Module(40)
    path = checkpoint(trained, Points(48))
    assert_same_weights(load_module(MODULE, path), trained)
    assert load_datamodule(DATA, path).hparams.samples == 48
    assert load_datamodule(DATA, path, {"samples": 32}).hparams.samples == 32


@pytest.mark.parametrize("save", [torch.save, save_file])
def test_files_of_nothing_but_weights(save):
    trained = Module(40)
    save(trained.state_dict(), "weights.bin")
    assert_same_weights(load_module(MODULE, "weights.bin", {"width": 40}), trained)
    assert load_datamodule(DATA, "weights.bin", {"samples": 32}).hparams.samples == 32


def test_missing_arguments_are_named():
    torch.save(Module(40).state_dict(), "weights.pt")
    with pytest.raises(TypeError, match=r"width.*\+model.arguments.NAME=VALUE; the names are width, net"):
        load_module(MODULE, "weights.pt")


def test_classes_are_checked():
    torch.save({}, "weights.pt")
    with pytest.raises(ImportError, match=r"module=no.such.Class cannot be imported.*PYTHONPATH"):
        load_module("no.such.Class", "weights.pt")
    with pytest.raises(TypeError, match=r"module=.*Points is no LightningModule"):
        load_module(DATA, "weights.pt")
    with pytest.raises(TypeError, match=r"datamodule=.*Module is no LightningDataModule"):
        load_datamodule(MODULE, "weights.pt")


def test_files_that_do_not_fit():
    with pytest.raises(OSError, match=r"none\.ckpt"):
        load_module(MODULE, "none.ckpt", {"width": 8})
    torch.save(Module(40).state_dict(), "weights.pt")
    with pytest.raises(ValueError, match="does not fit Module"):
        load_module(MODULE, "weights.pt", {"width": 8})


def test_pickled_objects_need_trust():
    trained = Pickled(network(20))
    path = checkpoint(trained, Points())
    with pytest.raises(ValueError, match=r"more than plain data.*trusted=true"):
        load_module(f"{__name__}.Pickled", path)
    assert_same_weights(load_module(f"{__name__}.Pickled", path, trusted=True), trained)


def config(composed, path, data, *more):
    return composed(
        "recipe=finetuned",
        f"ckpt_path={path}",
        f"module={MODULE}",
        f"datamodule={data}",
        "+compress=budget",
        "callbacks.compress.points=2",
        "trainer.accelerator=cpu",
        "+trainer.enable_progress_bar=false",
        "logger=csv",
        *more,
    )


def test_data_without_a_test_split_is_compressed_and_not_tested(composed, capsys):
    path = checkpoint(Module(40), Untested())
    metrics, objects = application.train(config(composed, path, f"{__name__}.Untested"))
    assert objects["result"].ranks
    assert "compress/test/loss" not in metrics
    assert "Nothing is tested: Untested has no test_dataloader" in capsys.readouterr().out


@pytest.mark.parametrize(("data", "extra"), [("Untested", []), ("Points", ["test=false"])])
def test_a_sweep_for_a_figure_of_no_test_is_refused(composed, data, extra):
    path = checkpoint(Module(40), Untested())
    cfg = config(composed, path, f"{__name__}.{data}", "optimized_metric=compress/test/loss", *extra)
    with pytest.raises(ValueError, match=r"optimized_metric=compress/test/loss is a figure of the test, but"):
        application.train(cfg)


def test_nothing_is_trained(composed):
    trained = Module(40)
    path = checkpoint(trained, Points(96))
    metrics, objects = application.train(config(composed, path, DATA))
    assert_same_weights(objects["model"], trained)
    assert objects["trainer"].global_step == 0
    assert objects["result"].ranks
    assert "compress/test/loss" in metrics
