"""The precision of float32 products on the device, which torch lets be set in two ways that exclude each other."""

from __future__ import annotations

import torch

__all__ = ["matmul_precision"]


def matmul_precision() -> str | None:
    """What :func:`torch.get_float32_matmul_precision` says.

    Returns:
        ``highest``, ``high`` or ``medium``; None where it was set by backend, as ``torch.backends.*.fp32_precision``
        does since torch 2.9, so that the question raises an error.
    """
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None
