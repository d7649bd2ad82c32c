"""Classes that ask for their version when they load, as torchvision's MNASNet does."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small_modules import QUICK, Classifier, clouds, loader, network, trainer
from torch import nn
from torch.nn import functional

from lrf_lightning import LowRankCompression, StepOutput, compress, load_compressed


class Versioned(nn.Sequential):
    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if local_metadata.get("version") != 2:
            raise ValueError(f"version should be 2 instead of {local_metadata.get('version')}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def made():
    return Versioned(*network())


def loss(model, batch):
    return StepOutput(functional.cross_entropy(model(batch[0]), batch[1], reduction="none"))


def test_saved_points_and_given_weights(tmp_path):
    splits = [[clouds(seed=seed)] for seed in range(3)]
    options = {"objective": "frontier", "budgets": (0.7, 0.4), **QUICK}
    trained = made()
    result = compress(made(), loss, *splits, weights=trained.state_dict(), **options)
    assert result.dense.loss == pytest.approx(float(loss(trained, splits[1][0]).loss.detach().mean()))
    for point in result.frontier:
        result.at(point.keep).save(tmp_path / f"{point.keep}")
        loaded = load_compressed(made, tmp_path / f"{point.keep}")
        x = splits[2][0][0]
        torch.testing.assert_close(loaded(x), result.at(point.keep).model(x), rtol=0, atol=0)


def test_checkpoints_of_lightning(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="trained")
    callback = LowRankCompression(objective="budget", dirpath=tmp_path / "compressed", strict=True, **QUICK)
    run = trainer(callbacks=[saving, callback], enable_checkpointing=True)
    run.fit(Classifier(made()), loader(), loader(seed=1))
    trained, module = run.lightning_module.net, Classifier(made())
    x, y = clouds(seed=1)
    before = float(loss(trained, (x, y)).loss.detach().mean())
    run.test(module, loader(), ckpt_path=tmp_path / "compressed" / "compressed.ckpt", verbose=False)
    torch.testing.assert_close(module.net(x), callback.result.model.net(x), rtol=0, atol=0)
    # names in the checkpoint of the original stand behind "net."
    splits = [[clouds(seed=0)], [(x, y)], [clouds(seed=2)]]
    given = compress(made(), loss, *splits, weights=tmp_path / "trained.ckpt", objective="budget", **QUICK)
    assert given.dense.loss == pytest.approx(before)
