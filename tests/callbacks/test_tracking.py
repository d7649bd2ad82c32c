import csv
import sys

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from tiny_result import frontier_result, tiny_result

from lrf_lightning.callbacks.tracking import log_solution
from lrf_lightning.export.files import ExportedFile
from lrf_lightning.plots import pictures as plots
from lrf_lightning.reports.summary import summary

TABLES = {
    "summary.csv",
    "layers.csv",
    "frontier.csv",
    "ranks.csv",
    "curves.csv",
    "probes.csv",
    "changes.csv",
    "speed.csv",
}
PICTURES = {
    f"{n}.png" for n in ("frontier", "layers", "ranks", "predicted_vs_measured", "spectra", "curves", "changes")
}


@pytest.fixture
def one_picture(monkeypatch):
    """Only one picture is drawn, where pictures are not what is tested."""
    for name in set(plots.PICTURES) - {"ranks"}:
        monkeypatch.delitem(plots.PICTURES, name)


def trainer_with(*loggers):
    return Trainer(logger=list(loggers), accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False)


def test_every_figure_reaches_callback_metrics_and_the_logger_and_the_folder(tmp_path):
    result = frontier_result()
    trainer = trainer_with(CSVLogger(tmp_path / "logs"))
    log_solution(trainer, result, tmp_path / "compressed")
    figures = summary(result)
    for name, value in figures.items():
        torch.testing.assert_close(trainer.callback_metrics[name], torch.tensor(value), equal_nan=True)
    (metrics,) = (tmp_path / "logs").rglob("metrics.csv")
    with metrics.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert {name: float(row[name]) for name in figures} == figures
    assert {path.name for path in (tmp_path / "compressed").iterdir()} == TABLES | PICTURES
    with (tmp_path / "compressed" / "summary.csv").open(newline="") as file:
        read = {line["name"]: line["value"] for line in csv.DictReader(file)}
    assert float(read["compress/params_model_kept"]) == figures["compress/params_model_kept"]
    assert read["compress/verdict_sentence"].startswith("Worse: ")


def test_sizes_of_exports_are_logged(tmp_path, one_picture):
    trainer = trainer_with(CSVLogger(tmp_path / "logs"))
    exports = [
        ExportedFile("onnx", tmp_path / "model.onnx", 500, 1000, 0.0, ()),
        ExportedFile("pt2", tmp_path / "model.pt2", 600, None, 0.0, ()),
    ]
    log_solution(trainer, tiny_result(), tmp_path, exports=exports)
    sizes = {name: float(value) for name, value in trainer.callback_metrics.items() if "_bytes" in name}
    assert sizes == {"compress/onnx_bytes": 500, "compress/onnx_bytes_dense": 1000, "compress/pt2_bytes": 600}
    assert "compress/onnx_bytes_dense,1000" in (tmp_path / "summary.csv").read_text()


def test_images_of_changed_samples_are_drawn(tmp_path, one_picture):
    result = tiny_result()
    images = {result.changes[0].sample: torch.zeros(8, 8, 3, dtype=torch.uint8)}
    log_solution(trainer_with(), result, tmp_path, images=images)
    assert (tmp_path / "changed_samples.png").is_file()


def test_without_loggers_the_folder_is_written(tmp_path, one_picture):
    trainer = Trainer(logger=False, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False)
    log_solution(trainer, tiny_result(), tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "layers.csv").is_file()


def test_other_ranks_have_the_metrics_but_write_nothing(tmp_path, monkeypatch, one_picture):
    trainer = trainer_with(CSVLogger(tmp_path / "logs"))
    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda self: False))
    log_solution(trainer, tiny_result(), tmp_path / "compressed")
    assert "compress/params_model_kept" in trainer.callback_metrics
    assert not (tmp_path / "compressed").exists()
    assert not list((tmp_path / "logs").rglob("metrics.csv"))


class Broken(CSVLogger):
    def log_metrics(self, metrics, step=None):
        raise OSError(28, "No space left on device")


def test_a_broken_logger_and_folder_are_warnings_and_the_others_go_on(tmp_path, one_picture):
    (tmp_path / "file").write_text("no folder")
    trainer = trainer_with(Broken(tmp_path / "broken"), CSVLogger(tmp_path / "logs"))
    with pytest.warns(UserWarning, match="Compression") as caught:
        log_solution(trainer, tiny_result(), tmp_path / "file")
    messages = [str(warning.message) for warning in caught if "Compression:" in str(warning.message)]
    assert [message.split(" (")[0] for message in messages] == [
        "Compression: could not write the tables",
        "Compression: could not write the pictures",
        "Compression: could not log to Broken",
    ]
    assert "No space left on device" in messages[-1]
    assert list((tmp_path / "logs").rglob("metrics.csv"))


def test_a_picture_that_cannot_be_drawn_costs_only_itself(tmp_path, monkeypatch):
    def fail(result):
        raise RuntimeError("no ink")

    monkeypatch.setattr(plots, "PICTURES", {"ranks": fail, "layers": plots.PICTURES["layers"]})
    with pytest.warns(UserWarning, match="could not draw ranks .RuntimeError: no ink"):
        log_solution(trainer_with(), tiny_result(), tmp_path / "compressed")
    assert {path.name for path in (tmp_path / "compressed").glob("*.png")} == {"layers.png"}


def test_nothing_but_wandb_needs_wandb(tmp_path, monkeypatch, one_picture):
    monkeypatch.setitem(sys.modules, "wandb", None)
    log_solution(trainer_with(CSVLogger(tmp_path / "logs")), tiny_result(), tmp_path / "compressed")
    assert list((tmp_path / "logs").rglob("metrics.csv"))


@pytest.mark.parametrize("wanted", [True, False])
def test_the_artifact_is_logged_only_if_wanted(tmp_path, monkeypatch, wanted, one_picture):
    folders = []
    monkeypatch.setattr(
        "lrf_lightning.callbacks.tracking.log_to_wandb", lambda *arguments, **_: folders.append(arguments[-1])
    )
    log_solution(trainer_with(WandbLogger(offline=True)), tiny_result(), tmp_path / "out", log_artifact=wanted)
    assert folders == [tmp_path / "out" if wanted else None]
