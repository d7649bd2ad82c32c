"""Fashion-MNIST: 70,000 images of 28 x 28 pixels in ten classes (Zalando Research, MIT licence), and two networks.

A ResNeXt (Xie et al. 2017) and a vision transformer (Dosovitskiy et al. 2021) of a size that a CPU trains in minutes;
ResNeXt-50 comes from timm or torchvision. Five disjoint splits, fixed by a seed; ``test`` is the published one:

============  ======  ===============================================================
split         images  used for
============  ======  ===============================================================
train         48,000  the weights
calibration    2,000  statistics of the compression
selection      4,000  watching the training, choosing among compressed models
verification   6,000  the verdict
test          10,000  reported at the end, decides nothing
============  ======  ===============================================================

As in the digits recipe the strong decay of the weights takes away what is left of the random initial weights.
"""

from __future__ import annotations

import gzip
import importlib.util
import os
from pathlib import Path

import numpy as np
import torch
from hydra.utils import to_absolute_path
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from recipes.digits import CLASSES, DigitsClassifier
from recipes.one_cycle import one_cycle
from recipes.splits import SplitDataModule

__all__ = ["FashionClassifier", "FashionMNIST", "ResNeXt", "VisionTransformer", "read_images", "resnext50_32x4d"]

FOLDERS = ("/usr/share/datasets/fashion-mnist", "data/FashionMNIST/raw")
MISSING = (
    "Fashion-MNIST was not found in {folders}. Run 'apt-get install dataset-fashion-mnist', or set FASHION_MNIST or "
    "data.folder to a folder with the four idx files (gzipped or not), or let torchvision fetch it with "
    "data.download=true"
)


