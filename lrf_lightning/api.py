"""The function for users without a Trainer."""

from __future__ import annotations

import dataclasses
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrf_lightning.solver.evaluation import Batches, LossFunction
from lrf_lightning.solver.joint import solve
from lrf_lightning.solver.result import Solution
from lrf_lightning.solver.settings import Settings
from lrf_lightning.solver.workspace import Progress

__all__ = ["CompressionResult", "compress"]


@dataclasses.dataclass(frozen=True)
class CompressionResult(Solution):
    """A :class:`~lrf_lightning.solver.result.Solution` that can be saved."""

    def save(self, path: str | PathLike[str]) -> Path:
        """Write ``model.safetensors`` and ``compression.json`` into the folder ``path``.

        Raises:
            OSError: if the folder cannot be written; the model stays in memory.
        """
        from lrf_lightning.checkpoint import save_compressed

        return save_compressed(self, path)


def compress(
    model: nn.Module,
    loss: LossFunction,
    calibration: Batches,
    selection: Batches,
    verification: Batches,
    *,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> CompressionResult:
    """Make a trained model smaller without making it worse, and say how sure that is.

    Args:
        model: any trained module; a copy of it is compressed, the model itself is not touched.
        loss: ``loss(model, batch)``, a Tensor of shape (batch,) with one loss per sample or () with the mean over the
            batch, or a :class:`~lrf_lightning.StepOutput` that also holds a score. It is called in evaluation mode.
        calibration: batches for statistics, predictions and compensation. Like the other two, an iterable that can be
            run through repeatedly and yields the same samples in the same order each time, such as a DataLoader
            without shuffling. Best held out from training.
        selection: batches on which the choice among candidates is made.
        verification: batches on which the verdict is reached; they take no part in the choice.
        device: where the work is done, by default where the model is.
        progress: called as ``progress(stage, done, total)``; a total of 0 is unknown.
        **settings: fields of :class:`~lrf_lightning.solver.settings.Settings`.

    Returns:
        The compressed model with its ranks, frontier, certificate and predictions.

    Raises:
        TypeError: if a setting is unknown.
        ValueError: if a setting is out of its range, a split is empty, the loss is no finite scalar or per-sample
            vector, weights are not finite, or the budget cannot be met.
    """
    solution = solve(
        model,
        loss,
        calibration,
        selection,
        verification,
        settings=Settings(**settings),
        device=None if device is None else torch.device(device),
        progress=progress,
    )
    return CompressionResult(**{f.name: getattr(solution, f.name) for f in dataclasses.fields(solution)})
