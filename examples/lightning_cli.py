"""LightningCLI: the callback is one line of the command, or of the config file.

Run with ``python examples/lightning_cli.py fit --trainer.callbacks+=lrf_lightning.LowRankCompression``, and set its
arguments with ``--trainer.callbacks.objective=compact``. Needs ``pip install "jsonargparse[signatures]"``.
"""

from __future__ import annotations

import torch
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split


class DigitsData(LightningDataModule):
    """Digits with a training and a validation part; the callback divides the latter into its three splits."""

    def setup(self, stage: str | None = None) -> None:
        """Split the images."""
        digits = load_digits()
        data = TensorDataset(torch.tensor(digits.data / 16).float(), torch.tensor(digits.target))
        self.train, self.val = random_split(data, [597, 1200], torch.Generator().manual_seed(0))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Images for the weights."""
        return DataLoader(self.train, batch_size=50, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """All others."""
        return DataLoader(self.val, batch_size=100)


class DigitsModel(LightningModule):
    """Three linear layers.

    Args:
        width: of the two hidden layers.
    """

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        inputs, labels = batch
        return F.cross_entropy(self.net(inputs), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Cross-entropy; the callback finds the loss and the accuracy by itself."""
        inputs, labels = batch
        self.log("val/loss", F.cross_entropy(self.net(inputs), labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=3.0)


if __name__ == "__main__":
    LightningCLI(DigitsModel, DigitsData, trainer_defaults={"max_epochs": 20, "accelerator": "cpu"})
