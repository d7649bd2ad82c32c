"""Small networks for 28 x 28 images: a ResNet, and a ResNeXt and a vision transformer of the recipes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recipes.fashion import ResNeXt, VisionTransformer

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


def resnet() -> nn.Module:
    """A ResNet with 0.69 M parameters."""
    widths = (32, 64, 128)
    layers: list[nn.Module] = [nn.Conv2d(1, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    inputs = widths[0]
    for stage, width in enumerate(widths):
        for position in range(2):
            layers.append(Block(inputs, width, 2 if stage > 0 and position == 0 else 1))
            inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def resnext() -> nn.Module:
    """A ResNeXt with 0.74 M parameters."""
    return ResNeXt(widths=(64, 128, 256), depth=2, groups=4)


def vit() -> nn.Module:
    """A vision transformer with 0.68 M parameters."""
    return VisionTransformer(width=96, depth=6, heads=4, patch=7)


NETS = {"resnet": resnet, "resnext": resnext, "vit": vit}


def _skip(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
