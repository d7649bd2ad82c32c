"""Whether all processes solve the same task: the same settings and weights; buffers are made equal."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from lrf_lightning.distributed import Processes
from lrf_lightning.solver.settings import Settings

__all__ = ["unify"]

DISAGREEMENT = (
    "All processes must solve the same task. Sweeps whose sampler has no seed start every process with other "
    "arguments; give the sampler a seed"
)


def unify(model: nn.Module, settings: Settings, processes: Processes) -> None:
    """Check that all processes have the same settings and weights, and give them the buffers of the first one.

    Running statistics are not kept in step while training: every process has those of its own batches.
    """
    if processes.size == 1:
        return
    values = {
        f"the setting {field.name!r}": repr(getattr(settings, field.name))
        for field in dataclasses.fields(settings)
        if not callable(getattr(settings, field.name))  # shown with an address
    }
    values |= {f"the sum of the bytes of the weight {name!r}": _byte_sum(p) for name, p in model.named_parameters()}
    processes.agree(values, DISAGREEMENT)
    buffers = dict(model.named_buffers())
    kinds = {name: (str(buffer.dtype), tuple(buffer.shape)) for name, buffer in buffers.items() if not buffer.is_meta}
    everywhere = set.intersection(*(set(other.items()) for other in processes.gather(kinds)))
    for name, kind in kinds.items():
        if (name, kind) in everywhere and buffers[name].numel():
            # bytes travel, since backends do not know every dtype
            content = buffers[name].detach().clone(memory_format=torch.contiguous_format).reshape(-1)
            processes.broadcast_([content.view(torch.uint8)], 0)
            with torch.no_grad():
                buffers[name].copy_(content.reshape(buffers[name].shape))


def _byte_sum(weight: nn.Parameter) -> str:
    if weight.is_meta or isinstance(weight, nn.parameter.UninitializedParameter):
        return "unknown"
    return f"{int(weight.detach().flatten().view(torch.uint8).sum())} of shape {tuple(weight.shape)}"
