"""Log a result: to the trainer's metrics, to every logger, and as tables and pictures in a folder.

===========================  ===========================================================================================
``callback_metrics``         every figure of :mod:`lrf_lightning.reports.summary`, as tensors, on every rank
W&B                          see :mod:`lrf_lightning.wandb_logging.run`
any other logger             the same figures through ``log_metrics``
folder                       ``summary.csv``, ``layers.csv``, ``frontier.csv``, ``ranks.csv``, ``curves.csv``,
                             ``probes.csv``, ``changes.csv``, ``speed.csv``, and ``frontier.png``, ``layers.png``,
                             ``ranks.png``, ``predicted_vs_measured.png``, ``spectra.png``, ``curves.png`` (or
                             ``spectra_1.png``, ...), ``changes.png``, ``changed_samples.png``
===========================  ===========================================================================================

Only rank zero writes. Whatever cannot be written, because a disk is full, a folder is gone or a connection is lost, is
one warning each and never an error: a run does not fail for its log.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, WandbLogger
from torch import Tensor

from lrf_lightning.best_effort import best_effort
from lrf_lightning.reports.summary import PREFIX, summary
from lrf_lightning.reports.tables import (
    change_rows,
    curve_rows,
    frontier_rows,
    layer_rows,
    probe_rows,
    rank_rows,
    speed_rows,
    write_csv,
)
from lrf_lightning.reports.verdict import verdict_sentence
from lrf_lightning.wandb_logging.run import Media, log_to_wandb

if TYPE_CHECKING:
    from lrf_lightning.api import CompressionResult
    from lrf_lightning.export.files import ExportedFile

__all__ = ["log_solution"]


def log_solution(
    trainer: Trainer,
    result: CompressionResult,
    directory: str | Path,
    *,
    images: Mapping[int, Tensor] | None = None,
    exports: Sequence[ExportedFile] = (),
    log_artifact: bool = True,
    weights: str = "last",
) -> None:
    """Log a result everywhere the user looks.

    Args:
        trainer: its loggers and its ``callback_metrics`` are used; call this on every rank.
        result: what the solver found.
        directory: folder for tables and pictures, and where the compressed model was saved.
        images: by the number of the verification sample, of those on which the models disagree; shape (height, width,
            1 or 3), uint8.
        exports: files of the compressed model in other formats; their sizes are logged.
        log_artifact: whether a W&B logger gets the compressed model of that folder as an artifact.
        weights: which weights were compressed, the ``last`` or those of the ``best`` checkpoint.
    """
    images = images or {}
    figures = summary(result) | _export_sizes(exports)
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in figures.items()})
    if not trainer.is_global_zero:
        return
    directory = Path(directory)
    best_effort("write the tables", lambda: _write_tables(result, figures, directory))
    pictures = _draw_pictures(result, images)
    best_effort("write the pictures", lambda: _write_pictures(pictures, directory))
    for sink in trainer.loggers:
        if isinstance(sink, WandbLogger):
            media = Media(pictures, images)
            log_to_wandb(sink, trainer, result, figures, media, directory if log_artifact else None, weights=weights)
        else:
            best_effort(f"log to {type(sink).__name__}", partial(_log_metrics, sink, figures, trainer.global_step))


def _export_sizes(exports: Sequence[ExportedFile]) -> dict[str, float]:
    """Bytes of every file and of the same model with dense layers."""
    sizes = {f"{PREFIX}{each.format}_bytes": float(each.size) for each in exports}
    dense = {f"{PREFIX}{each.format}_bytes_dense": float(each.dense_size) for each in exports if each.dense_size}
    return sizes | dense


def _log_metrics(sink: Logger, figures: Mapping[str, float], step: int) -> None:
    sink.log_metrics(dict(figures), step=step)
    sink.save()


def _write_tables(result: CompressionResult, figures: Mapping[str, float], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    named = [{"name": name, "value": value} for name, value in figures.items()]
    if result.certificate is not None:
        named += [{"name": "compress/verdict", "value": result.certificate.verdict}]
    named += [{"name": "compress/verdict_sentence", "value": verdict_sentence(result)}]
    write_csv(directory / "summary.csv", named)
    write_csv(directory / "layers.csv", layer_rows(result))
    write_csv(directory / "frontier.csv", frontier_rows(result))
    write_csv(directory / "ranks.csv", rank_rows(result))
    write_csv(directory / "curves.csv", curve_rows(result))
    write_csv(directory / "probes.csv", probe_rows(result))
    write_csv(directory / "changes.csv", change_rows(result))
    write_csv(directory / "speed.csv", speed_rows(result))


def _draw_pictures(result: CompressionResult, images: Mapping[int, Tensor]) -> dict[str, bytes]:
    """All pictures as PNG files by name; one that cannot be drawn is missing."""
    from lrf_lightning.plots.changes import draw_samples
    from lrf_lightning.plots.pictures import PICTURES, draw

    pictures: dict[str, bytes] = {}
    for name in PICTURES:
        best_effort(f"draw {name}", lambda: pictures.update(draw(result, name)))  # noqa: B023 (called at once)
    best_effort("draw changed samples", lambda: pictures.update(draw_samples(result, images)))
    return pictures


def _write_pictures(pictures: Mapping[str, bytes], directory: Path) -> None:
    for name, data in pictures.items():
        (directory / f"{name}.png").write_bytes(data)
