"""Log a result to the run of a ``WandbLogger``; no run is opened, and none is finished.

What arrives, with keys that stay the same between versions:

==========================================  ============================================================================
run summary ``compress/...``                the figures of :mod:`lrf_lightning.summary`, and as text
                                            ``compress/verdict``, ``compress/verdict_sentence``, ``compress/objective``
table ``compress/layers``                   one row per layer: kind, shape, rank, parameters, predicted change, reason
table ``compress/frontier``                 the original and every measured point
table ``compress/ranks``                    rank of every layer at every point
table ``compress/curves``                   per layer and rank: singular value, predicted change of the loss, its parts
table ``compress/probes``                   predicted against measured change of truncations
picture ``compress/pictures/frontier``      loss and score over the parameters kept; likewise ``layers``, ``ranks``,
                                            ``predicted_vs_measured``, ``spectra`` and ``curves``
history ``compress/frontier_point/...``     ``loss``, ``loss_change``, ``score``, ``score_change`` over the step metric
                                            ``params_model_kept`` beside them (share of the whole model), so that the
                                            frontiers of several runs can be drawn into one chart
artifact ``compressed-<run id>``            type ``model``: the saved model with tables and pictures
config ``compress``                         the settings
==========================================  ============================================================================

The artifact carries the name of the objective as its alias only if the verdict is ``better`` or ``not worse``; else the
verdict is added, as in ``lossless-inconclusive``. An unchanged model gives no artifact.

Under strategies that fork, W&B loses what a process did not finish: call ``wandb.finish()`` at the end of the worker.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger

from lrf_lightning.best_effort import best_effort
from lrf_lightning.summary import HOLDS, PREFIX
from lrf_lightning.tables import Row, curve_rows, frontier_rows, layer_rows, probe_rows, rank_rows
from lrf_lightning.verdict import verdict_sentence

if TYPE_CHECKING:
    from lrf_lightning.solver.result import Solution

__all__ = ["aliases", "log_to_wandb"]

# a table is a file that a browser loads: 64 ranks on a logarithmic scale draw any curve
MOST_RANKS = 64
ARTIFACT_FILES = ("model.safetensors", "compression.json", "compressed.ckpt")
FRONTIER_VALUES = ("params_model_kept", "loss", "loss_change", "score", "score_change")


def log_to_wandb(
    sink: WandbLogger,
    trainer: Trainer,
    result: Solution,
    figures: Mapping[str, float],
    pictures: Mapping[str, bytes],
    directory: Path | None,
) -> None:
    """Log everything in this module's table; call it on rank zero only. What fails is a warning.

    Args:
        sink: the user's logger.
        trainer: for the step and the checkpoint of the original.
        result: what the solver found.
        figures: of :func:`lrf_lightning.summary.summary`.
        pictures: PNG files by name.
        directory: folder with the saved model, None for no artifact.
    """
    step = {"trainer/global_step": trainer.global_step}
    best_effort("log tables to W&B", lambda: sink.experiment.log({**_tables(result), **step}))
    best_effort("log the frontier to W&B", lambda: _log_frontier(sink.experiment, result))
    best_effort("log pictures to W&B", lambda: sink.experiment.log({**_images(pictures), **step}))
    best_effort("log settings to W&B", lambda: _log_settings(sink.experiment, result))
    best_effort("log the summary to W&B", lambda: sink.experiment.summary.update({**figures, **_texts(result)}))
    if directory is not None and result.ranks:
        best_effort(
            "log the compressed model to W&B",
            lambda: _log_artifact(sink.experiment, trainer, result, figures, directory),
        )


def aliases(result: Solution) -> list[str]:
    """Aliases of the artifact: the objective, with the verdict unless that is favourable."""
    objective, certificate = result.settings.objective, result.certificate
    if certificate is not None and certificate.verdict in HOLDS:
        return [objective]
    verdict = "unverified" if certificate is None else certificate.verdict
    return [f"{objective}-{verdict.replace(' ', '-')}"]


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


def _log_frontier(run: Any, result: Solution) -> None:
    prefix = f"{PREFIX}frontier_point/"
    run.define_metric(f"{prefix}params_model_kept", hidden=True)
    # the summary would otherwise show the smallest point as if it were the result
    run.define_metric(f"{prefix}*", step_metric=f"{prefix}params_model_kept", summary="none")
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
    run.config.update({"compress": json.loads(_settings_text(result))}, allow_val_change=True)


def _settings_text(result: Solution) -> str:
    """The settings as JSON; what has no JSON form, such as a function, as its description."""
    return json.dumps(asdict(result.settings), default=str)


def _texts(result: Solution) -> dict[str, str]:
    certificate = result.certificate
    return {
        f"{PREFIX}verdict": "none" if certificate is None else certificate.verdict,
        f"{PREFIX}verdict_sentence": verdict_sentence(result),
        f"{PREFIX}objective": result.settings.objective,
    }


def _log_artifact(run: Any, trainer: Trainer, result: Solution, figures: Mapping[str, float], directory: Path) -> None:
    """Hand over the files of the model with the tables and pictures beside it; W&B copies them."""
    import wandb

    if not (directory / ARTIFACT_FILES[0]).is_file():
        return
    artifact = wandb.Artifact(
        f"compressed-{run.id}",
        type="model",
        description=verdict_sentence(result),
        metadata=_metadata(trainer, result, figures),
    )
    # the folder may be one of the user's with other files in it
    for name in ARTIFACT_FILES:
        if (directory / name).is_file():
            artifact.add_file(str(directory / name), name=name)
    for path in sorted(directory.iterdir()):
        if path.suffix in (".csv", ".png"):
            artifact.add_file(str(path), name=path.name)
    run.log_artifact(artifact, aliases=["latest", *aliases(result)])


def _metadata(trainer: Trainer, result: Solution, figures: Mapping[str, float]) -> dict[str, Any]:
    """Flat, because W&B takes 100 keys at most; the map of ranks is one of them."""
    checkpoint = trainer.checkpoint_callback
    return {
        **{name.removeprefix(PREFIX): value for name, value in figures.items()},
        **{name.removeprefix(PREFIX): text for name, text in _texts(result).items()},
        "ranks": json.dumps(result.ranks),
        "settings": _settings_text(result),
        "dense_checkpoint": getattr(checkpoint, "best_model_path", "") or "",
    }
