import csv
import os
from collections import Counter

import pytest
import torch
import wandb
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from small_modules import QUICK, Classifier, loader, trainer
from torch import nn
from wandb_records import items, records

from lrf_lightning import LowRankCompression, RankMonitor
from lrf_lightning.callbacks import rank_monitor

LAYERS = ("net.0", "net.2", "net.4")
KINDS = ("effective", "stable", "numerical", "energy")


@pytest.fixture(autouse=True)
def _unhurried(monkeypatch):
    """As if every training took long enough; nothing but one test is about time."""
    monkeypatch.setattr(rank_monitor, "PARTS", dict.fromkeys(rank_monitor.PARTS, 1e9))
    yield
    os.environ.pop("MASTER_PORT", None)


def fit(monitor, *callbacks, module=None, validation=True, **options):
    run = trainer(callbacks=[*callbacks, monitor], **options)
    run.fit(module or Classifier(), loader(), loader(seed=1) if validation else None)
    return run


def rows(folder):
    (path,) = folder.rglob("metrics.csv")
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if any(row.get(f"rank_{kind}/net.0") for kind in KINDS)]


def test_every_layer_is_logged_every_few_epochs(tmp_path):
    monitor, module = RankMonitor(every_n_epochs=2), Classifier()
    run = fit(monitor, module=module, logger=CSVLogger(tmp_path), max_epochs=5)
    logged = rows(tmp_path)
    assert [int(row["step"]) for row in logged] == [12, 24]
    for layer in LAYERS:
        for kind in KINDS:
            assert float(logged[1][f"rank_{kind}/{layer}"]) > 0
    assert sorted(monitor.history) == [2, 4]
    figures = run.callback_metrics
    assert 0 < float(figures["rank/params_model_kept"]) <= 1
    total = sum(parameter.numel() for parameter in module.parameters())
    assert float(figures["rank/params_model"]) == pytest.approx(float(figures["rank/params_model_kept"]) * total)
    assert float(figures["rank_params/net.2"]) <= 24 * 24
    assert float(figures["rank/time_share"]) > 0


def test_the_ranks_are_those_of_the_weights(tmp_path):
    module = Classifier()
    run = fit(RankMonitor(), module=module, logger=CSVLogger(tmp_path), max_epochs=3)
    values = torch.linalg.svdvals(module.net[2].weight.detach().double())
    stable = float(values.square().sum() / values[0] ** 2)
    assert float(run.callback_metrics["rank_stable/net.2"]) == pytest.approx(stable, rel=1e-4)


def test_training_is_the_same_with_and_without(tmp_path):
    weights = []
    for callbacks in ([], [RankMonitor()]):
        torch.manual_seed(3)
        module = Classifier(nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Dropout(0.3), nn.Linear(24, 4)))
        trainer(callbacks=callbacks).fit(module, loader(shuffle=True), loader(seed=1))
        weights.append(module.state_dict())
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)


def test_the_picture_lies_in_the_folder_of_the_run(tmp_path):
    fit(RankMonitor(predict=False), logger=CSVLogger(tmp_path, version="first"))
    assert (tmp_path / "lightning_logs" / "first" / "ranks" / "spectra.png").read_bytes()[:4] == b"\x89PNG"


