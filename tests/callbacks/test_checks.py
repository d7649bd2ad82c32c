import importlib
import importlib.util
import os
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.trainer.states import TrainerFn
from small_modules import Classifier, loader, trainer
from torch import nn

from lrf_lightning import LowRankCompression
from lrf_lightning.callbacks import checks
from lrf_lightning.solver.settings import Settings


class TestProcesses:
    def test_one_process_is_fine(self):
        checks.check_processes(SimpleNamespace(strategy=object(), world_size=1), in_place=True)

    # FSDP and DeepSpeed cannot be made without a GPU
    @pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])
    def test_sharded_strategies_are_refused_in_setup_with_the_remedy(self, kind):
        fake = SimpleNamespace(strategy=kind.__new__(kind), world_size=1)
        message = rf"does not support {kind.__name__}.*train=false ckpt_path=.*weights=.*one file: .*FOLDER"
        with pytest.raises(MisconfigurationException, match=message):
            LowRankCompression().setup(fake, Classifier(), TrainerFn.FITTING)

    def test_what_the_remedy_names_is_there(self):
        assert importlib.util.find_spec("lightning.pytorch.utilities.consolidate_checkpoint")
        module = importlib.import_module("lightning.pytorch.utilities.deepspeed")
        assert callable(module.convert_zero_checkpoint_to_fp32_state_dict)

    def test_several_processes_without_ddp(self):
        fake = SimpleNamespace(strategy=SingleDeviceStrategy(), world_size=2)
        with pytest.raises(MisconfigurationException, match=r"SingleDeviceStrategy.*world_size=2.*train=false"):
            checks.check_processes(fake, in_place=False)


class TestFolder:
    def test_is_created_only_on_request(self, tmp_path):
        checks.check_folder(tmp_path / "a" / "b", create=False)
        assert not (tmp_path / "a").exists()
        checks.check_folder(tmp_path / "a" / "b", create=True)
        assert (tmp_path / "a" / "b").is_dir()
        assert list((tmp_path / "a" / "b").iterdir()) == []

    def test_a_file_in_the_way(self, tmp_path):
        (tmp_path / "file").touch()
        for create in (False, True):
            with pytest.raises(MisconfigurationException, match=r"cannot be written.*or save=False"):
                checks.check_folder(tmp_path / "file" / "folder", create=create)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
    def test_no_permission(self, tmp_path):
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(MisconfigurationException, match="cannot be written"):
            checks.check_folder(tmp_path / "locked" / "folder", create=False)

    def test_several_writers(self, tmp_path):
        checks.check_single_writer(tmp_path, [tmp_path / "other"])
        with pytest.raises(MisconfigurationException, match="give each of them its own dirpath"):
            checks.check_single_writer(tmp_path, [tmp_path])


class TestLayers:
    def test_models_that_are_built_later_are_not_looked_at(self):
        class Later(Classifier):
            def __init__(self):
                super().__init__(nn.Identity())

            def configure_model(self):
                self.net = nn.Linear(12, 12)

        checks.check_layers(Later(), Settings(include=("head",)))

    def test_reasons_are_named(self):
        class Embeds(Classifier):
            def __init__(self):
                super().__init__(nn.Bilinear(3, 3, 3))

        with pytest.warns(UserWarning, match=r"no layer of Embeds.*net: Bilinear is not supported.*left unchanged"):
            checks.check_layers(Embeds(), Settings())

    def test_no_weights_at_all(self):
        with pytest.warns(UserWarning, match="it has no weight matrices"):
            checks.check_layers(Classifier(nn.Sequential(nn.ReLU(), nn.LayerNorm(3))), Settings())


def test_best_weights_need_checkpoints():
    def check(*callbacks, fast_dev_run=0):
        checks.check_best_weights(SimpleNamespace(checkpoint_callbacks=list(callbacks), fast_dev_run=fast_dev_run))

    periodic, best = ModelCheckpoint(), ModelCheckpoint(monitor="val/loss")
    nothing = ModelCheckpoint(monitor="val/loss", save_top_k=0)
    check(fast_dev_run=1)
    check(periodic, fast_dev_run=1)
    check(best)
    check(periodic, nothing, best)
    with pytest.raises(MisconfigurationException, match=r"needs a ModelCheckpoint callback and there is none; add one"):
        check()
    with pytest.raises(MisconfigurationException, match=r"none has a monitor.*monitor='val/loss'.*weights='last'"):
        check(periodic, Checkpoint())
    with pytest.raises(MisconfigurationException, match=r"save_top_k=0.*save_top_k=1.*weights='last'"):
        check(periodic, nothing)


def test_arguments_of_every_allowed_kind():
    for given in ("val_dataloader", [torch.ones(2)], iter([]), None):
        fine = {"loss": len, "score": "val/acc", "weights": "best", "dirpath": "x", "cache_dir": "y"}
        checks.check_arguments(**fine, loaders={"selection": given})


def test_a_manual_training_step_alone_gives_no_loss():
    class Manual(Classifier):
        validation_step = LightningModule.validation_step

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(MisconfigurationException, match="Manual optimises manually and has no validation_step"):
        trainer(callbacks=[LowRankCompression()]).fit(Manual(), loader(), loader())
    checks.check_steps(Classifier())


def test_settings_without_effect_are_told_before_training():
    with pytest.warns(UserWarning, match="keep=0.3 has no effect with objective='lossless'"):
        LowRankCompression(keep=0.3)