def read_images(part: str, folder: str | None = None) -> tuple[Tensor, Tensor]:
    """Read one of the two published parts.

    Args:
        part: ``train`` or ``t10k``.
        folder: where the idx files are; None tries the environment variable ``FASHION_MNIST``, the folder of Debian's
            package ``dataset-fashion-mnist``, and where torchvision leaves a download.

    Returns:
        Images of shape (n, 1, 28, 28) with values in [0, 1], and class indices of shape (n,).

    Raises:
        FileNotFoundError: if the files are in none of the folders.
    """
    folders = [folder] if folder else [*filter(None, [os.environ.get("FASHION_MNIST")]), *FOLDERS]
    for place in map(Path, map(to_absolute_path, folders)):  # hydra.job.chdir changes the folder
        images, labels = (_find(place / f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
        if images and labels:
            pixels = torch.from_numpy(_read(images).astype(np.float32)).div(255)
            return pixels.unsqueeze(1), torch.from_numpy(_read(labels).astype(np.int64))
    raise FileNotFoundError(MISSING.format(folders=" or ".join(folders)))


def _find(path: Path) -> Path | None:
    return next((found for found in (path, path.with_name(f"{path.name}.gz")) if found.is_file()), None)


def _read(path: Path) -> np.ndarray:
    """Read an idx file: two zero bytes, the type (8 for bytes), the number of dimensions, their sizes, the data."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        content = file.read()
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", dimensions, 4)
    return np.frombuffer(content, np.uint8, -1, 4 + 4 * dimensions).reshape(shape)


class FashionMNIST(SplitDataModule):
    """Loaders of the five splits; the callback finds the three that it needs by the names of the methods.

    Args:
        calibration: images for the statistics of the compression.
        selection: images for watching the training and for choosing among compressed models.
        verification: images for the verdict; the rest of the 60,000 training images is trained on.
        batch_size: images per batch of the training.
        folder: of the idx files; None looks in the usual places, see :func:`read_images`.
        download: whether torchvision may fetch the files into ``data/`` if they are not there.
        seed: seed of the splits.
    """

    def __init__(
        self,
        *,
        calibration: int = 2000,
        selection: int = 4000,
        verification: int = 6000,
        batch_size: int = 128,
        folder: str | None = None,
        download: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, evaluation_batch_size=250)
        self.sizes = {"calibration": calibration, "selection": selection, "verification": verification}
        self.folder, self.download, self.seed = folder, download, seed

    def prepare_data(self) -> None:
        """Fetch the files if that is allowed and needed.

        Raises:
            FileNotFoundError: if there are no files, and none may or can be fetched.
        """
        try:
            read_images("t10k", self.folder)
        except FileNotFoundError:
            if not self.download or importlib.util.find_spec("torchvision") is None:
                raise
            from torchvision.datasets import FashionMNIST as Published

            Published(to_absolute_path("data"), download=True)

    def setup(self, stage: str | None = None) -> None:
        """Cut the training images into four splits, the same for every stage.

        Raises:
            FileNotFoundError: if there are no files.
            ValueError: if no image is left for training.
        """
        images, labels = read_images("train", self.folder)
        rest = len(images) - sum(self.sizes.values())
        if rest < 1:
            raise ValueError(f"the splits {self.sizes} leave no image of {len(images)} for training; make them smaller")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))
        names = ("train", *self.sizes)
        for name, part in zip(names, order.split([rest, *self.sizes.values()]), strict=True):
            self.splits[name] = TensorDataset(images[part], labels[part])
        self.splits["test"] = TensorDataset(*read_images("t10k", self.folder))


class FashionClassifier(DigitsClassifier):
    """The training of the digits recipe, with images that are also mirrored, cheaper on processors that allow it.

    Args:
        net: a network of (batch, 1, 28, 28) to (batch, 10).
        learning_rate: its largest value.
        weight_decay: share of the weights that a step takes away, per unit of the learning rate.
        bfloat16: whether the forward pass of the training is in bfloat16; everything else is in float32.
    """

    def __init__(
        self, net: nn.Module, *, learning_rate: float = 3e-3, weight_decay: float = 1.0, bfloat16: bool = True
    ) -> None:
        super().__init__(net, learning_rate=learning_rate, weight_decay=weight_decay)
        self.bfloat16 = bfloat16

    def on_train_start(self) -> None:
        """Convolutions are a third cheaper with the channels last."""
        self.net.to(memory_format=torch.channels_last)

    def on_train_end(self) -> None:
        """Leave the usual order behind."""
        self.net.to(memory_format=torch.contiguous_format)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """As in the digits recipe, but biases and the gains of norms do not decay."""
        groups = [
            {"params": [p for p in self.parameters() if p.dim() > 1]},
            {"params": [p for p in self.parameters() if p.dim() <= 1], "weight_decay": 0.0},
        ]
        return one_cycle(self, groups, self.learning_rate, self.weight_decay)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of shifted images, half of them mirrored."""
        images, labels = batch
        mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
        images = torch.where(mirrored, images.flip(-1), images)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bfloat16):
            return super().training_step((images, labels), batch_idx)


class GroupedBlock(nn.Module):
    """A 1 x 1, a grouped 3 x 3 and a 1 x 1 convolution with a skip connection.

    Args:
        inputs: channels of the input.
        outputs: channels of all three convolutions.
        stride: of the 3 x 3 convolution.
        groups: of the 3 x 3 convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int = 4) -> None:
        super().__init__()
        self.reduce, self.norm1 = nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.spatial = nn.Conv2d(outputs, outputs, 3, stride, 1, groups=groups, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.expand, self.norm3 = nn.Conv2d(outputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, inputs, h, w) to (batch, outputs, h / stride, w / stride)."""
        y = torch.relu(self.norm1(self.reduce(x)))
        y = torch.relu(self.norm2(self.spatial(y)))
        return torch.relu(self.norm3(self.expand(y)) + self.skip(x))


class ResNeXt(nn.Sequential):
    """A stem that halves the image, three stages of blocks, each at half the resolution of the last, and a head.

    Args:
        widths: channels of the stages.
        depth: blocks in each stage.
        groups: of the 3 x 3 convolutions.
    """

    def __init__(self, *, widths: tuple[int, ...] = (64, 128, 256), depth: int = 2, groups: int = 4) -> None:
        stem = [nn.Conv2d(1, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
        blocks = []
        inputs = widths[0]
        for stage, width in enumerate(widths):
            for position in range(depth):
                blocks.append(GroupedBlock(inputs, width, 2 if stage > 0 and position == 0 else 1, groups))
                inputs = width
        super().__init__(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))


class TransformerBlock(nn.Module):
    """Self-attention and a two-layer perceptron, each behind a layer norm and with a skip connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, width) to the same shape."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.out(mixed)
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Square patches, learnt positions, blocks, and the mean over the tokens.

    Args:
        width: features of a token.
        depth: number of blocks.
        heads: of the attention.
        patch: pixels along the side of a patch.
    """

    def __init__(self, width: int = 96, depth: int = 6, heads: int = 4, patch: int = 7) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, patch)
        self.positions = nn.Parameter(torch.randn((28 // patch) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, 1, 28, 28) to logits (batch, 10)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def resnext50_32x4d() -> nn.Module:
    """ResNeXt-50 of timm or torchvision for one channel and ten classes; its stem keeps the size of small images.

    Raises:
        ImportError: if neither is installed.
    """
    if importlib.util.find_spec("timm") is not None:
        import timm

        net = timm.create_model("resnext50_32x4d", num_classes=CLASSES)
    elif importlib.util.find_spec("torchvision") is not None:
        from torchvision.models import resnext50_32x4d as published

        net = published(num_classes=CLASSES)
    else:
        raise ImportError("resnext50_32x4d needs timm or torchvision; run 'pip install timm', or take another net")
    net.conv1, net.maxpool = nn.Conv2d(1, 64, 3, padding=1, bias=False), nn.Identity()
    return net
