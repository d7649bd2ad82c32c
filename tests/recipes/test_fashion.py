import gzip
import importlib.util
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from torch import nn

import train as application
from lrf_lightning import compress
from recipes.fashion import FashionClassifier, FashionMNIST, ResNeXt, VisionTransformer, read_images


def idx(array: np.ndarray) -> bytes:
    """An idx file as LeCun describes it: two zeros, the type, the number of dimensions, their sizes, the data."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def folder(tmp_path):
    """120 and 30 images of noise, of which every one is different; labels 0 to 9."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 120), ("t10k", 30)):
        images, labels = generator.integers(0, 256, (count, 28, 28)), np.arange(count) % 10
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))  # either may be gzipped
    return tmp_path


def small(folder, **sizes: int) -> FashionMNIST:
    sizes = {"calibration": 20, "selection": 20, "verification": 30, "batch_size": 25, **sizes}
    return FashionMNIST(folder=str(folder), **sizes)


def test_images_are_read_as_they_were_written(folder):
    images, labels = read_images("t10k", str(folder))
    assert images.shape == (30, 1, 28, 28)
    assert labels.tolist() == [i % 10 for i in range(30)]
    written = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    assert images.mul(255).round().flatten().tolist() == list(written)


def test_the_environment_names_the_folder(folder, monkeypatch):
    monkeypatch.setenv("FASHION_MNIST", str(folder))
    assert len(read_images("t10k")[0]) == 30


def test_splits_are_disjoint_and_complete(folder):
    data = small(folder)
    data.setup()
    sizes = {name: len(split) for name, split in data.splits.items()}
    assert sizes == {"train": 50, "calibration": 20, "selection": 20, "verification": 30, "test": 30}
    seen = [tuple(image.flatten().tolist()) for split in data.splits.values() for image, _ in split]
    assert len(set(seen)) == 150
    published = read_images("t10k", str(folder))[0]
    torch.testing.assert_close(data.splits["test"].tensors[0], published, rtol=0, atol=0)


def test_another_seed_cuts_other_splits(folder):
    cut = [small(folder, seed=seed) for seed in (0, 0, 1)]
    for data in cut:
        data.setup()
    first, same, other = (data.splits["verification"].tensors[0] for data in cut)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_no_image_left(folder):
    with pytest.raises(ValueError, match="leave no image of 120 for training; make them smaller"):
        small(folder, verification=80).setup()


def test_missing_files_say_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.fashion.FOLDERS", ("nowhere",))
    monkeypatch.delenv("FASHION_MNIST", raising=False)
    with pytest.raises(FileNotFoundError, match=r"not found in nowhere.*apt-get install dataset-fashion-mnist"):
        FashionMNIST().prepare_data()
    with pytest.raises(FileNotFoundError, match=f"not found in {tmp_path}"):
        small(tmp_path).setup()


def test_a_download_needs_torchvision(tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.fashion.FOLDERS", ("nowhere",))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(FileNotFoundError, match="let torchvision fetch it"):
        FashionMNIST(download=True).prepare_data()


@pytest.mark.parametrize(
    "net", [ResNeXt(widths=(8, 16), depth=1, groups=4), VisionTransformer(width=16, depth=1, heads=2)]
)
@pytest.mark.parametrize("bfloat16", [False, True])
def test_training_changes_weights_and_leaves_float32_in_the_usual_order(folder, net, bfloat16):
    module = FashionClassifier(net, bfloat16=bfloat16)
    before = {name: value.clone() for name, value in module.state_dict().items() if "weight" in name}
    trainer = Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
    )
    trainer.fit(module, datamodule=small(folder))
    for name, value in before.items():
        after = module.state_dict()[name]
        assert after.dtype == torch.float32
        assert after.is_contiguous()
        assert not torch.equal(after, value), name
    assert trainer.callback_metrics["val/loss"].dtype == torch.float32


