from pathlib import Path

import pytest
import wandb
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger

from lrf_lightning.run_folder import run_folder


class Remote(Logger):
    """Keeps nothing on this machine, and numbers its versions."""

    name, version = "experiment", 3

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *args, **kwargs):
        pass


def trainer_with(*loggers, **options):
    return Trainer(logger=list(loggers), accelerator="cpu", enable_checkpointing=False, **options)


def test_two_runs_of_wandb_have_their_own_folders(tmp_path):
    folders = []
    for _ in range(2):
        sink = WandbLogger(save_dir=tmp_path, project="shared", offline=True)
        run = sink.experiment
        folders.append(run_folder(trainer_with(sink, CSVLogger(tmp_path / "csv"))))
        assert folders[-1] == tmp_path / "shared" / run.id
        wandb.finish()
    assert folders[0] != folders[1]


def test_versions_of_the_csv_logger_stay_as_they_are(tmp_path):
    sink = CSVLogger(tmp_path, name="csv", version="second")
    assert run_folder(trainer_with(sink)) == tmp_path / "csv" / "second"


@pytest.mark.parametrize(("loggers", "expected"), [([], "."), ([Remote()], "experiment/version_3")])
def test_the_root_folder_stands_in(tmp_path, loggers, expected):
    assert run_folder(trainer_with(*loggers, default_root_dir=tmp_path)) == tmp_path / Path(expected)
