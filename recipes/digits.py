"""Handwritten digits: scikit-learn's 1,797 images of 8 x 8 pixels, and a small ResNeXt that reads them.

The data comes with scikit-learn, so nothing is downloaded. Five disjoint splits, fixed by a seed:

============  ======  ===============================================================
split         images  used for
============  ======  ===============================================================
train         547     the weights
calibration   250     statistics of the compression
selection     150     watching the training, choosing among compressed models
verification  700     the verdict
test          150     reported at the end, decides nothing
============  ======  ===============================================================

The strong decay of the weights is a part of the recipe: it takes away what is left of the random initial weights, so
that the layers come close to a low rank.
"""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from recipes.one_cycle import one_cycle
from recipes.splits import SplitDataModule

__all__ = ["Digits", "DigitsClassifier", "DigitsNet"]

CLASSES = 10


class Digits(SplitDataModule):
    """Loaders of the five splits; the callback finds the three that it needs by the names of the methods.

    Args:
        calibration: images for the statistics of the compression.
        selection: images for watching the training and for choosing among compressed models.
        verification: images for the verdict.
        test: images for the report; all others are trained on.
        batch_size: images per batch.
        seed: seed of the splits.
    """

    def __init__(
        self,
        *,
        calibration: int = 250,
        selection: int = 150,
        verification: int = 700,
        test: int = 150,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, evaluation_batch_size=100)
        self.sizes = {"calibration": calibration, "selection": selection, "verification": verification, "test": test}
        self.seed = seed

    def setup(self, stage: str | None = None) -> None:
        """Cut the images into the five splits, the same for every stage.

        Raises:
            ValueError: if no image is left for training.
        """
        from sklearn.datasets import load_digits  # other recipes use the classifier, but not this data

        digits = load_digits()
        images = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)  # (1797, 1, 8, 8), values in [0, 1]
        labels = torch.from_numpy(digits.target).long()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))
        rest = len(images) - sum(self.sizes.values())
        if rest < 1:
            raise ValueError(f"the splits {self.sizes} leave no image of {len(images)} for training; make them smaller")
        parts = order.split([rest, *self.sizes.values()])
        self.splits = {
            name: TensorDataset(images[part], labels[part])
            for name, part in zip(("train", *self.sizes), parts, strict=True)
        }


class ResNeXtBlock(nn.Module):
    """``relu(shortcut(x) + conv1x1(grouped conv3x3(conv1x1(x))))`` with batch norms.

    Args:
        channels_in: channels of the input.
        channels: channels of the grouped convolution and of the output.
        groups: groups of the 3 x 3 convolution.
    """

    def __init__(self, channels_in: int, channels: int, groups: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if channels_in != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(channels_in, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Shape (batch, channels_in, height, width) to (batch, channels, height, width)."""
        return F.relu(self.shortcut(x) + self.body(x))


class DigitsNet(nn.Sequential):
    """A stem that halves the image to 4 x 4 pixels, ResNeXt blocks, and a linear head.

    Args:
        width: channels of the blocks; the stem has half as many.
        groups: groups of the 3 x 3 convolutions in the blocks.
        blocks: number of blocks.
    """

    def __init__(self, *, width: int = 128, groups: int = 4, blocks: int = 4) -> None:
        stem = [nn.Conv2d(1, width // 2, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width // 2), nn.ReLU()]
        body = [ResNeXtBlock(width if i else width // 2, width, groups) for i in range(blocks)]
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)]
        super().__init__(*stem, *body, *head)


class DigitsClassifier(LightningModule):
    """Cross-entropy with AdamW and one cycle of the learning rate; images are shifted by up to a pixel in training.

    Args:
        net: a network of (batch, 1, 8, 8) to (batch, 10).
        learning_rate: its largest value.
        weight_decay: share of the weights that a step takes away, per unit of the learning rate.
    """

    def __init__(self, net: nn.Module, *, learning_rate: float = 3e-3, weight_decay: float = 4.0) -> None:
        super().__init__()
        self.net = net
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.train_accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.val_accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.test_accuracy = MulticlassAccuracy(CLASSES, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Shape (batch, 1, 8, 8) to logits of shape (batch, 10)."""
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of shifted images."""
        images, labels = batch
        return self._step("train", (_shifted(images), labels))

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of the images as they are."""
        return self._step("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of the images as they are."""
        return self._step("test", batch)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW whose learning rate rises and falls once over the whole training."""
        return one_cycle(self, self.parameters(), self.learning_rate, self.weight_decay)

    def _step(self, stage: str, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        accuracy = getattr(self, f"{stage}_accuracy")
        accuracy(logits, labels)
        self.log(f"{stage}/loss", loss, on_step=False, on_epoch=True, prog_bar=stage == "val")
        self.log(f"{stage}/acc", accuracy, on_step=False, on_epoch=True, prog_bar=stage == "val")
        return loss


def _shifted(images: Tensor) -> Tensor:
    """Each image shifted by -1, 0 or 1 pixels along both axes, with zeros moving in."""
    size = images.shape[-1]
    padded = F.pad(images, (1, 1, 1, 1))
    shift = torch.randint(3, (2, len(images), 1), device=images.device)
    rows, columns = (torch.arange(size, device=images.device) + axis for axis in shift)
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[batch, 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)