def test_without_logger_picture_or_validation_data(tmp_path):
    with pytest.warns(UserWarning, match="RankMonitor could not predict .ValueError: there is no data"):
        run = fit(RankMonitor(), validation=False, default_root_dir=tmp_path)
    assert "rank_effective/net.0" in run.callback_metrics
    assert "rank/params_model" not in run.callback_metrics
    assert (tmp_path / "ranks" / "spectra.png").is_file()
    fit(RankMonitor(picture=False), default_root_dir=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_fast_dev_run_leaves_no_files(tmp_path):
    fit(RankMonitor(), default_root_dir=tmp_path, fast_dev_run=True)
    assert not list(tmp_path.rglob("*.png"))


def test_wandb_gets_figures_and_picture_in_its_own_run(tmp_path):
    sink = WandbLogger(save_dir=tmp_path / "logs", offline=True)
    fit(RankMonitor(), logger=sink)
    wandb.finish()
    wandb.teardown()
    (path,) = (tmp_path / "logs").rglob("*.wandb")
    history = [items(record.history.item) for record in records(path) if record.HasField("history")]
    seen = Counter(name for row in history for name in row)
    assert seen["rank_effective/net.2"] == 2
    pictures = [row["rank/pictures/spectra"] for row in history if "rank/pictures/spectra" in row]
    assert all((path.parent / "files" / picture["path"]).is_file() for picture in pictures)
    assert pictures


class Slow(RankMonitor):
    """Counts how often the ranks are measured."""

    measured = 0

    def _ranks(self, trainer, pl_module):
        self.measured += 1
        return super()._ranks(trainer, pl_module)


def test_what_takes_too_long_is_done_at_the_end_only(monkeypatch):
    monkeypatch.setattr(rank_monitor, "PARTS", dict.fromkeys(rank_monitor.PARTS, 1e-9))
    monitor = Slow()
    run = fit(monitor, max_epochs=4)
    assert monitor.measured == 1
    assert list(monitor.history) == [4]
    assert "rank/params_model" in run.callback_metrics
    monkeypatch.setattr(rank_monitor, "GRACE", 0.0)
    assert "rank_effective/net.0" not in fit(Slow()).callback_metrics


class Broken(CSVLogger):
    def log_metrics(self, metrics, step=None):
        if "rank/seconds" in metrics:
            raise OSError(28, "No space left on device")


class Diverged(Classifier):
    def on_train_epoch_end(self):
        with torch.no_grad():
            self.net[0].weight.fill_(float("nan"))


def test_nothing_that_fails_fails_the_training(tmp_path):
    with pytest.warns(UserWarning, match="could not log ranks to Broken .OSError: .Errno 28. No space left"):
        run = fit(RankMonitor(), logger=Broken(tmp_path))
    assert run.current_epoch == 2
    with pytest.warns(UserWarning, match=r"RankMonitor could not measure ranks .ValueError: the weight of 'net.0'"):
        fit(RankMonitor(picture=False), module=Diverged())
    (tmp_path / "file").write_text("no folder")
    with pytest.warns(UserWarning, match="could not write the picture of the ranks"):
        fit(RankMonitor(predict=False), default_root_dir=tmp_path / "file")


def test_loss_and_data_of_the_compression_are_used():
    asked = []

    def loss(module, batch):
        asked.append(len(batch[0]))
        return nn.functional.cross_entropy(module.net(batch[0]), batch[1])

    data = loader(40, seed=5, batch_size=20)
    compression = LowRankCompression(loss=loss, calibration=data, strict=True, save=False, **QUICK)
    compression.on_fit_end = lambda *_: None
    fit(RankMonitor(picture=False, samples=30), compression, max_epochs=1)
    assert set(asked) == {20}
    assert len(asked) % 2 == 0


class Attention(Classifier):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)

    def loss(self, batch):
        x = batch[0][:, None]
        return nn.functional.cross_entropy(self.net(self.attention(x, x, x)[0][:, 0]), batch[1])


def test_attention_and_patterns():
    module = Attention()
    run = fit(RankMonitor(include=("attention",), picture=False), module=module)
    names = {name.split("/")[1] for name in run.callback_metrics if name.startswith("rank_effective/")}
    assert names == {f"attention.{part}_proj" for part in ("q", "k", "v", "out")}
    assert isinstance(module.attention, nn.MultiheadAttention)
    with pytest.raises(MisconfigurationException, match="include='nothing' matches no module"):
        fit(RankMonitor(include=("nothing",)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_epochs": 0}, "every_n_epochs=0 must be a whole number of at least 1"),
        ({"samples": 1.5}, "samples=1.5 must be a whole number"),
        ({"max_share": 0}, r"max_share=0 must lie in \(0, 1\]"),
        ({"max_share": "0.1"}, r"max_share='0.1' must lie in \(0, 1\]"),
        ({"predict": "no"}, "RankMonitor: predict='no' is neither True nor False"),
        ({"picture": 0}, "picture=0 is neither True nor False"),
        ({"exclude": 3}, "exclude=3 is not a list of patterns"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        RankMonitor(**options)


def test_a_single_pattern_may_be_a_string():
    monitor = RankMonitor(include="head", exclude=["a", "b"])
    assert monitor.include == ("head",)
    assert monitor.exclude == ("a", "b")


def test_with_ddp_the_first_process_logs(tmp_path):
    fit(RankMonitor(), logger=CSVLogger(tmp_path), strategy="ddp_fork", devices=2, max_epochs=2)
    assert len(rows(tmp_path)) == 2
    assert len(list(tmp_path.rglob("spectra.png"))) == 1
