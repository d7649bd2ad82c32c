import os

import pytest
import wandb
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lrf_lightning.wandb_logging.group import grouped_by_sweep


@pytest.fixture
def job(monkeypatch):
    """The job of an application of Hydra."""

    def set_up(mode):
        sweep, runtime = {"dir": "multirun/digits/2030-01-31"}, {"cwd": os.getcwd()}
        cfg = OmegaConf.create({"hydra": {"mode": mode, "sweep": sweep, "runtime": runtime}})
        monkeypatch.setattr(HydraConfig.instance(), "cfg", cfg)

    return set_up


@pytest.mark.parametrize(("mode", "group"), [(RunMode.MULTIRUN, "digits/2030-01-31"), (RunMode.RUN, "")])
def test_jobs_of_a_sweep_are_a_group(job, project, tmp_path, mode, group):
    job(mode)
    node = OmegaConf.load(project / "conf" / "logger" / "wandb.yaml").wandb
    node.merge_with({"save_dir": str(tmp_path), "offline": True, "tags": []})
    with grouped_by_sweep():
        run = instantiate(node).experiment
    wandb.finish()
    wandb.teardown()  # it remembers the environment
    assert (run.group or "") == group
    assert "WANDB_RUN_GROUP" not in os.environ


def test_the_users_group_is_respected(job, monkeypatch):
    job(RunMode.MULTIRUN)
    monkeypatch.setenv("WANDB_RUN_GROUP", "mine")
    with grouped_by_sweep():
        assert os.environ["WANDB_RUN_GROUP"] == "mine"
    assert os.environ["WANDB_RUN_GROUP"] == "mine"


def test_a_single_job_has_no_group(job):
    for mode in (RunMode.RUN, None):
        job(mode)
        with grouped_by_sweep():
            assert "WANDB_RUN_GROUP" not in os.environ
