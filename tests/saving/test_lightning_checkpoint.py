import argparse
import copy
import enum
import functools
import os
import pickle
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from omegaconf import OmegaConf
from small_modules import FEATURES, QUICK, Classifier, loader, network, trainer
from torch import nn

from lrf_lightning import CheckpointError, LowRankCheckpointMixin, LowRankCompression, load_compressed, read_metadata
from lrf_lightning.modules import LowRankModule
from lrf_lightning.saving.checkpoint import lightning_checkpoint
from lrf_lightning.saving.lightning_checkpoint import RECORD_KEY
from lrf_lightning.saving.optimizer_state import OPTIMIZERS_KEY
from lrf_lightning.saving.plain_data import plain

BUDGET = {"objective": "budget", "keep": 0.5} | QUICK


def compression(**options):
    return LowRankCompression(dirpath=Path("out"), **(BUDGET | options))


def fitted(module=None, callback=None, **options):
    """A module that was trained and compressed into the folder out, its trainer and the callback."""
    callback = callback or compression()
    module = module or Classifier()
    runner = trainer(callbacks=[callback, *options.pop("callbacks", [])], **options)
    runner.fit(module, loader(), loader(seed=1, samples=192))
    assert callback.result is not None
    assert callback.result.ranks
    return module, runner, callback


def low_rank_names(module):
    return {name for name, layer in module.named_modules() if isinstance(layer, LowRankModule)}


