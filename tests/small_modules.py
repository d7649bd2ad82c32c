"""Small LightningModules and data that several tests share; all of them learn to tell clouds of points apart."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

FEATURES, CLASSES = 12, 4


def clouds(samples=96, seed=0):
    """Points around four centres, shape (samples, 12), and the centres' numbers, shape (samples,)."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(samples) % CLASSES
    return centres[labels] + 0.7 * torch.randn(samples, FEATURES, generator=generator), labels


def loader(samples=96, seed=0, batch_size=16, **options):
    return DataLoader(TensorDataset(*clouds(samples, seed)), batch_size=batch_size, **options)


def network(width=24):
    return nn.Sequential(
        nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES)
    )


class Classifier(pl.LightningModule):
    """Cross-entropy, returned by both steps and logged."""

    def __init__(self, net=None):
        super().__init__()
        self.net = net or network()

    def loss(self, batch):
        x, y = batch
        return functional.cross_entropy(self.net(x), y)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("val/loss", loss)
        return loss

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def trainer(**options):
    """A quiet Trainer on the CPU for two epochs."""
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**(defaults | options))


QUICK = {"points": 2, "refinements": 0, "rows_per_feature": 8}
