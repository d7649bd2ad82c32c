"""Settings for all tests: one thread (forked processes hang otherwise), W&B offline, and guards against leaks."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("MPLBACKEND", "Agg")

import random
from pathlib import Path

import numpy as np
import pytest
import torch

torch.set_num_threads(1)
torch.set_warn_always(True)  # what users would be warned of once, whatever ran before

LEAKY = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def _isolated(tmp_path, monkeypatch):
    """Run in an empty folder with W&B's folders inside; fail if a test leaves the process changed."""
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        folder = tmp_path / ".wandb"
        folder.mkdir(exist_ok=True)
        monkeypatch.setenv(name, str(folder))
    monkeypatch.setattr("lrf_lightning.solver.speed.comparison.TIMING_SECONDS", 0.02)
    monkeypatch.setattr("lrf_lightning.solver.speed.comparison.SHORTEST_SECONDS", 1e-4)
    monkeypatch.setattr("lrf_lightning.solver.layers.latency.RANK_SECONDS", 0.01)
    monkeypatch.setenv("LRF_LIGHTNING_CACHE", "")
    monkeypatch.setattr("lrf_lightning.solver.layers.latency_cache._memory", {})
    environment = {name: os.environ.get(name) for name in LEAKY}
    yield
    assert {name: os.environ.get(name) for name in LEAKY} == environment, "a test changed the launcher's environment"
    assert not torch.distributed.is_initialized(), "a test left a process group behind"
    assert torch.is_grad_enabled(), "a test left gradients disabled"
    assert not torch.is_inference_mode_enabled(), "a test left inference mode on"
    assert torch.get_default_dtype() is torch.float32, "a test changed the default dtype"
    assert not torch.are_deterministic_algorithms_enabled(), "a test left deterministic algorithms on"


@pytest.fixture
def project() -> Path:
    """The root of the repository."""
    return Path(__file__).parents[1]


@pytest.fixture
def composed(project, tmp_path):
    """Compose conf/train.yaml as Hydra does for a job that runs in an empty folder."""
    from hydra import compose, initialize_config_dir  # machines with GPUs may lack Hydra, and run test_gpu.py
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    def build(*overrides: str):
        output = f"hydra.runtime.output_dir={tmp_path}/outputs"
        with initialize_config_dir(version_base="1.3", config_dir=str(project / "conf")):
            cfg = compose("train.yaml", [output, *overrides], return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        return OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])

    yield build
    HydraConfig.instance().cfg = None