def test_biases_and_norms_do_not_decay():
    module = FashionClassifier(ResNeXt(widths=(8,), depth=1, groups=4), weight_decay=0.7)
    module.trainer = SimpleNamespace(estimated_stepping_batches=3)
    decaying, fixed = module.configure_optimizers()["optimizer"].param_groups
    assert (decaying["weight_decay"], fixed["weight_decay"]) == (0.7, 0.0)
    assert len(decaying["params"]) + len(fixed["params"]) == len(list(module.parameters()))
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {id(p) for p in fixed["params"]} >= {id(p) for norm in norms for p in norm.parameters()}


def test_resnext50_trains(project, folder):
    """The GPU size as its recipe composes it, one step of four images."""
    pytest.importorskip("timm")
    with initialize_config_dir(version_base="1.3", config_dir=str(project / "conf")):
        cfg = compose("train.yaml", ["recipe=fashion_resnext50", "hydra.runtime.output_dir=outputs"])
    module = instantiate(cfg.model)
    assert sum(p.numel() for p in module.parameters()) == pytest.approx(23e6, rel=0.01)
    data = FashionMNIST(folder=str(folder), calibration=36, selection=40, verification=40, batch_size=4)
    trainer = Trainer(fast_dev_run=1, accelerator="cpu", enable_progress_bar=False, logger=False)
    trainer.fit(module, datamodule=data)
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


def test_sizes_that_the_readme_gives():
    nets = {"resnext": ResNeXt(groups=8), "vit": VisionTransformer()}
    assert {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()} == {
        "resnext": 547_018,
        "vit": 678_538,
    }


@pytest.mark.parametrize("net", [ResNeXt(widths=(16, 16), depth=1, groups=4), VisionTransformer(16, 1, 2)])
def test_networks_are_compressed(net):
    images, labels = torch.randn(40, 1, 28, 28), torch.arange(40) % 10

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    batches = [(images[:20], labels[:20]), (images[20:], labels[20:])]
    result = compress(net, loss, batches, batches, batches, objective="budget", keep=0.5, speed="none")
    assert result.params_layers[1] <= 0.5 * result.params_layers[0]
    assert result.model(images).shape == (40, 10)


TINY = {
    "fashion_resnext": ["model.net.widths=[16,16]", "model.net.depth=1", "model.net.groups=4"],
    "fashion_vit": ["model.net.width=16", "model.net.depth=1", "model.net.heads=2"],
}


OBJECTIVES = ["lossless", "compact", "budget", "frontier", "paper"]
CASES = [
    # the second network takes the same way through the app
    pytest.param(recipe, objective, marks=[pytest.mark.slow] if recipe == "fashion_vit" and position else [])
    for recipe in TINY
    for position, objective in enumerate(OBJECTIVES)
]


@pytest.mark.parametrize(("recipe", "objective"), CASES)
def test_every_recipe_runs_with_every_objective(project, folder, recipe, objective):
    """As `python train.py recipe=... +compress=...` does, on little data."""
    sizes = ["data.calibration=20", "data.selection=20", "data.verification=30", "data.batch_size=25"]
    few = ["trainer.max_epochs=1", "callbacks.compress.points=2", "callbacks.compress.refinements=0"]
    overrides = [f"recipe={recipe}", f"+compress={objective}", f"data.folder={folder}", *sizes, *few, *TINY[recipe]]
    quiet = ["logger=none", f"hydra.runtime.output_dir={folder}/outputs", f"paths.output_dir={folder}/outputs"]
    with initialize_config_dir(version_base="1.3", config_dir=str(project / "conf")):
        cfg = compose("train.yaml", [*overrides, *quiet, "callbacks.compress.strict=true"])
    metrics, objects = application.train(cfg)
    result = objects["result"]
    assert result.certificate.dense.samples == 30
    assert result.params_model[1] <= result.params_model[0]
    assert {"test/loss", "test/acc", "compress/test/loss", "compress/test/acc"} <= set(metrics)
    if objective == "budget":
        assert result.params_layers[1] <= 0.5 * result.params_layers[0]
