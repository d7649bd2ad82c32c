"""Passages of Shakespeare's works as samples for causal language models.

The 42 texts with modern spelling come with the package ``shakespeare``. Joined and turned into token ids, they are cut
into pages, the pages are dealt out to five disjoint splits by a seed, and every page is cut into passages. A passage
is one sample: its loss is the mean over its tokens, so that two models are compared on the same tokens in pairs, and
the tokens of a passage, which depend on each other, do not count as independent evidence.

A batch holds ids, shape (passages, length), and the ids that follow each of them, of the same shape.
"""

from __future__ import annotations

from typing import Protocol

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchmetrics.text import Perplexity

from recipes.installed import package_folder
from recipes.splits import SplitDataModule

__all__ = ["CausalModule", "Characters", "Passages", "read_works"]


def read_works() -> str:
    """All works, one after the other.

    Raises:
        ModuleNotFoundError: if the package is not installed.
    """
    folder = package_folder("shksprdata", "shakespeare") / "texts"
    return "\n\n".join(file.read_text("utf-8") for file in sorted(folder.glob("*_gut.txt")))


class Tokenizer(Protocol):
    """Turns a text into token ids."""

    def __call__(self, text: str) -> list[int]:
        """The ids of a whole text."""


class Characters:
    """Every character of a list is a token; all others are one and the same.

    Args:
        known: the characters.
    """

    def __init__(self, known: str) -> None:
        self.ids = {character: place for place, character in enumerate(sorted(set(known)), 1)}

    def __call__(self, text: str) -> list[int]:
        """One id for every character, 0 for unknown ones."""
        return [self.ids.get(character, 0) for character in text]


class Passages(SplitDataModule):
    """Loaders of the five splits; the callback finds the three that it needs by the names of the methods.

    Args:
        tokenizer: of the whole text.
        length: tokens of a passage.
        page: passages that lie together and go to the same split.
        calibration: passages for the statistics of the compression.
        selection: passages for watching the training and for choosing among compressed models.
        verification: passages for the verdict.
        test: passages for the report.
        train: passages that are trained on; None for all others.
        batch_size: passages per batch.
        seed: seed of the splits.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        length: int = 128,
        page: int = 8,
        calibration: int = 512,
        selection: int = 512,
        verification: int = 1024,
        test: int = 1024,
        train: int | None = None,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size)
        self.tokenizer, self.length, self.page, self.seed = tokenizer, length, page, seed
        self.sizes = {"calibration": calibration, "selection": selection, "verification": verification, "test": test}
        self.train = train

    def setup(self, stage: str | None = None) -> None:
        """Read and cut the text, the same for every stage.

        Raises:
            ModuleNotFoundError: if the package is not installed.
            ValueError: if the text is too short for the splits.
        """
        if self.splits:
            return
        ids = torch.tensor(self.tokenizer(read_works()))
        # the last token of a passage is predicted, but not read: it is also the first one of the next passage
        passages = ids.unfold(0, self.length + 1, self.length)
        pages = passages[: len(passages) // self.page * self.page].unflatten(0, (-1, self.page))
        order = torch.randperm(len(pages), generator=torch.Generator().manual_seed(self.seed))
        counts = {name: -(-size // self.page) for name, size in self.sizes.items()}
        rest = len(pages) - sum(counts.values())
        if rest < 1:
            raise ValueError(f"the splits {self.sizes} leave none of {len(passages)} passages; make them smaller")
        sizes = {"train": self.train, **self.sizes}
        for name, part in zip(sizes, order.split([rest, *counts.values()]), strict=True):
            chosen = pages[part].flatten(0, 1)[: sizes[name]]
            self.splits[name] = TensorDataset(chosen[:, :-1], chosen[:, 1:])


class CausalModule(LightningModule):
    """Loss and perplexity of the next token in training, validation and test; how a model learns is for subclasses.

    Args:
        net: a network of ids, shape (batch, length), to logits, shape (batch, length, vocabulary).
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.train_perplexity = Perplexity()
        self.val_perplexity = Perplexity()
        self.test_perplexity = Perplexity()

    def forward(self, ids: Tensor) -> Tensor:
        """Shape (batch, length) to logits of shape (batch, length, vocabulary)."""
        return self.net(ids)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean loss of all tokens of a batch."""
        return self._step("train", batch)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean loss of all tokens of a batch."""
        return self._step("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean loss of all tokens of a batch."""
        return self._step("test", batch)

    def _step(self, stage: str, batch: tuple[Tensor, Tensor]) -> Tensor:
        ids, following = batch
        logits = self(ids)
        loss = F.cross_entropy(logits.flatten(0, 1), following.flatten())
        perplexity = getattr(self, f"{stage}_perplexity")
        perplexity(logits.detach(), following)
        self.log(f"{stage}/loss", loss, on_step=False, on_epoch=True, prog_bar=stage == "val")
        self.log(f"{stage}/perplexity", perplexity, on_step=False, on_epoch=True, prog_bar=stage == "val")
        return loss
