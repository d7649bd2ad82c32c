import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import wandb
from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf
from torch.nn.functional import cross_entropy

import train as application
from lrf_lightning import load_compressed
from lrf_lightning.modules import LowRankModule
from recipes.digits import DigitsClassifier, DigitsNet

# new processes import torch, which takes minutes on a machine that is busy with something else
pytestmark = pytest.mark.timeout(400)

# a net and a solve that take seconds
TINY = [
    "+compress=budget",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "+trainer.enable_progress_bar=false",
    "model.net.width=32",
    "model.net.blocks=1",
    "callbacks.compress.points=2",
    "callbacks.compress.keep=0.6",
    "data.verification=100",
    "data.selection=100",
    "data.calibration=100",
    "logger=csv",
]


@pytest.fixture
def offline(monkeypatch):
    """No trace of a W&B account."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "netrc")


def test_trains_compresses_tests_and_reloads(composed, tmp_path, capsys):
    metrics, objects = application.train(composed(*TINY))
    result = objects["result"]
    assert result.ranks
    assert {"test/acc", "test/loss", "compress/test/acc", "compress/test/loss"} <= set(metrics)
    assert metrics["compress/params_model_after"] == result.params_model[1] < result.params_model[0]
    printed = capsys.readouterr().out
    assert "Test split: only reported" in printed
    assert f"{result.params_model[0]:,} -> {result.params_model[1]:,} parameters" in printed

    # the live module stays dense, and the trainer's own test metrics are those of the dense model
    model, trainer = objects["model"], objects["trainer"]
    assert not any(isinstance(module, LowRankModule) for module in model.modules())
    assert float(trainer.callback_metrics["test/loss"]) == pytest.approx(float(metrics["test/loss"]))

    images, labels = objects["datamodule"].splits["test"].tensors
    files = tmp_path / "outputs" / "csv" / "compressed"
    loaded = load_compressed(DigitsClassifier(DigitsNet(width=32, blocks=1)), files)
    with torch.no_grad():
        logits = {"": model.eval()(images), "compress/": loaded.eval()(images)}
        torch.testing.assert_close(logits["compress/"], result.model.eval()(images), rtol=0, atol=0)
    assert not torch.equal(logits[""], logits["compress/"])
    for prefix, values in logits.items():
        assert float(metrics[f"{prefix}test/loss"]) == pytest.approx(float(cross_entropy(values, labels)), rel=1e-4)
        accuracy = (values.argmax(1) == labels).float().mean()
        assert float(metrics[f"{prefix}test/acc"]) == pytest.approx(float(accuracy))

    # compress the checkpoint that the run has left, without training
    checkpoint = tmp_path / "outputs" / "checkpoints" / "last.ckpt"
    again, objects = application.train(composed(*TINY, "train=false", f"ckpt_path={checkpoint}"))
    assert again["test/loss"] == pytest.approx(float(metrics["test/loss"]), abs=1e-6)
    assert objects["result"].ranks == result.ranks
    assert objects["trainer"].global_step == 0


def test_no_test_batches_and_a_quick_run_of_the_best_weights_end_well(composed):
    metrics, objects = application.train(composed(*TINY, "+trainer.limit_test_batches=0"))
    assert objects["result"].ranks
    assert not any("test" in name.split("/") for name in metrics)
    quick = ["trainer.fast_dev_run=true", "callbacks.compress.weights=best"]
    metrics, _ = application.train(composed(*TINY, *(f"++{override}" for override in quick)))
    assert "test/loss" in metrics


def test_figures_of_all_test_loaders_are_reported():
    found = [{"test/loss/dataloader_idx_0": 1.0}, {"test/loss/dataloader_idx_1": 2.0}]
    assert application._of_all_loaders(found) == found[0] | found[1]


def test_the_small_recipe_uses_one_thread_and_the_next_job_as_many_as_before(composed, monkeypatch):
    before, used = torch.get_num_threads(), []

    def run(cfg):
        used.append(torch.get_num_threads())
        raise RuntimeError("stopped")

    monkeypatch.setattr(application, "_run", run)
    torch.set_num_threads(2)
    try:
        for override in ("recipe=digits", "threads=3", "threads=null"):
            with pytest.raises(RuntimeError, match="stopped"):
                application.train(composed(override))
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert used == [1, 3, 2]


@pytest.mark.parametrize("threads", ["0", "-1", "many", "1.5", "true"])
def test_number_of_threads_that_cannot_be(composed, threads):
    with pytest.raises(ValueError, match=r"threads=.* is no number of threads; give 1 or more, or null"):
        application.train(composed(f"threads={threads}"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train=no", "train='no' is neither True nor False"),
        ("test=off", "test='off' is neither True nor False"),
        ("pretrained=0", "pretrained=0 is neither True nor False"),
        ("+trusted=no", "trusted='no' is neither True nor False"),
        ("seed=null", "seed=None is no seed; give a whole number from 0 to 4294967295"),
        ("seed=abc", "seed='abc' is no seed"),
        ("seed=-1", "seed=-1 is no seed"),
        ("seed=true", "seed=True is no seed"),
        ("cache_dir=5", "cache_dir=5 is no path; give a path, such as ./5, or null"),
        ("ckpt_path=5", "ckpt_path=5 is no path"),
        ("+compress_margins.los=0.1", "compress_margins.los is unknown, allowed are loss, score; did you mean loss"),
        ("compress_margins=0.1", "compress_margins=0.1 holds no names"),
    ],
)
def test_values_that_would_be_misread_or_noticed_late(composed, override, message):
    with pytest.raises(ValueError, match=message):
        application.train(composed(override))


def test_without_compression_nothing_is_said_about_it(composed, capsys):
    small = [override for override in TINY if "compress" not in override]
    metrics, objects = application.train(composed(*small, "logger=none", "callbacks=none"))
    assert objects["result"] is None
    assert not [name for name in metrics if name.startswith("compress/")]
    assert "compressed" not in capsys.readouterr().out


def test_hydra_starts_where_argparse_looks_into_every_help(monkeypatch):
    """As it does since Python 3.14; Hydra 1.3 has one help that is no string."""

    def look(parser, action):
        if action.help and "%" in action.help:
            parser._get_formatter()._expand_help(action)

    monkeypatch.setattr(argparse.ArgumentParser, "_check_help", look, raising=False)
    if sys.version_info < (3, 14):
        added = argparse.ArgumentParser.add_argument

        def add(parser, *args, **kwargs):
            action = added(parser, *args, **kwargs)
            parser._check_help(action)
            return action

        monkeypatch.setattr(argparse.ArgumentParser, "add_argument", add)
    with pytest.raises((TypeError, ValueError)):
        get_args_parser()
    application._let_help_be_lazy()
    assert "--shell-completion" in get_args_parser()._option_string_actions
    with pytest.raises((TypeError, ValueError)):
        argparse.ArgumentParser().add_argument("--wrong", help="100 %(")


def test_group_taken_for_a_string(composed):
    cfg = composed()
    OmegaConf.update(cfg, "compress", "lossless", force_add=True)
    with pytest.raises(ValueError, match=r"did not find the config group compress.*--info searchpath"):
        application.train(cfg)


def test_no_training_needs_a_checkpoint(composed):
    with pytest.raises(ValueError, match="train=false needs a trained model; add ckpt_path=PATH"):
        application.train(composed("train=false"))


def test_paths_are_by_the_folder_of_the_start(composed, tmp_path, monkeypatch):
    cfg, seen = composed("cache_dir=cache", "ckpt_path=some/last.ckpt"), []
    (tmp_path / "job").mkdir()
    monkeypatch.chdir(tmp_path / "job")  # as with hydra.job.chdir=true
    monkeypatch.setattr(application, "_run", lambda cfg: seen.append(cfg))
    application.train(cfg)
    assert seen[0].ckpt_path == str(tmp_path / "some" / "last.ckpt")
    assert cfg.ckpt_path == "some/last.ckpt"
    assert application._cache_folder(cfg) == tmp_path / "cache"
    assert application._from_the_start("~/last.ckpt") == str(Path("~/last.ckpt").expanduser())
    for known in (None, "last", "registry", "registry:mine", "s3://bucket/last.ckpt", "/a/last.ckpt"):
        assert application._from_the_start(known) == known


def test_objective():
    metrics = {"val/acc": torch.tensor(0.75), "compress/params_model": torch.tensor(10.0)}
    assert application._objective(metrics, None) is None
    assert application._objective(metrics, "val/acc") == 0.75
    assert application._objective(metrics, ["val/acc", "compress/params_model"]) == (0.75, 10.0)
    with pytest.raises(ValueError, match=r"optimized_metric='val/accuracy' is no metric.*val/acc"):
        application._objective(metrics, "val/accuracy")


def test_command(project, tmp_path):
    """The command as a user types it, W&B included, without an account and without a terminal."""
    overrides = [item for item in TINY if item != "logger=csv"]
    done = subprocess.run(
        [sys.executable, str(project / "train.py"), *overrides],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        timeout=380,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Test split: only reported" in done.stdout
    assert "UserWarning" not in done.stderr
    assert "requires_grad" not in done.stderr
    (output,) = (tmp_path / "outputs" / "digits").iterdir()
    assert f"was written is in {output}" in done.stdout
    assert {path.name for path in output.rglob("*")} >= {"model.safetensors", "compression.json", "compressed.ckpt"}
    assert list(output.glob("wandb/offline-run-*/*.wandb"))


def test_help_lists_the_groups(project):
    done = subprocess.run(
        [sys.executable, str(project / "train.py"), "--help"], capture_output=True, text=True, timeout=380
    )
    assert done.returncode == 0, done.stderr
    assert "compress: budget, compact, frontier, lossless, paper" in done.stdout
    assert "recipe: digits" in done.stdout


def test_a_run_of_wandb_that_cannot_be_closed_is_a_warning(monkeypatch):
    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(wandb, "run", object())
    monkeypatch.setattr(wandb, "finish", full)
    with pytest.warns(UserWarning, match="could not close the run of W&B .OSError: .Errno 28. No space left"):
        application._finish_wandb()
