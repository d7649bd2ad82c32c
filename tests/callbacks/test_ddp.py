import errno
import os
import re
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import WandbLogger
from small_modules import QUICK, Classifier, loader, trainer
from torch.nn import functional
from torchmetrics.classification import MulticlassF1Score
from wandb_records import items, records

from lrf_lightning import LowRankCompression, RankMonitor, load_compressed, safe_files
from lrf_lightning.callbacks import attempts, tracking


@pytest.fixture(autouse=True)
def _without_port():
    """Lightning leaves the port of the group in the environment."""
    yield
    os.environ.pop("MASTER_PORT", None)


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch):
    """Drawing takes longer than everything else here, and has its own tests."""
    monkeypatch.setattr(tracking, "_draw_pictures", lambda *_: {})


class Notes(pl.Callback):
    """Writes what every process ended with into a file."""

    def __init__(self, folder, compression):
        self.folder, self.compression = folder, compression

    def on_fit_end(self, trainer, pl_module):
        result = self.compression.result
        noted = {
            "failed": float(trainer.callback_metrics["compress/failed"]),
            "ranks": None if result is None else result.ranks,
            "weights": None if result is None else result.model.state_dict(),
            "samples": None if result is None else result.samples,
            "score": None if result is None else result.certificate.dense.score,
            "why": getattr(self.compression, "why", ""),
            "live": {name: type(module).__name__ for name, module in pl_module.named_modules()},
        }
        torch.save(noted, self.folder / f"rank{trainer.global_rank}.pt")


def fit(folder, callback, *, validation, processes=2, module=None, **options):
    """What every process ended with, in order; training takes no steps, so that it is the same for all numbers."""
    strategy = {"strategy": "ddp_fork", "devices": processes} if processes > 1 else {"devices": 1}
    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    run = trainer(callbacks=[callback, Notes(folder, callback)], max_epochs=1, **(strategy | options))
    module = module or Classifier()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    run.fit(module, loader(), validation)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]


class Remembers(LowRankCompression):
    def _report_failure(self, trainer, error):
        self.why = str(error)
        super()._report_failure(trainer, error)


def compression(folder, **options):
    return Remembers(**(QUICK | {"objective": "budget", "dirpath": folder} | options))


@pytest.mark.parametrize("samples", [96, 83])  # 83 samples are 6 batches, of which the last one is short
def test_all_processes_end_with_the_model_of_one_process(tmp_path, samples):
    validation = loader(samples, seed=1)
    (alone,) = fit(tmp_path / "a", compression(tmp_path / "one"), validation=validation, processes=1)
    first, second = fit(tmp_path / "b", compression(tmp_path / "two", in_place=True), validation=validation)
    assert first["failed"] == second["failed"] == 0
    assert first["ranks"] == second["ranks"] == alone["ranks"]
    assert alone["ranks"]
    assert first["samples"] == second["samples"] == alone["samples"]
    assert sum(alone["samples"].values()) == samples  # padded duplicates are not counted
    torch.testing.assert_close(second["weights"], first["weights"], rtol=0, atol=0)
    torch.testing.assert_close(first["weights"], alone["weights"], rtol=1e-4, atol=1e-5)
    assert first["live"] == second["live"] != alone["live"]
    loaded = load_compressed(Classifier(), tmp_path / "two")
    torch.testing.assert_close(dict(loaded.state_dict()), dict(first["weights"]), rtol=0, atol=0)
    assert (tmp_path / "two" / "compressed.ckpt").is_file()


class Scored(Classifier):
    """Logs a metric object, which the trainer computes over all processes."""

    def __init__(self):
        super().__init__()
        self.f1 = MulticlassF1Score(num_classes=4, average="macro")

    def validation_step(self, batch, batch_idx):
        self.f1(self.net(batch[0]), batch[1])
        self.log("val/f1", self.f1)
        return super().validation_step(batch, batch_idx)


