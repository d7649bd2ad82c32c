"""Loaders of the splits that every recipe has, under the names that the callback looks for."""

from __future__ import annotations

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["SplitDataModule"]


class SplitDataModule(LightningDataModule):
    """Data in five splits; a recipe fills ``splits`` in its ``setup``.

    Args:
        batch_size: samples per batch in training.
        evaluation_batch_size: samples per batch elsewhere; None is the same.

    Attributes:
        splits: ``train``, ``calibration``, ``selection``, ``verification`` and ``test``.
    """

    def __init__(self, batch_size: int, evaluation_batch_size: int | None = None) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.evaluation_batch_size = evaluation_batch_size or batch_size
        self.splits: dict[str, TensorDataset] = {}

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """For the weights, shuffled."""
        return DataLoader(self.splits["train"], batch_size=self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The selection split: it may be looked at while training, the verification split may not."""
        return self.selection_dataloader()

    def calibration_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """For the statistics of the compression."""
        return self._loader("calibration")

    def selection_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """For choosing among compressed models."""
        return self._loader("selection")

    def verification_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """For the verdict."""
        return self._loader("verification")

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """For the report, which decides nothing."""
        return self._loader("test")

    def _loader(self, split: str) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.splits[split], batch_size=self.evaluation_batch_size)