def points():
    return torch.randn(5, FEATURES, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One fit whose files several tests read."""
    folder = tmp_path_factory.mktemp("run")
    before = Path.cwd()
    os.chdir(folder)
    try:
        torch.manual_seed(0)
        module, runner, callback = fitted(callbacks=[ModelCheckpoint(dirpath="checkpoints")], enable_checkpointing=True)
    finally:
        os.chdir(before)
    return module, runner, callback.result, folder / "out" / "compressed.ckpt"


@pytest.fixture(scope="module")
def moments(run):
    """The optimizer's state at the end of that fit by name of the parameter."""
    module, runner, _, _ = run
    numbers = runner.optimizers[0].state_dict()["state"]
    return {name: copy.deepcopy(numbers[i]) for i, (name, _) in enumerate(module.named_parameters())}


def loss_of(model):
    """Mean cross-entropy on test data, computed outside Lightning."""
    total, count = 0.0, 0
    with torch.no_grad():
        for x, y in loader(seed=2):
            total += float(nn.functional.cross_entropy(model.net(x), y, reduction="sum"))
            count += len(y)
    return total / count


class TestFile:
    def test_loads_without_unpickling_code_and_is_what_lightning_expects(self, run):
        _, runner, result, path = run
        content = torch.load(path, weights_only=True)
        assert content["callbacks"] == {}
        assert content["optimizer_states"] == content["lr_schedulers"] == []
        assert content["global_step"] == runner.global_step > 0
        assert content["epoch"] == 2
        expected = result.model.state_dict()
        assert content["state_dict"].keys() == expected.keys()
        assert all(torch.equal(content["state_dict"][name], tensor) for name, tensor in expected.items())

    def test_description(self, run):
        _, _, result, path = run
        record = read_metadata(path)
        assert record["ranks"] == result.ranks
        assert record["certificate"]["verdict"] == result.certificate.verdict
        folder = read_metadata(path.parent)
        assert {k: v for k, v in record.items() if k in folder and k != "weights_hash"} == {
            k: v for k, v in folder.items() if k in record and k != "weights_hash"
        }

    def test_load_compressed_reads_it_too(self, run):
        _, _, result, path = run
        for source in (path, path.parent):
            loaded = load_compressed(Classifier(), source)
            assert torch.equal(loaded.net(points()), result.model.net(points()))

    def test_the_live_module_stays_dense_and_the_strategy_as_it_was(self, run):
        module, runner, _, _ = run
        assert not low_rank_names(module)
        assert "lightning_module_state_dict" not in vars(runner.strategy)

    def test_changed_weights_are_refused(self, run, tmp_path):
        content = torch.load(run[3], weights_only=True)
        content["state_dict"]["net.0.bias"][0] += 1
        torch.save(content, tmp_path / "changed.ckpt")
        with pytest.raises(CheckpointError, match="were changed after it was written"):
            load_compressed(Classifier(), tmp_path / "changed.ckpt")

    @pytest.mark.parametrize("share", [0.3, 0.99])
    def test_truncated_file_is_refused(self, run, tmp_path, share):
        content = run[3].read_bytes()
        (tmp_path / "short.ckpt").write_bytes(content[: int(share * len(content))])
        with pytest.raises(CheckpointError, match="damaged or truncated"):
            load_compressed(Classifier(), tmp_path / "short.ckpt")

    def test_dense_checkpoint_is_refused(self, run, tmp_path):
        torch.save({"state_dict": Classifier().state_dict()}, tmp_path / "dense.ckpt")
        with pytest.raises(CheckpointError, match="holds no compressed model: it has no entry 'lrf_lightning'"):
            load_compressed(Classifier(), tmp_path / "dense.ckpt")

    def test_checkpoint_without_weights_is_refused(self, run, tmp_path):
        content = torch.load(run[3], weights_only=True)
        del content["state_dict"]
        torch.save(content, tmp_path / "empty.ckpt")
        with pytest.raises(CheckpointError, match="has no state_dict"):
            load_compressed(Classifier(), tmp_path / "empty.ckpt")


class TestTrainer:
    @pytest.mark.parametrize("stage", ["validate", "test"])
    def test_evaluation_of_a_dense_module_of_the_users_class(self, run, stage):
        _, _, result, path = run
        fresh = Classifier()
        runner = trainer(callbacks=[compression()])
        [metrics] = getattr(runner, stage)(fresh, loader(seed=2), ckpt_path=path, verbose=False)
        [value] = metrics.values()
        assert value == pytest.approx(loss_of(result.model), abs=1e-6)
        assert low_rank_names(fresh) == set(result.ranks)

    def test_predict(self, run):
        class Predictor(Classifier):
            def predict_step(self, batch, batch_idx):
                return self.net(batch[0])

        _, _, result, path = run
        outputs = trainer(callbacks=[compression()]).predict(Predictor(), loader(seed=2), ckpt_path=path)
        expected = torch.cat([result.model.net(x) for x, _ in loader(seed=2)])
        assert torch.equal(torch.cat(outputs), expected)

    def test_best_still_is_the_dense_model(self, run):
        module, runner, result, path = run
        dense = loss_of(module)
        assert dense != pytest.approx(loss_of(result.model), abs=1e-6)
        for source, expected in (("best", dense), (path, loss_of(result.model)), ("best", dense)):
            [metrics] = runner.test(module, loader(seed=2), ckpt_path=source, verbose=False)
            assert metrics["test/loss"] == pytest.approx(expected, abs=1e-6)
        assert not low_rank_names(module)

    def test_best_after_replacing_in_place(self):
        module, runner, callback = fitted(
            callback=compression(in_place=True),
            callbacks=[ModelCheckpoint(dirpath="checkpoints")],
            enable_checkpointing=True,
        )
        assert low_rank_names(module) == set(callback.result.ranks)
        dense = Classifier()
        state = torch.load(runner.checkpoint_callback.best_model_path, weights_only=True)["state_dict"]
        dense.load_state_dict(state)
        [metrics] = runner.test(module, loader(seed=2), ckpt_path="best", verbose=False)
        assert metrics["test/loss"] == pytest.approx(loss_of(dense), abs=1e-6)
        assert not low_rank_names(module)

    def test_future_version_is_refused(self, run, tmp_path):
        content = torch.load(run[3], weights_only=True)
        content[RECORD_KEY]["format_version"] = 7
        torch.save(content, tmp_path / "future.ckpt")
        with pytest.raises(CheckpointError, match="format version 7"):
            trainer(callbacks=[compression()]).test(Classifier(), loader(), ckpt_path=tmp_path / "future.ckpt")

    def test_changed_weights_are_refused_unless_the_module_changes_them_itself(self, run, tmp_path):
        content = torch.load(run[3], weights_only=True)
        content["state_dict"]["net.0.bias"] += 1e-3
        torch.save(content, tmp_path / "changed.ckpt")
        with pytest.raises(CheckpointError, match="the weights in the checkpoint were changed after it was written"):
            trainer(callbacks=[compression()]).test(Classifier(), loader(), ckpt_path=tmp_path / "changed.ckpt")

        class Changing(Classifier):
            def on_load_checkpoint(self, checkpoint):
                checkpoint["state_dict"]["net.0.bias"] += 1e-3

        module = Changing()
        trainer(callbacks=[compression()]).test(module, loader(), ckpt_path=run[3], verbose=False)
        torch.testing.assert_close(module.net[0].bias, run[2].model.net[0].bias + 1e-3)

    def test_missing_and_misshapen_tensors_are_refused(self, run, tmp_path):
        for edit, match in (
            (lambda state: state.pop("net.0.bias"), 'Missing key.*"net.0.bias"'),
            (lambda state: state.update({"net.0.bias": torch.ones(3)}), "size mismatch for net.0.bias"),
            (lambda state: state.update({"net.9.weight": torch.ones(3)}), 'Unexpected key.*"net.9.weight"'),
        ):
            content = torch.load(run[3], weights_only=True)
            edit(content["state_dict"])
            torch.save(content, tmp_path / "edited.ckpt")
            with pytest.raises(RuntimeError, match=match):
                trainer(callbacks=[compression()]).test(Classifier(), loader(), ckpt_path=tmp_path / "edited.ckpt")


class TestResume:
    def test_training_goes_on_with_the_compressed_model(self, run):
        _, first, result, path = run
        started = {}

        class Record(pl.Callback):
            def on_train_start(self, trainer, pl_module):
                started.update(weights={n: p.detach().clone() for n, p in pl_module.named_parameters()})
                started.update(state=trainer.optimizers[0].state_dict()["state"], step=trainer.global_step)
                started.update(held={id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]})

        module = Classifier()
        callback = compression(save=False, strict=False)
        runner = trainer(callbacks=[callback, Record()], max_epochs=4)
        runner.fit(module, loader(), loader(seed=1, samples=192), ckpt_path=path)
        assert runner.current_epoch == 4
        assert runner.global_step == 2 * first.global_step
        assert started["step"] == first.global_step
        for name, parameter in result.model.named_parameters():
            assert torch.equal(started["weights"][name], parameter), name
        assert {id(p) for p in module.parameters()} == started["held"]
        assert low_rank_names(module) == set(result.ranks)
        runner.save_checkpoint("trained.ckpt")
        loaded = load_compressed(Classifier(), "trained.ckpt")
        assert torch.equal(loaded.net(points()), module.net(points()))
        record = read_metadata("trained.ckpt")
        assert (record["ranks"], record["certificate"], record["judged_weights"]) == (result.ranks, None, False)
        # every parameter was trained, the factors among them
        assert all(not torch.equal(started["weights"][n], p) for n, p in module.named_parameters())

    def test_optimizer_state_of_untouched_parameters_is_kept(self, run, moments):
        _, _, result, path = run
        untouched = {name for name, _ in result.model.named_parameters() if name in moments}
        assert len(untouched) >= 3
        found = {}

        class Record(pl.Callback):
            def on_train_start(self, trainer, pl_module):
                names = {id(p): n for n, p in pl_module.named_parameters()}
                found.update(
                    {names[id(p)]: {k: v.clone() for k, v in s.items()} for p, s in trainer.optimizers[0].state.items()}
                )

        runner = trainer(callbacks=[compression(save=False), Record()], max_epochs=3)
        runner.fit(Classifier(), loader(), loader(seed=1, samples=192), ckpt_path=path)
        assert found.keys() == untouched
        for name in untouched:
            assert found[name].keys() == {"step", "exp_avg", "exp_avg_sq"}
            for key, value in found[name].items():
                torch.testing.assert_close(value, moments[name][key], rtol=0, atol=0)

    def test_what_is_compressed_a_second_time_loads_with_the_ranks_of_both(self, run):
        _, _, first, path = run
        callback = compression()
        trainer(callbacks=[callback], max_epochs=3).fit(
            Classifier(), loader(), loader(seed=1, samples=192), ckpt_path=path
        )
        ranks = first.ranks | callback.result.ranks
        assert len(ranks) > len(callback.result.ranks) > 0
        for source in ("out", "out/compressed.ckpt"):
            assert read_metadata(source)["ranks"] == ranks
            loaded = load_compressed(Classifier(), source)
            assert torch.equal(loaded.net(points()), callback.result.model.net(points()))

    def test_another_optimizer_starts_without_a_state(self, run):
        class Momentum(Classifier):
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

        class Record(pl.Callback):
            def on_train_start(self, trainer, pl_module):
                self.state = dict(trainer.optimizers[0].state)

        record = Record()
        runner = trainer(callbacks=[compression(save=False), record], max_epochs=3)
        runner.fit(Momentum(), loader(), loader(seed=1, samples=192), ckpt_path=run[3])
        assert record.state == {}

    def test_state_that_is_not_kept_per_parameter_is_left_out(self):
        class Newton(Classifier):
            def configure_optimizers(self):
                return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=2)

        fitted(Newton())
        [entry] = torch.load("out/compressed.ckpt", weights_only=True)[OPTIMIZERS_KEY]
        assert entry == {"optimizer": "LBFGS", "state": {}}
        runner = trainer(callbacks=[compression(save=False)], max_epochs=3)
        runner.fit(Newton(), loader(), loader(seed=1, samples=192), ckpt_path="out/compressed.ckpt")
        assert runner.current_epoch == 3


