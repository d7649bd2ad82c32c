"""Hydra multiruns of the application, as a user starts them."""

import csv
import sys

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

import train as application
from lrf_lightning.callbacks import tracking

pytestmark = pytest.mark.timeout(400)

# a net and a solve that take a second
TINY = [
    "recipe=digits_small",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "+trainer.enable_progress_bar=false",
    "model.net.width=32",
    "model.net.blocks=1",
    "callbacks.compress.points=2",
    "data.verification=100",
    "data.selection=100",
    "data.calibration=100",
    "logger=csv",
    "test=false",
]


@pytest.fixture
def multirun(project, tmp_path, monkeypatch):
    """Run a sweep and return its rows and the folder of the sweep."""
    monkeypatch.setattr(tracking, "_draw_pictures", lambda result, images: {})
    monkeypatch.setenv("PYTHONPATH", str(project))

    def run(*arguments, tiny=TINY):
        command = [str(project / "train.py"), "-m", "-cp", str(project / "conf"), *arguments, *tiny]
        monkeypatch.setattr(sys, "argv", command)
        GlobalHydra.instance().clear()
        application.main()
        (folder,) = (tmp_path / "multirun").iterdir()
        with (folder / "sweep.csv").open(newline="") as file:
            return list(csv.DictReader(file)), folder

    yield run
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None


def shared(folder):
    """How many trainings and calibrations the sweep has done."""
    cache = folder / "cache"
    return len([p for p in cache.glob("training-*") if p.is_dir()]), len(list(cache.glob("calibration-*.pt")))


def test_budgets_share_one_training_and_one_calibration(multirun):
    rows, folder = multirun("+compress=budget", "callbacks.compress.keep=0.3,0.5,0.7", "hydra.job.chdir=true")
    assert [row["callbacks.compress.keep"] for row in rows] == ["0.3", "0.5", "0.7"]
    sizes = [float(row["params_model_after"]) for row in rows]
    assert sizes == sorted(set(sizes))
    assert {row["loss_dense"] for row in rows} == {rows[0]["loss_dense"]}, "one and the same original"
    assert shared(folder) == (1, 1)
    assert (folder / "sweep.png").is_file()


@pytest.mark.slow
def test_seeds_and_metrics_share_what_they_can(multirun):
    rows, folder = multirun("+compress=budget", "seed=0,1", "callbacks.compress.metric=activation,fisher")
    assert len({row["loss_dense"] for row in rows}) == 2
    assert shared(folder) == (2, 4)


@pytest.mark.slow
def test_a_setting_of_the_training_is_never_passed_over(multirun):
    rows, folder = multirun("+compress=budget", "model.learning_rate=1e-3,3e-3")
    assert len({row["loss_dense"] for row in rows}) == 2
    assert shared(folder) == (2, 2)


@pytest.mark.slow
def test_without_a_cache_every_job_trains(multirun):
    rows, folder = multirun("+compress=budget", "callbacks.compress.keep=0.3,0.6", "cache_dir=null")
    assert len(rows) == 2
    assert not (folder / "cache").exists()


@pytest.mark.slow
def test_the_grid_has_seeds_metrics_and_recipes(multirun):
    tiny = [item for item in TINY if not item.startswith(("recipe", "model"))]
    rows, folder = multirun("+sweep=grid", "seed=0", "model.net.blocks=1", tiny=tiny)
    assert len(rows) == 6
    assert {row["recipe"] for row in rows} == {"digits", "digits_small"}
    assert all(row["params_model_after"] for row in rows)
    assert shared(folder) == (2, 6)


@pytest.mark.slow
def test_optuna_writes_the_pareto_set(multirun):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    rows, folder = multirun("+sweep=optuna", "hydra.sweeper.n_trials=4")
    assert len(rows) == 4
    solutions = OmegaConf.load(folder / "optimization_results.yaml").solutions
    found = sorted(tuple(solution["values"]) for solution in solutions)
    measured = [(float(row["selection_score"]), float(row["params_model_after"])) for row in rows]
    best = [
        one for one in measured
        if not any(a[0] >= one[0] and a[1] <= one[1] and a != one for a in measured)
    ]  # fmt: skip
    assert [a for pair in found for a in pair] == pytest.approx([a for pair in sorted(best) for a in pair])
    assert shared(folder)[0] == 1


@pytest.mark.slow
def test_parallel_jobs_wait_for_the_training_of_the_first(multirun):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    rows, folder = multirun("+sweep=parallel")
    assert [row["callbacks.compress.keep"] for row in rows] == ["0.2", "0.3", "0.5", "0.7"]
    assert len({row["loss_dense"] for row in rows}) == 1
    assert shared(folder) == (1, 1)


@pytest.mark.slow
def test_the_jobs_of_a_cluster_run_on_this_machine_too(multirun):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    keeps = "callbacks.compress.keep=0.3,0.6"
    rows, folder = multirun("+sweep=cluster", "hydra/launcher=submitit_local", "hydra.launcher.cpus_per_task=1", keeps)
    assert [row["callbacks.compress.keep"] for row in rows] == ["0.3", "0.6"]
    assert shared(folder) == (1, 1)
