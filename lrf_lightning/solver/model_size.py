"""How large a model is."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["model_bytes", "parameter_count"]


def parameter_count(model: nn.Module) -> int:
    """Entries of all weights; what several modules share counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def model_bytes(model: nn.Module) -> int:
    """Bytes of the weights and buffers in a file; what several modules share counts once."""
    values = (value for value in model.state_dict().values() if isinstance(value, Tensor))
    tensors = {value.data_ptr() or id(value): value for value in values}
    return sum(value.numel() * value.element_size() for value in tensors.values())