class Level(str, enum.Enum):
    LOW = "low"


class Configured(Classifier):
    def __init__(self, width=24, optimizer=None, config=None, level=Level.LOW, rate=np.float64(0.5), folder=Path("a")):  # noqa: B008
        super().__init__(network(width))
        self.save_hyperparameters()


class TestPlainData:
    def test_hyper_parameters_load_safely_and_the_rest_is_listed(self, caplog):
        config = OmegaConf.create({"a": {"b": [1, 2]}, "c": "${a.b}"})
        fitted(Configured(width=20, optimizer=functools.partial(torch.optim.Adam, lr=0.1), config=config))
        content = torch.load("out/compressed.ckpt", weights_only=True)
        assert content["hyper_parameters"] == {
            "width": 20,
            "config": {"a": {"b": [1, 2]}, "c": [1, 2]},
            "level": "low",
            "rate": 0.5,
            "folder": "a",
        }
        assert content[RECORD_KEY]["dropped"] == ["hyper_parameters.optimizer"]
        assert "leaves out hyper_parameters.optimizer" in caplog.text
        loaded = trainer(callbacks=[compression()])
        loaded.test(Configured(width=20), loader(), ckpt_path="out/compressed.ckpt", verbose=False)

    def test_entries_of_the_modules_own_hook_are_kept(self):
        class Hooked(Classifier):
            def on_save_checkpoint(self, checkpoint):
                checkpoint["names"] = {"keys": sorted(checkpoint["state_dict"])}
                checkpoint["function"] = len

        _, _, callback = fitted(Hooked())
        content = torch.load("out/compressed.ckpt", weights_only=True)
        assert content["names"]["keys"] == sorted(callback.result.model.state_dict())
        assert "function" not in content

    def test_other_weights_from_the_modules_own_hook_are_not_taken(self):
        class Averaged(Classifier):
            def on_save_checkpoint(self, checkpoint):
                checkpoint["state_dict"] = self.state_dict()

        _, _, callback = fitted(Averaged())
        content = torch.load("out/compressed.ckpt", weights_only=True)
        assert content["state_dict"].keys() == callback.result.model.state_dict().keys()

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (None, None),
            (True, True),
            (np.int32(3), 3),
            (np.arange(2.0), [0.0, 1.0]),
            ((1, Level.LOW), (1, "low")),
            ({1}, [1]),
            (argparse.Namespace(a=Path("b")), {"a": "b"}),
            (OmegaConf.create({"a": "${missing}"}), {"a": "${missing}"}),
            ({("a", 1): b"x"}, {("a", 1): b"x"}),
            (torch.float16, torch.float16),
        ],
    )
    def test_conversions(self, value, expected):
        dropped = []
        found = plain(value, "x", dropped)
        assert found == expected
        assert type(found) is type(expected)
        assert dropped == []

    def test_what_has_no_plain_form_is_left_out_and_named(self):
        dropped = []
        value = {"f": len, "deep": [{"g": object(), "h": 1}], "list": [1, len], len: 2}
        assert plain(value, "x", dropped) == {"deep": [{"h": 1}]}
        assert dropped == ["x.f", "x.deep[0].g", "x.list[1]", f"x.{len}"]
        assert plain(len, "y", dropped) is None

    def test_extra_state_that_would_need_pickle_is_refused(self):
        class Odd(Classifier):
            def get_extra_state(self):
                return {"f": len}

            def set_extra_state(self, state):
                pass

        with pytest.warns(UserWarning, match=r"'_extra_state.f' in the state dict cannot be loaded without"):
            fitted(Odd())
        assert not Path("out/compressed.ckpt").exists()


