"""Log a result to the run of a ``WandbLogger``; no run is opened, and none is finished.

What arrives, with keys that stay the same between versions:

==========================================  ============================================================================
run summary ``compress/...``                the figures of :mod:`lrf_lightning.reports.summary`, and as text
                                            ``compress/verdict``, ``compress/verdict_sentence``, ``compress/objective``
table ``compress/layers``                   one row per layer: kind, shape, rank, parameters, predicted change, reason
table ``compress/frontier``                 the original and every measured point
table ``compress/ranks``                    rank of every layer at every point
table ``compress/curves``                   per layer and rank: singular value, predicted change of the loss, its parts
table ``compress/probes``                   predicted against measured change of truncations
table ``compress/changes``                  verification samples on which the models disagree, with their images
picture ``compress/pictures/frontier``      loss and score over the parameters kept; likewise ``layers``, ``ranks``,
                                            ``predicted_vs_measured``, ``spectra``, ``curves``, ``changes`` (which class
                                            became which) and ``changed_samples``
chart ``compress/charts/frontier_loss``     scatter of the measured points with units on its axes, which W&B draws for
                                            all selected runs together; likewise ``frontier_score`` and
                                            ``predicted_vs_measured``
history ``compress/frontier_point/...``     losses, scores, their changes and speed-ups over the step metric
                                            ``params_model_kept`` beside them (share of the whole model): the frontiers
                                            of several runs as lines in one chart
artifact ``compressed-<run id>``            type ``model``: the saved model with tables and pictures
artifact ``dense-<run id>``                 type ``model``: a reference to the checkpoint that was compressed, without a
                                            copy of it, so that W&B's lineage shows both; ``dense_artifact`` among the
                                            metadata of the compressed one is its name
config ``compress``                         the settings
==========================================  ============================================================================

Aliases of the artifact are explained in :mod:`lrf_lightning.wandb_logging.artifacts`. An unchanged model gives none.

Under strategies that fork, the process finishes its run when it ends; see :mod:`lrf_lightning.wandb_logging.fork`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from lrf_lightning.best_effort import best_effort
from lrf_lightning.reports.summary import PREFIX
from lrf_lightning.reports.tables import (
    Row,
    change_rows,
    curve_rows,
    frontier_rows,
    layer_rows,
    probe_rows,
    rank_rows,
)
from lrf_lightning.wandb_logging.artifacts import log_artifacts, settings_text, texts

if TYPE_CHECKING:
    from lrf_lightning.solver.solution import Solution

__all__ = ["Media", "log_to_wandb"]

# a table is a file that a browser loads: 64 ranks on a logarithmic scale draw any curve
MOST_RANKS = 64
FRONTIER_VALUES = (
    "params_model_kept", "loss", "loss_change", "score", "score_change", "speedup_batch_large", "speedup_batch_1",
)  # fmt: skip


KEPT, CHANGE = "parameters kept (% of the whole model)", "change of the {} (compressed - original)"


@dataclass(frozen=True)
class Media:
    """What can be looked at.

    Attributes:
        pictures: PNG files by name.
        images: of verification samples by their number, shape (height, width, 1 or 3), uint8.
    """

    pictures: Mapping[str, bytes] = field(default_factory=dict)
    images: Mapping[int, Tensor] = field(default_factory=dict)


def log_to_wandb(
    sink: WandbLogger,
    trainer: Trainer,
    result: Solution,
    figures: Mapping[str, float],
    media: Media,
    directory: Path | None,
    *,
    weights: str = "last",
) -> None:
    """Log everything in this module's table; call it on rank zero only. What fails is a warning.

    Args:
        sink: the user's logger.
        trainer: for the step and the checkpoint of the original.
        result: what the solver found.
        figures: of :func:`lrf_lightning.reports.summary.summary`.
        media: pictures of the result, and images of samples.
        directory: folder with the saved model, None for no artifact.
        weights: which weights were compressed, the ``last`` or those of the ``best`` checkpoint.
    """
    step = {"trainer/global_step": trainer.global_step}
    best_effort("log tables to W&B", lambda: sink.experiment.log({**_tables(result), **step}))
    best_effort("log changed samples to W&B", lambda: sink.experiment.log({**_changes(result, media.images), **step}))
    best_effort("log charts to W&B", lambda: sink.experiment.log({**_charts(result), **step}))
    best_effort("log the frontier to W&B", lambda: _log_frontier(sink.experiment, result))
    best_effort("log pictures to W&B", lambda: sink.experiment.log({**_images(media.pictures), **step}))
    best_effort("log settings to W&B", lambda: _log_settings(sink.experiment, result))
    best_effort("log the summary to W&B", lambda: sink.experiment.summary.update({**figures, **texts(result)}))
    if directory is not None and result.ranks:
        best_effort(
            "log the compressed model to W&B",
            lambda: log_artifacts(sink.experiment, trainer, result, figures, directory, weights),
        )


def _tables(result: Solution) -> dict[str, Any]:
    rows = {
        "layers": layer_rows(result),
        "frontier": frontier_rows(result),
        "ranks": rank_rows(result),
        "curves": curve_rows(result, most=MOST_RANKS),
        "probes": probe_rows(result),
    }
    return {PREFIX + name: _table(table) for name, table in rows.items() if table}


def _table(rows: list[Row]) -> Any:
    import wandb

    return wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])


def _changes(result: Solution, images: Mapping[int, Tensor]) -> dict[str, Any]:
    """The table of samples that changed, with an image in front where there is one."""
    import wandb

    rows = change_rows(result)
    if images:
        pictures = {sample: wandb.Image(image.numpy()) for sample, image in images.items()}
        rows = [{"image": pictures.get(row["sample"]), **row} for row in rows]
    return {f"{PREFIX}changes": _table(rows)} if rows else {}


def _charts(result: Solution) -> dict[str, Any]:
    """Charts of W&B's own, whose axes are named by columns of their tables."""
    frontier = [row for row in frontier_rows(result) if row["params_model_kept"] is not None]
    charts: dict[str, Any] = {}
    for name in ("loss", "score"):
        points = [(100 * row["params_model_kept"], row[f"{name}_change"]) for row in frontier]
        title = f"Change of the {name} over the parameters kept, selection split"
        charts |= _scatter(f"frontier_{name}", points, KEPT, CHANGE.format(name), title)
    pairs = [(row["predicted_change"], row["measured_change"]) for row in probe_rows(result)]
    pairs += [(point.predicted, point.loss_change) for point in result.frontier]
    columns = "predicted change of the loss", "measured change of the loss"
    return charts | _scatter("predicted_vs_measured", pairs, *columns, "Predicted against measured change of the loss")


