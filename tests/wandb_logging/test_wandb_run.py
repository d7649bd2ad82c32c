import dataclasses
import json
from pathlib import Path

import pytest
import torch
import wandb
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from small_modules import Classifier, loader
from small_modules import trainer as small_trainer
from tiny_result import frontier_result, with_certificate
from wandb_records import items, records

from lrf_lightning.reports.summary import summary
from lrf_lightning.reports.tables import change_rows, frontier_rows, layer_rows, probe_rows
from lrf_lightning.reports.verdict import verdict_sentence
from lrf_lightning.wandb_logging.artifacts import _metadata, aliases, dense_checkpoint
from lrf_lightning.wandb_logging.run import Media, log_to_wandb


@pytest.fixture
def folder(tmp_path):
    """A saved model with a file of the user's beside it."""
    folder = tmp_path / "compressed"
    folder.mkdir()
    for name in ("model.safetensors", "compression.json", "compressed.ckpt", "layers.csv", "frontier.png", "my.ckpt"):
        (folder / name).write_bytes(name.encode())
    return folder


@pytest.fixture
def bare_trainer():
    return Trainer(logger=False, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False)


def log_and_read(tmp_path, trainer, result, folder, images=None):
    """Log into a run that the user opened; its records, and the files of its media."""
    sink = WandbLogger(save_dir=tmp_path / "logs", offline=True, project="test")
    sink.log_metrics({"val/loss": 0.5}, step=3)
    run = sink.experiment
    media = Media({"frontier": tiny_png()}, images or {})
    log_to_wandb(sink, trainer, result, summary(result), media, folder)
    assert sink.experiment is run
    assert wandb.run is run
    wandb.finish()
    wandb.teardown()  # the file may be empty before
    (path,) = (tmp_path / "logs").rglob("*.wandb")
    return list(records(path)), path.parent / "files"


def tiny_png():
    from io import BytesIO

    buffer = BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, format="png")
    return buffer.getvalue()


def test_an_offline_run_holds_everything(tmp_path, folder, bare_trainer):
    result = with_certificate(frontier_result(), verdict="not worse")
    sample = result.changes[1].sample
    images = {sample: torch.full((8, 8, 1), 7, dtype=torch.uint8)}
    found, files = log_and_read(tmp_path, bare_trainer, result, folder, images)
    history = [items(record.history.item) for record in found if record.WhichOneof("record_type") == "history"]
    final = {}
    for record in found:
        if record.WhichOneof("record_type") == "summary":
            final |= items(record.summary.update)
    figures = summary(result)
    assert {name: final[name] for name in figures} == figures
    assert final["compress/verdict"] == "not worse"
    assert final["compress/verdict_sentence"] == verdict_sentence(result)

    logged = {name: value for row in history for name, value in row.items()}
    for name, rows in (("layers", layer_rows(result)), ("frontier", frontier_rows(result))):
        table = json.loads((files / logged[f"compress/{name}"]["path"]).read_text())
        assert table["columns"] == list(rows[0])
        assert table["data"] == [list(row.values()) for row in rows]
    for name in ("ranks", "curves", "probes"):
        assert logged[f"compress/{name}"]["_type"] == "table-file"
    picture = logged["compress/pictures/frontier"]
    assert (picture["_type"], picture["width"]) == ("image-file", 4)
    assert (files / picture["path"]).is_file()

    # the images of a table are in the artifact that holds it
    (stored,) = [r.artifact for r in found if r.HasField("artifact") and "compresschanges" in r.artifact.name]
    entries = {entry.path: Path(entry.local_path) for entry in stored.manifest.contents}
    changes = json.loads(entries["compress/changes.table.json"].read_text())
    assert changes["columns"] == ["image", *change_rows(result)[0]]
    assert [row[1:] for row in changes["data"]] == [list(row.values()) for row in change_rows(result)]
    assert [index for index, row in enumerate(changes["data"]) if row[0] is not None] == [1]
    shown = Image.open(entries[changes["data"][1][0]["path"]])
    assert (shown.size, shown.getpixel((0, 0))) == ((8, 8), 7)

    frontier = json.loads((files / logged["compress/charts/frontier_loss_table"]["path"]).read_text())
    assert frontier["columns"] == [
        "parameters kept (% of the whole model)",
        "change of the loss (compressed - original)",
    ]
    kept = [100 * row["params_model_kept"] for row in frontier_rows(result)]
    assert [row[0] for row in frontier["data"]] == pytest.approx(kept)
    pairs = json.loads((files / logged["compress/charts/predicted_vs_measured_table"]["path"]).read_text())
    assert len(pairs["data"]) == len(probe_rows(result)) + len(result.frontier)

    points = [row for row in history if "compress/frontier_point/params_model_kept" in row]
    assert [row["compress/frontier_point/loss_change"] for row in points] == [0.0, -0.001, 0.002, 0.01, 0.1, 0.7]
    metrics = {
        record.metric.name or record.metric.glob_name: record.metric for record in found if record.HasField("metric")
    }
    for name in ("loss", "loss_change", "score", "score_change"):
        assert metrics[f"compress/frontier_point/{name}"].step_metric == "compress/frontier_point/params_model_kept"
    assert not [name for name in final if "frontier_point" in name], "the last point is not the result"

    config, charts = {}, {}
    for record in found:
        if record.HasField("config"):
            update = items(record.config.update)
            charts |= update.get("_wandb", {}).get("visualize", {})
            config |= update
    assert config["compress"]["objective"] == "budget"
    assert charts["compress/charts/frontier_score"]["panel_config"]["panelDefId"] == "wandb/scatter/v0"

    (artifact,) = [r.artifact for r in found if r.HasField("artifact") and r.artifact.type == "model"]
    run_id = next(record.run.run_id for record in found if record.HasField("run"))
    assert artifact.name == f"compressed-{run_id}"
    assert set(artifact.aliases) == {"latest", "budget", "best"}
    assert final["compress/best_params_model"] == result.params_model[1]
    contents = {entry.path for entry in artifact.manifest.contents}
    assert contents == {"model.safetensors", "compression.json", "compressed.ckpt", "layers.csv", "frontier.png"}
    metadata = json.loads(artifact.metadata)
    assert json.loads(metadata["ranks"]) == result.ranks
    assert metadata["params_model_after"] == result.params_model[1]
    assert metadata["verdict"] == "not worse"
    assert len(metadata) <= 100


