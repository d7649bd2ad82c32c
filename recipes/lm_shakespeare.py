"""A small causal language model of characters that learns Shakespeare's works from scratch."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.one_cycle import one_cycle
from recipes.passages import CausalModule

__all__ = ["Block", "CharacterModel", "CharacterNet"]


class Block(nn.Module):
    """``y = x + attention(norm(x))``, then ``y + MLP(norm(y))``; no token sees what comes after it.

    Args:
        width: features of a token.
        heads: attention heads.
        dropout: share of the features that is dropped in training.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Shape (batch, length, width) to the same."""
        packed = self.queries_keys_values(self.attention_norm(x))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in packed.chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.out(mixed))
        return x + self.mlp(x)


class CharacterNet(nn.Module):
    """Token and place embeddings, blocks, and an output layer that shares the table of the token embedding.

    Args:
        vocabulary: number of token ids.
        length: largest number of tokens of a passage.
        width: features of a token.
        heads: attention heads.
        layers: blocks.
        dropout: share of the features that is dropped in training.
    """

    def __init__(
        self,
        *,
        vocabulary: int = 96,
        length: int = 64,
        width: int = 128,
        heads: int = 4,
        layers: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Shape (batch, length) to logits of shape (batch, length, vocabulary)."""
        places = self.places(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(self.tokens(ids) + places)))


class CharacterModel(CausalModule):
    """AdamW with one cycle of the learning rate.

    Args:
        net: a network of ids, shape (batch, length), to logits, shape (batch, length, vocabulary).
        learning_rate: its largest value.
        weight_decay: share of the weights that a step takes away, per unit of the learning rate.
    """

    def __init__(self, net: nn.Module, *, learning_rate: float = 4e-3, weight_decay: float = 0.5) -> None:
        super().__init__(net)
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW whose learning rate rises and falls once over the whole training."""
        return one_cycle(self, self.parameters(), self.learning_rate, self.weight_decay)