def _scatter(name: str, points: list[tuple[float, float]], x: str, y: str, title: str) -> dict[str, Any]:
    import wandb

    data = [list(point) for point in points if point[1] is not None]
    if not data:
        return {}
    chart = wandb.plot.scatter(wandb.Table(columns=[x, y], data=data), x, y, title=title)
    return {f"{PREFIX}charts/{name}": chart}


def _log_frontier(run: Any, result: Solution) -> None:
    prefix = f"{PREFIX}frontier_point/"
    kept = f"{prefix}params_model_kept"
    # every name on its own, since the pattern that WandbLogger defines for all names would win over one of ours; and no
    # summary, which would show the smallest point as if it were the result
    run.define_metric(kept, hidden=True, summary="none")
    for name in FRONTIER_VALUES:
        if prefix + name != kept:
            run.define_metric(prefix + name, step_metric=kept, summary="none")
    for row in frontier_rows(result):
        run.log({prefix + name: row[name] for name in FRONTIER_VALUES if row[name] is not None})


def _images(pictures: Mapping[str, bytes]) -> dict[str, Any]:
    import wandb
    from PIL import Image

    return {
        f"{PREFIX}pictures/{name}": wandb.Image(Image.open(BytesIO(data)), caption=name.replace("_", " "))
        for name, data in pictures.items()
    }


def _log_settings(run: Any, result: Solution) -> None:
    run.config.update({"compress": json.loads(settings_text(result))}, allow_val_change=True)