def test_a_metric_object_is_that_of_the_batch_on_every_process(tmp_path):
    validation, modules = loader(83, seed=1), (Scored(), Scored())
    modules[1].load_state_dict(modules[0].state_dict())
    (alone,) = fit(
        tmp_path / "a",
        compression(tmp_path / "one", score="val/f1"),
        validation=validation,
        processes=1,
        module=modules[0],
    )
    first, second = fit(
        tmp_path / "b", compression(tmp_path / "two", score="val/f1"), validation=validation, module=modules[1]
    )
    assert first["failed"] == second["failed"] == 0
    assert first["ranks"] == second["ranks"] == alone["ranks"]
    assert first["score"] == second["score"] == pytest.approx(alone["score"], abs=1e-6)
    assert 0 < alone["score"] < 1


class Gathers(Classifier):
    """Compares the samples of all processes, which not all of them have at the same time in a solve."""

    def validation_step(self, batch, batch_idx):
        every = self.all_gather(self.net(batch[0]))
        self.log("val/loss", functional.cross_entropy(self.net(batch[0]), batch[1]) + 0 * every.sum())

    def training_step(self, batch, batch_idx):
        return self.validation_step(batch, batch_idx) or functional.cross_entropy(self.net(batch[0]), batch[1])


def test_a_step_that_gathers_ends_in_an_error_instead_of_a_wait(tmp_path):
    callback = compression(tmp_path / "compressed")
    for outcome in fit_failing(tmp_path, callback, EndsFit(), Gathers()):
        assert outcome["failed"] == 1
        assert "gathers from other processes" in outcome["why"]
    assert list(tmp_path.glob("**/trained.ckpt"))


class FailsOnOne(Classifier):
    """Fails on the second process once training has ended, in every step that could give a loss."""

    def validation_step(self, batch, batch_idx):
        self._fail()
        return super().validation_step(batch, batch_idx)

    def training_step(self, batch, batch_idx):
        self._fail()
        return super().training_step(batch, batch_idx)

    def _fail(self):
        if torch.distributed.get_rank() == 1 and self.trainer.fit_ends:
            raise ArithmeticError("broken on one process")


class FailsToValidateOnOne(FailsOnOne):
    """Could still take the loss from its training step there, which the other process does not."""

    def training_step(self, batch, batch_idx):
        return Classifier.training_step(self, batch, batch_idx)


class EndsFit(pl.Callback):
    def setup(self, trainer, pl_module, stage):
        trainer.fit_ends = False

    def on_train_end(self, trainer, pl_module):
        trainer.fit_ends = True


@pytest.mark.parametrize("module", [FailsOnOne, FailsToValidateOnOne])
def test_a_failure_on_one_process_is_reported_on_all(tmp_path, module):
    callback = compression(tmp_path / "compressed")
    outcomes = fit_failing(tmp_path, callback, EndsFit(), module())
    for outcome in outcomes:
        assert outcome["failed"] == 1
        assert outcome["ranks"] is None
    assert not (tmp_path / "compressed" / "compressed.ckpt").exists()
    assert list(tmp_path.glob("**/trained.ckpt"))


def fit_failing(folder, callback, ends, module):
    saving = pl.callbacks.ModelCheckpoint(folder, filename="trained")
    run = trainer(
        callbacks=[ends, saving, callback, Notes(folder, callback)],
        max_epochs=1,
        strategy="ddp_fork",
        devices=2,
        enable_checkpointing=True,
    )
    run.fit(module, loader(), loader(seed=1))
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