def test_odd_values_and_an_unchanged_model_are_logged_without_artifact(tmp_path, folder, bare_trainer):
    result = with_certificate(frontier_result(), verdict="unchanged")
    broken = dataclasses.replace(result.frontier[0], loss=float("nan"), loss_change=float("inf"))
    settings = dataclasses.replace(result.settings, predicate=lambda name, module: True)
    result = dataclasses.replace(result, ranks={}, frontier=[broken], settings=settings)
    found, files = log_and_read(tmp_path, bare_trainer, result, folder)
    assert not [r for r in found if r.HasField("artifact") and r.artifact.type == "model"]
    (table,) = (files / "media" / "table" / "compress").glob("frontier_*")
    assert len(json.loads(table.read_text())["data"]) == 2
    (config,) = [items(r.config.update) for r in found if r.HasField("config") and "predicate" in str(r.config.update)]
    assert config["compress"]["predicate"].startswith("<function")


@pytest.mark.parametrize(
    ("objective", "verdict", "alias"),
    [
        ("lossless", "better", "lossless"),
        ("compact", "not worse", "compact"),
        ("lossless", "inconclusive", "lossless-inconclusive"),
        ("lossless", "worse", "lossless-worse"),
    ],
)
def test_a_lossy_model_is_no_alias_lossless(objective, verdict, alias):
    result = with_certificate(frontier_result(), verdict=verdict)
    settings = dataclasses.replace(result.settings, objective=objective)
    assert aliases(dataclasses.replace(result, settings=settings)) == [alias]
    assert aliases(dataclasses.replace(result, settings=settings, certificate=None)) == [f"{objective}-unverified"]


class Broken(WandbLogger):
    """Its connection is lost."""

    def __init__(self):
        super().__init__(offline=True)
        self.asked = 0

    @property
    def experiment(self):
        self.asked += 1
        raise ConnectionError("connection lost")


def test_a_lost_connection_is_a_warning(folder, bare_trainer):
    result, sink = frontier_result(), Broken()
    with pytest.warns(UserWarning, match="could not log .* to W&B .ConnectionError: connection lost") as caught:
        log_to_wandb(sink, bare_trainer, result, summary(result), Media(), folder)
    assert len(caught) == sink.asked == 8


@pytest.fixture
def checkpointed(tmp_path):
    """What a fit with checkpoints of all kinds looks like when it ends."""

    def fit(*others, **options):
        saving = ModelCheckpoint(tmp_path / "checkpoints", filename="{epoch}", **options)
        run = small_trainer(callbacks=[*others, saving], enable_checkpointing=True)
        run.fit(Classifier(), loader(), loader(seed=1))
        return run

    return fit


