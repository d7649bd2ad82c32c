import argparse

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small_modules import Classifier, loader, trainer

from lrf_lightning.callbacks.best_weights import load_best_weights


class Other:
    """Not a type that loads without unpickling code."""


class Tracked(Classifier):
    """Sets its last bias to the number of the epoch, and logs a loss that is best in the first one."""

    def on_train_epoch_end(self):
        with torch.no_grad():
            self.net[4].bias.fill_(self.current_epoch)
        self.log("badness", float(self.current_epoch))

    def on_load_checkpoint(self, checkpoint):
        self.loaded = True


def fit(tmp_path, module, *others, **options):
    checkpoint = ModelCheckpoint(tmp_path, monitor="badness", **options)
    run = trainer(callbacks=[*others, checkpoint], enable_checkpointing=True, max_epochs=3)
    run.fit(module, loader())
    return run


def test_the_best_epoch_is_loaded(tmp_path):
    run = fit(tmp_path, Tracked())
    copy = Tracked()
    load_best_weights(run, copy)
    assert copy.net[4].bias.tolist() == [0.0] * 4
    assert copy.loaded
    assert run.lightning_module.net[4].bias.tolist() == [2.0] * 4


def test_of_several_checkpoint_callbacks_the_first_with_a_monitor_knows_the_best(tmp_path):
    periodic = ModelCheckpoint(tmp_path / "periodic", every_n_epochs=1)
    nothing = ModelCheckpoint(tmp_path / "nothing", monitor="badness", mode="max", save_top_k=0)
    run = fit(tmp_path, Tracked(), periodic, nothing)
    assert run.checkpoint_callback is periodic
    assert "epoch=2" in periodic.best_model_path, "without a monitor the best file is the latest one"
    copy = Tracked()
    load_best_weights(run, copy)
    assert copy.net[4].bias.tolist() == [0.0] * 4


def test_no_checkpoint_was_written(tmp_path):
    run = fit(tmp_path, Tracked(), save_top_k=0)
    with pytest.raises(ValueError, match=r"no best checkpoint was written.*weights='last'"):
        load_best_weights(run, Tracked())


def test_fast_dev_run_keeps_the_weights():
    run = trainer(fast_dev_run=True)
    module = Tracked()
    run.fit(module, loader())
    before = module.net[4].bias.clone()
    load_best_weights(run, module)
    assert torch.equal(module.net[4].bias, before)


def test_nothing_is_unpickled(tmp_path):
    class WithParameters(Tracked):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"other": argparse.Namespace(a=Other())})

    run = fit(tmp_path, WithParameters())
    with pytest.raises(ValueError, match=r"(?s)cannot be loaded without running code.*save_hyperparameters\(ignore"):
        load_best_weights(run, WithParameters())
