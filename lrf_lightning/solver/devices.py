"""Where the solver works."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["check_one_device", "solver_device"]


def solver_device(device: torch.device) -> torch.device:
    """The device itself, or the CPU for one without float64, which moments and decompositions need: Apple's MPS."""
    return torch.device("cpu") if device.type == "mps" else device


def check_one_device(model: nn.Module) -> None:
    """Refuse a model that is spread, whose forward pass moves tensors by itself.

    Raises:
        ValueError: if parameters lie on several devices.
    """
    devices = sorted({str(parameter.device) for parameter in model.parameters() if not parameter.is_meta})
    if len(devices) > 1:
        raise ValueError(
            f"the model's parameters lie on {', '.join(devices)}; it is compressed on one device. Load it without "
            "device_map, or move it with model.to(device)"
        )