class TestWriting:
    def test_interrupted_write_leaves_the_old_file(self, run, tmp_path, monkeypatch):
        module, runner, result, _ = run
        path = tmp_path / "deep" / "model.ckpt"
        assert lightning_checkpoint(runner, module, result, path) == path
        content = path.read_bytes()

        def interrupted(source, target):
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lightning_checkpoint(runner, module, result, path)
        assert path.read_bytes() == content
        assert list(path.parent.iterdir()) == [path]

    def test_failure_is_a_warning_that_names_the_cause_and_the_other_files_are_written(self, monkeypatch):
        import lrf_lightning.safe_files as files

        write = files.write_bytes

        def failing(path, content):
            if str(path).endswith(".ckpt"):
                raise OSError(28, "No space left on device")
            write(path, content)

        monkeypatch.setattr(files, "write_bytes", failing)
        with pytest.warns(UserWarning, match="could not write the Lightning checkpoint .*No space left on device"):
            _, _, callback = fitted()
        loaded = load_compressed(Classifier(), "out")
        assert torch.equal(loaded.net(points()), callback.result.model.net(points()))

    def test_plugins_for_checkpoints_are_used(self):
        written = []

        class Noted(TorchCheckpointIO):
            def save_checkpoint(self, checkpoint, path, storage_options=None):
                written.append(str(path))
                super().save_checkpoint(checkpoint, path, storage_options)

        fitted(plugins=[Noted()])
        assert [os.path.basename(path) for path in written] == ["compressed.ckpt"]
        assert read_metadata("out/compressed.ckpt")["format_version"] == 3


