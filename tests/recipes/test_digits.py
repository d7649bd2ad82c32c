import pytest
import torch
from lightning.pytorch import Trainer

from recipes.digits import Digits, DigitsClassifier, DigitsNet, _shifted

SPLITS = ("train", "calibration", "selection", "verification", "test")


def images(datamodule: Digits) -> dict[str, torch.Tensor]:
    datamodule.setup()
    return {name: datamodule.splits[name].tensors[0] for name in SPLITS}


def test_splits_are_disjoint_and_complete():
    datamodule = Digits(seed=3)
    datamodule.setup()
    keys = {
        name: {
            (image.numpy().tobytes(), int(label)) for image, label in zip(*datamodule.splits[name].tensors, strict=True)
        }
        for name in SPLITS
    }
    # no two of scikit-learn's images are equal, so that the pixels identify the image
    assert {name: len(keys[name]) for name in SPLITS} == {name: len(datamodule.splits[name]) for name in SPLITS}
    assert sum(map(len, keys.values())) == 1797
    assert len(set().union(*keys.values())) == 1797


def test_splits_depend_on_the_seed_alone():
    first, again, other = images(Digits(seed=1)), images(Digits(seed=1)), images(Digits(seed=2))
    for name in SPLITS:
        torch.testing.assert_close(first[name], again[name], rtol=0, atol=0)
        assert not torch.equal(first[name], other[name])


def test_loaders_yield_the_splits_they_are_named_after():
    datamodule = Digits()
    datamodule.setup()
    for name in SPLITS[1:]:
        batches = list(getattr(datamodule, f"{name}_dataloader")())
        torch.testing.assert_close(torch.cat([batch[0] for batch in batches]), datamodule.splits[name].tensors[0])
    selection = torch.cat([batch[0] for batch in datamodule.val_dataloader()])
    torch.testing.assert_close(selection, datamodule.splits["selection"].tensors[0])


def test_splits_too_large_for_the_data():
    with pytest.raises(ValueError, match="leave no image of 1797 for training"):
        Digits(test=1797).setup()


def test_net_has_the_parts_that_the_readme_names():
    net = DigitsNet()
    assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert 150_000 < sum(parameter.numel() for parameter in net.parameters()) < 300_000
    assert sum(isinstance(module, torch.nn.Conv2d) and module.groups > 1 for module in net.modules()) == 4
    assert isinstance(net[-1], torch.nn.Linear)


def test_shift_moves_each_image_by_one_pixel_at_most():
    image = torch.zeros(200, 1, 8, 8)
    image[:, 0, 4, 3] = 1
    _, _, rows, columns = _shifted(image).nonzero(as_tuple=True)
    assert set(rows.tolist()) == {3, 4, 5}
    assert set(columns.tolist()) == {2, 3, 4}
    assert len(rows) == 200


def test_shift_moves_zeros_in():
    edge = torch.zeros(100, 1, 8, 8)
    edge[:, 0, 0, 0] = 1
    shifted = _shifted(edge)
    assert shifted.shape == edge.shape
    assert set(shifted.sum((1, 2, 3)).tolist()) == {0.0, 1.0}


def test_module_learns():
    module = DigitsClassifier(DigitsNet(width=32, blocks=1), weight_decay=0.0)
    trainer = Trainer(
        max_epochs=8,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=Digits())
    assert trainer.callback_metrics["val/acc"] > 0.5
