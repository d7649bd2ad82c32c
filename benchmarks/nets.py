"""Small networks for 28 x 28 images: a ResNet, a ResNeXt and a vision transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["NETS", "resnet", "resnext", "vit"]


class Block(nn.Module):
    """Two 3 x 3 convolutions with a skip connection (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.skip = _skip(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, inputs, h, w) to (batch, outputs, h / stride, w / stride)."""
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.skip(x))


class GroupedBlock(nn.Module):
    """A 1 x 1, a grouped 3 x 3 and a 1 x 1 convolution with a skip connection (Xie et al. 2017)."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int = 4) -> None:
        super().__init__()
        width = outputs
        self.reduce, self.norm1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.spatial = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.expand, self.norm3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.skip = _skip(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, inputs, h, w) to (batch, outputs, h / stride, w / stride)."""
        y = torch.relu(self.norm1(self.reduce(x)))
        y = torch.relu(self.norm2(self.spatial(y)))
        return torch.relu(self.norm3(self.expand(y)) + self.skip(x))


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and a two-layer perceptron (Dosovitskiy et al. 2021)."""

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
    """Patches of 7 x 7 pixels, learnt positions, mean over tokens."""

    def __init__(self, width: int = 96, depth: int = 6, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, 7)
        self.positions = nn.Parameter(torch.randn(16, width) * 0.02)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, 1, 28, 28) to logits (batch, 10)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def resnet() -> nn.Module:
    """A ResNet with 0.69 M parameters."""
    return _residual(Block, (32, 64, 128), 2)


def resnext() -> nn.Module:
    """A ResNeXt with 0.5 M parameters."""
    return _residual(GroupedBlock, (64, 128, 256), 2)


def vit() -> nn.Module:
    """A vision transformer with 0.68 M parameters."""
    return VisionTransformer()


NETS = {"resnet": resnet, "resnext": resnext, "vit": vit}


def _residual(block: type[Block | GroupedBlock], widths: tuple[int, ...], depth: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(1, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    inputs = widths[0]
    for stage, width in enumerate(widths):
        for position in range(depth):
            layers.append(block(inputs, width, 2 if stage > 0 and position == 0 else 1))
            inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def _skip(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