class Full(pl.Callback):
    """Runs the callback with no room on the disk of some processes, and notes what every process said or raised."""

    def __init__(self, folder, callback, *full):
        self.folder, self.callback, self.full = folder, callback, full

    def setup(self, trainer, pl_module, stage):
        self.callback.setup(trainer, pl_module, stage)

    def on_fit_end(self, trainer, pl_module):
        said = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attempts, "rank_zero_warn", said.append)
            if trainer.global_rank in self.full:
                for where, name in ((safe_files, "write_bytes"), (tempfile, "mkdtemp"), (Path, "mkdir")):
                    patch.setattr(where, name, self.fail)
            try:
                self.callback.on_fit_end(trainer, pl_module)
            except Exception as error:
                said.append(f"{type(error).__name__}: {error}")
                raise
            finally:
                with open(self.folder / f"said{trainer.global_rank}", "w") as file:
                    file.write("\n".join(said))
                torch.distributed.barrier()  # the first process that ends with an error has the others ended

    def fail(self, *_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fit_with_full_disk(folder, callback, *full):
    """Whether the fit raised, and what every process said."""
    saving = pl.callbacks.ModelCheckpoint(folder, filename="trained")
    run = trainer(
        callbacks=[saving, Full(folder, callback, *full)],
        max_epochs=1,
        strategy="ddp_fork",
        devices=2,
        enable_checkpointing=True,
    )
    try:
        run.fit(Classifier(), loader(), loader(seed=1))
        raised = False
    except Exception:
        raised = True
    assert list(folder.glob("trained.ckpt"))
    return raised, [(folder / f"said{rank}").read_text() for rank in range(2)]


def test_a_full_disk_costs_the_files_alone(tmp_path):
    raised, (first, _) = fit_with_full_disk(tmp_path, compression(tmp_path / "compressed"), 0)
    assert not raised
    for what in ("write the compressed model", "write the Lightning checkpoint"):
        assert re.search(
            f"could not {what} .*No space left on device.* on process 0; the compressed model is kept", first
        )
    assert not (tmp_path / "compressed" / "compressed.ckpt").exists()


def test_a_full_disk_ends_all_processes_with_the_cause_if_strict(tmp_path):
    raised, (first, second) = fit_with_full_disk(tmp_path, compression(tmp_path / "compressed", strict=True), 0)
    assert raised
    assert re.search(r"^OSError: .*No space left on device", first)
    assert re.search(r"^PeerError: .*write the compressed model .*No space left on device.* on process 0", second)


@pytest.mark.parametrize("target", ["compressed", "memory://bucket/compressed"])
def test_only_the_first_process_needs_room_on_its_disk(tmp_path, target):
    target = target if "://" in target else tmp_path / target
    raised, said = fit_with_full_disk(tmp_path, compression(target, strict=True), 1)
    assert not raised
    assert said == ["", ""]


def test_a_run_of_wandb_that_failed_is_finished_as_such(tmp_path):
    class Stops(Classifier):
        def on_train_epoch_end(self):
            raise RuntimeError("stop")

    sink = WandbLogger(save_dir=tmp_path / "logs", offline=True, project="failed")
    run = trainer(callbacks=[LowRankCompression()], logger=sink, strategy="ddp_notebook", devices=1)
    with pytest.raises(Exception, match="stop"):
        run.fit(Stops(), loader(), loader(seed=1))
    (path,) = (tmp_path / "logs").rglob("*.wandb")
    assert [record.exit.exit_code for record in records(path) if record.HasField("exit")] == [1]


def test_the_first_process_alone_has_a_run_of_wandb_and_finishes_it(tmp_path):
    """The run is opened where it is used: a process that is forked cannot go on with the run of another one."""
    sink = WandbLogger(save_dir=tmp_path / "logs", offline=True, project="shared")
    run = trainer(
        callbacks=[RankMonitor(picture=False), compression(tmp_path / "compressed")],
        logger=sink,
        strategy="ddp_notebook",
        devices=2,
    )
    run.fit(Classifier(), loader(), loader(seed=1))
    (path,) = (tmp_path / "logs").rglob("*.wandb")
    found = list(records(path))
    final = {}
    for record in found:
        if record.HasField("summary"):
            final |= items(record.summary.update)
    assert final["compress/verdict"]
    assert final["rank_effective/net.2"] > 1
    assert sum(record.HasField("run") for record in found) == 1
    assert [record.exit.exit_code for record in found if record.HasField("exit")] == [0]
    names = [record.artifact.name for record in found if record.HasField("artifact")]
    assert len(names) == len(set(names))
    assert [name.split("-")[0] for name in names if not name.startswith("run-")] == ["compressed"]