def test_the_dense_checkpoint_is_the_file_with_the_weights_that_were_compressed(checkpointed, bare_trainer, tmp_path):
    assert dense_checkpoint(bare_trainer, "last") is None
    watched = checkpointed(monitor="train/loss", mode="min", save_last=True)
    assert dense_checkpoint(watched, "last").name == "last.ckpt"
    assert dense_checkpoint(watched, "best").name == "epoch=1.ckpt"
    watched = checkpointed(monitor="train/loss", mode="max", save_last=True)
    assert dense_checkpoint(watched, "best").name == "epoch=0.ckpt"
    # Lightning before 2.6 writes the last weights although they are not the best, later versions leave the older file
    last = dense_checkpoint(watched, "last")
    assert last is None or torch.load(last, weights_only=False)["global_step"] == watched.global_step
    periodic = ModelCheckpoint(tmp_path / "periodic", filename="{epoch}")
    several = checkpointed(periodic, monitor="train/loss", mode="max")
    assert dense_checkpoint(several, "best").parent.name == "checkpoints", "the first one watches nothing"
    without = checkpointed(monitor="train/loss", mode="max")
    assert dense_checkpoint(without, "last") is None, "the best weights are others"
    assert dense_checkpoint(checkpointed(), "last").name.startswith("epoch=1")
    assert dense_checkpoint(checkpointed(every_n_epochs=3), "last") is None, "none was written"
    saving = ModelCheckpoint(tmp_path / "early", every_n_epochs=2)
    early = small_trainer(max_epochs=3, callbacks=[saving], enable_checkpointing=True)
    early.fit(Classifier(), loader(), loader(seed=1))
    assert dense_checkpoint(early, "last") is None, "that of the second epoch is older"


def test_the_dense_checkpoint_of_a_model_that_was_only_loaded(checkpointed, tmp_path):
    path = dense_checkpoint(checkpointed(save_last=True), "last")
    run = small_trainer()
    run.validate(Classifier(), loader(seed=1), ckpt_path=path, verbose=False)
    assert dense_checkpoint(run, "last") == path


def test_the_artifact_names_the_dense_checkpoint_and_the_smallest_model_is_best(tmp_path, folder, checkpointed):
    trainer = checkpointed(save_last=True)
    large = with_certificate(frontier_result(), verdict="better")
    small = dataclasses.replace(large, params_model=(large.params_model[0], 10))
    smallest = dataclasses.replace(with_certificate(large, verdict="worse"), params_model=(large.params_model[0], 5))
    sink = WandbLogger(save_dir=tmp_path / "logs", offline=True)
    for result in (small, large, smallest):
        log_to_wandb(sink, trainer, result, summary(result), Media(), folder)
    wandb.finish()
    wandb.teardown()
    (path,) = (tmp_path / "logs").rglob("*.wandb")
    found = [record.artifact for record in records(path) if record.HasField("artifact")]
    dense = [artifact for artifact in found if artifact.name.startswith("dense-")][-1]
    assert set(dense.aliases) == {"latest", "last"}
    (entry,) = dense.manifest.contents
    assert entry.ref == (tmp_path / "checkpoints" / "last.ckpt").as_uri()
    first, second, third = [artifact for artifact in found if artifact.name.startswith("compressed-")]
    assert set(first.aliases) == {"latest", "budget", "best"}
    assert set(second.aliases) == {"latest", "budget"}, "a larger one is not the best"
    assert set(third.aliases) == {"latest", "budget-worse"}, "a worse one is not the best"
    metadata = json.loads(first.metadata)
    assert (metadata["dense_artifact"], metadata["dense_digest"]) == (dense.name, dense.digest)
    assert metadata["dense_checkpoint"].endswith("last.ckpt")


def test_the_metadata_of_the_artifact_has_fewer_keys_than_wandb_takes():
    result = frontier_result()
    calls = [f"{runtime}_batch_{size}" for runtime in ("eager", "compile") for size in ("1", "large")]
    times = {f"compress/{kind}/{call}": 1.0 for call in calls for kind in ("latency_dense", "throughput_compressed")}
    stages = {f"compress/seconds/{index}": 1.0 for index in range(30)}
    found = _metadata(result, summary(result) | times | stages)
    assert "params_model_after" in found
    assert not any(name.startswith(("seconds", "latency_dense", "throughput")) for name in found)
    assert len(found) < 80