class Mixed(LowRankCheckpointMixin, Classifier):
    pass


class TestMixin:
    def test_load_from_checkpoint(self, run):
        _, _, result, path = run
        loaded = Mixed.load_from_checkpoint(path)
        assert low_rank_names(loaded) == set(result.ranks)
        assert torch.equal(loaded.net(points()), result.model.net(points()))

    def test_trainer_without_the_callback(self, run):
        [metrics] = trainer().test(Mixed(), loader(seed=2), ckpt_path=run[3], verbose=False)
        assert metrics["test/loss"] == pytest.approx(loss_of(run[2].model), abs=1e-6)

    def test_order_of_bases_is_checked(self):
        with pytest.raises(TypeError, match="Wrong: LowRankCheckpointMixin has to stand before LightningModule"):

            class Wrong(Classifier, LowRankCheckpointMixin):
                pass

    def test_weights_of_forked_workers_reach_the_main_process(self):
        module = Mixed()
        runner = trainer(callbacks=[compression(in_place=True)], strategy="ddp_fork", devices=1)
        try:
            runner.fit(module, loader(), loader(seed=1, samples=192))
        finally:
            os.environ.pop("MASTER_PORT", None)
        expected = load_compressed(Classifier(), "out")
        assert low_rank_names(module) == low_rank_names(expected)
        assert torch.equal(module.net(points()), expected.net(points()))

    def test_can_be_pickled(self):
        again = pickle.loads(pickle.dumps(Mixed()))
        assert len(again._load_state_dict_pre_hooks) == 1
