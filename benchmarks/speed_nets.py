"""Networks with the layer shapes of well-known ones, for timing: ResNet-50, ResNeXt-50, ViT-B/16 and BERT-base.

The convolutional ones have all stages and blocks; the transformers have fewer of their equal blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["NETS", "Network"]


class Bottleneck(nn.Module):
    """1 x 1, (grouped) 3 x 3 and 1 x 1 convolution with a skip connection (He et al. 2016, Xie et al. 2017)."""

    def __init__(self, inputs: int, width: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(inputs, width, 1),
            nn.ReLU(inplace=True),
            *_convolution(width, width, 3, stride, groups),
            nn.ReLU(inplace=True),
            *_convolution(width, outputs, 1),
        )
        same = stride == 1 and inputs == outputs
        self.skip = nn.Identity() if same else nn.Sequential(*_convolution(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, inputs, h, w) to (batch, outputs, h / stride, w / stride)."""
        return torch.relu(self.body(x) + self.skip(x))


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return convolution, nn.BatchNorm2d(outputs)


def bottleneck_net(groups: int, width: int) -> nn.Sequential:
    """A ResNet-50 with ``groups=1, width=64``, a ResNeXt-50 32x4d with ``groups=32, width=128``."""
    layers: list[nn.Module] = [*_convolution(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(Bottleneck(inputs, width << stage, 256 << stage, stride, groups))
            inputs = 256 << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


class Block(nn.Module):
    """Self-attention and a two-layer perceptron, normalised before (ViT) or after (BERT)."""

    def __init__(self, width: int, heads: int, *, before: bool) -> None:
        super().__init__()
        self.heads, self.before = heads, before
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def attention(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, width) to the same shape."""
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, width) to the same shape."""
        if self.before:
            x = x + self.attention(self.norm1(x))
            return x + self.perceptron(self.norm2(x))
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.perceptron(x))


class Vit(nn.Module):
    """Patches of 16 x 16 pixels through blocks of ViT-B (Dosovitskiy et al. 2021)."""

    def __init__(self, depth: int, width: int = 768, tokens: int = 196) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.positions = nn.Parameter(torch.zeros(tokens, width))
        self.blocks = nn.Sequential(*(Block(width, width // 64, before=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Map images, (batch, 3, 224, 224), to logits, (batch, 1000)."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


class Bert(nn.Module):
    """Tokens through blocks of BERT-base, and a classifier on the first one (Devlin et al. 2019)."""

    def __init__(self, depth: int, width: int = 768, tokens: int = 128, vocabulary: int = 30_000) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(tokens, width))
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.Sequential(*(Block(width, width // 64, before=False) for _ in range(depth)))
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map token indices, (batch, 128), to logits, (batch, 2)."""
        return self.head(self.blocks(self.norm(self.words(x) + self.positions))[:, 0])


class Network:
    """A network with an input for it.

    Args:
        build: makes the network.
        sample: makes an input of a batch size.
        batch: batch size that throughput is measured at.
        convolutional: whether convolutions dominate.
    """

    def __init__(
        self, build: Callable[[], nn.Module], sample: Callable[[int], Tensor], batch: int, *, convolutional: bool
    ) -> None:
        self.build, self.sample, self.batch, self.convolutional = build, sample, batch, convolutional


def _images(size: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, 3, size, size)


NETS = {
    "ResNet-50": Network(lambda: bottleneck_net(1, 64), _images(160), 8, convolutional=True),
    "ResNeXt-50 32x4d": Network(lambda: bottleneck_net(32, 128), _images(160), 8, convolutional=True),
    "ViT-B/16, 4 blocks": Network(lambda: Vit(4), _images(224), 8, convolutional=False),
    "BERT-base, 4 blocks": Network(
        lambda: Bert(4), lambda batch: torch.randint(0, 30_000, (batch, 128)), 16, convolutional=False
    ),
}
