"""Compressed copies of the dense model, as many in one go as memory and threads allow."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from lrf_lightning.solver.factors.compensation import fit_layers
from lrf_lightning.solver.factors.decomposition import owners
from lrf_lightning.solver.layers.layer_statistics import LayerStatistics, memory_groups
from lrf_lightning.solver.running.evaluation import Batches
from lrf_lightning.solver.workspace import Workspace

# paused passes that are alive at a time, each in a thread of its own; on CUDA every thread has workspaces of cuBLAS,
# 8 to 32 MiB
MOST_RUNS, MOST_RUNS_ON_CUDA = 256, 128
# batches that the compensation sees, of two models at least
MOST_BATCHES, MOST_BATCHES_ON_CUDA = 512, 64

__all__ = ["compensation_batches", "compressed_copies", "copies_at_once"]


def compressed_copies(work: Workspace, allocations: Sequence[Mapping[str, int]]) -> Iterator[nn.Module]:
    """Compensated copies of the dense model, one for each allocation of ranks, in their order."""
    names = {name for ranks in allocations for name in ranks}
    layers = {name: layer for name, layer in work.layers.items() if name in names}
    count = copies_at_once(work, layers)
    for start in range(0, len(allocations), count):
        fitted = _fitted(work, allocations[start : start + count], layers)
        while fitted:
            yield fitted.pop(0)


def copies_at_once(work: Workspace, layers: Mapping[str, LayerStatistics], *, alone: bool = False) -> int:
    """How many compressed copies the compensation may fit in one go, besides the dense model's passes.

    Bounded by the memory of their passes, of the moments of one layer, and of the copies themselves, and by the number
    of threads. It is the same on all processes.

    Args:
        work: the workspace, with layers.
        layers: those that are fitted.
        alone: whether to count as if there were a single process.
    """
    batches = min(max(work.batches, 1), _most_batches(work.device))
    passes = work.memory / max(_pass_bytes(work) * batches, 1.0) - 1
    widest = max(
        (
            16.0 * layer.candidate.groups * layer.candidate.columns**2
            for layer in layers.values()
            if not layer.inputs.diagonal
        ),
        default=0.0,
    )
    # frozen ones once more, since they are kept to be restored
    weights = float(sum(p.numel() * p.element_size() * (2 - p.requires_grad) for p in work.model.parameters()))
    # the first process has the most batches
    runs = MOST_RUNS_ON_CUDA if work.device.type == "cuda" else MOST_RUNS
    threads = runs / math.ceil(batches / (1 if alone else work.processes.size)) - 1
    return max(1, math.floor(min(passes, threads, work.memory / max(widest + weights, 1.0))))


def compensation_batches(work: Workspace) -> Batches:
    """This process's part of as many calibration batches as may be in the middle of a pass at once.

    A pass of each model keeps about three tensors of the size of the largest input alive, and a thread. The limit holds
    for all processes together, so that the factors do not depend on how many there are.
    """
    count = max(1, math.floor(min(work.memory / max(2 * _pass_bytes(work), 1.0), _most_batches(work.device))))
    return itertools.islice(work.calibration, work.processes.share(count))


def _fitted(
    work: Workspace, allocations: Sequence[Mapping[str, int]], layers: Mapping[str, LayerStatistics]
) -> list[nn.Module]:
    settings = work.settings
    copies = [work.copied() for _ in allocations]
    by_candidate = {id(layer.candidate): name for name, layer in layers.items()}
    with work.stage("compensation", sum(map(len, allocations))) as advance:
        for group in memory_groups((layer.candidate for layer in layers.values()), work.memory):
            chosen = {by_candidate[id(candidate)]: layers[by_candidate[id(candidate)]] for candidate in group}
            if not work.keeps_gradients:
                chosen = work.statistics(group)
            fit_layers(
                work.model,
                list(zip(copies, allocations, strict=True)),
                chosen,
                metric=settings.metric,
                damping=settings.damping,
                compensation=settings.compensation,
                loss=work.loss,
                batches=compensation_batches(work),
                device=work.device,
                sampler=work.sampler,
                processes=work.processes,
                owners=owners(work, chosen),
                advance=advance,
            )
    return copies


def _most_batches(device: torch.device) -> int:
    return MOST_BATCHES_ON_CUDA if device.type == "cuda" else MOST_BATCHES


def _pass_bytes(work: Workspace) -> float:
    """Memory of one model's half-finished pass over one batch."""
    sample = 3 * max((layer.input_bytes for layer in work.layers.values()), default=0.0)
    return sample * work.sampler.samples / max(work.batches, 1)
