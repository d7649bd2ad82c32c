"""A small transformer that learns the topics of Reuters R8 from scratch."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from recipes.one_cycle import one_cycle
from recipes.reuters import CLASSES, PADDING, TopicClassifier

__all__ = ["R8Classifier", "TextTransformer"]


class TextTransformer(nn.Module):
    """Token and place embeddings, encoder layers that do not look at padding, the mean over the words, a linear head.

    Args:
        vocabulary: number of token ids.
        length: largest number of tokens of a text.
        width: features of a token.
        heads: attention heads.
        layers: encoder layers.
        dropout: share of the features that is dropped in training, in the embedding and in every layer.
    """

    def __init__(
        self,
        *,
        vocabulary: int = 4000,
        length: int = 64,
        width: int = 128,
        heads: int = 4,
        layers: int = 2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width, padding_idx=PADDING)
        self.places = nn.Parameter(torch.randn(length, width) * 0.02)
        self.dropout = nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)
        # torch's own initial table has entries of size 1: rare words would keep that noise, which is of full rank
        nn.init.normal_(self.words.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Shape (batch, length) to logits of shape (batch, topics)."""
        padding = tokens == PADDING
        x = self.dropout(self.words(tokens) + self.places[: tokens.shape[1]])
        x = self.norm(self.encoder(x, src_key_padding_mask=padding))
        x = x.masked_fill(padding[..., None], 0.0).sum(1) / (~padding).sum(1, keepdim=True)
        return self.head(x)


class R8Classifier(TopicClassifier):
    """AdamW with one cycle of the learning rate.

    Args:
        net: a network of token ids, shape (batch, length), to logits, shape (batch, topics).
        learning_rate: its largest value.
        weight_decay: share of the weights that a step takes away, per unit of the learning rate.
    """

    def __init__(self, net: nn.Module, *, learning_rate: float = 2e-3, weight_decay: float = 1.0) -> None:
        super().__init__(net)
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW whose learning rate rises and falls once over the whole training."""
        return one_cycle(self, self.parameters(), self.learning_rate, self.weight_decay)
