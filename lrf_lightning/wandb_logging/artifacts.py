"""The compressed model as an artifact of W&B, and the checkpoint that it comes from.

``compressed-<run id>`` carries the name of the objective as its alias only if the verdict is ``better`` or
``not worse``; else the verdict is added, as in ``lossless-inconclusive``. The smallest model of a run with a favourable
verdict is also called ``best``; the summary ``compress/best_params_model`` remembers its size.

``dense-<run id>`` is a reference to the checkpoint that was compressed, with its checksum, without a copy of it. Both
are outputs of the run, so that W&B's lineage shows them side by side, and ``dense_artifact`` and ``dense_digest`` among
the metadata of the compressed model say which one it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lrf_lightning.best_checkpoint import best_checkpoint_path
from lrf_lightning.best_effort import best_effort
from lrf_lightning.reports.summary import HOLDS, PREFIX
from lrf_lightning.reports.verdict import verdict_sentence
from lrf_lightning.solver.solution import Solution

__all__ = ["aliases", "dense_checkpoint", "log_artifacts", "settings_text", "texts"]

TIMES = ("seconds/", "latency_dense/", "latency_compressed/", "throughput_")  # the run's summary has them
ARTIFACT_FILES = ("model.safetensors", "compression.json", "compressed.ckpt")
BEST = f"{PREFIX}best_params_model"


def aliases(result: Solution) -> list[str]:
    """Aliases of the artifact: the objective, with the verdict unless that is favourable."""
    objective, certificate = result.settings.objective, result.certificate
    if certificate is not None and certificate.verdict in HOLDS:
        return [objective]
    verdict = "unverified" if certificate is None else certificate.verdict
    return [f"{objective}-{verdict.replace(' ', '-')}"]


def log_artifacts(
    run: Any, trainer: Trainer, result: Solution, figures: Mapping[str, float], directory: Path, weights: str
) -> None:
    """Hand over the files of the model with the tables and pictures beside it, and a reference to the original."""
    import wandb

    if not (directory / ARTIFACT_FILES[0]).is_file():
        return
    metadata = _metadata(result, figures)
    best_effort("log the dense checkpoint to W&B", lambda: metadata.update(_log_dense(run, trainer, weights)))
    artifact = wandb.Artifact(
        f"compressed-{run.id}", type="model", description=verdict_sentence(result), metadata=metadata
    )
    # the folder may be one of the user's with other files in it
    for name in ARTIFACT_FILES:
        if (directory / name).is_file():
            artifact.add_file(str(directory / name), name=name)
    for path in sorted(directory.iterdir()):
        if path.suffix in (".csv", ".png"):
            artifact.add_file(str(path), name=path.name)
    names = aliases(result)
    if _is_best(run, result):
        names.append("best")
        run.summary[BEST] = result.params_model[1]
    run.log_artifact(artifact, aliases=["latest", *names])


def _is_best(run: Any, result: Solution) -> bool:
    """Whether no model of this run with a favourable verdict is smaller."""
    if result.certificate is None or result.certificate.verdict not in HOLDS:
        return False
    smallest = run.summary.get(BEST)
    return smallest is None or result.params_model[1] <= smallest


def _log_dense(run: Any, trainer: Trainer, weights: str) -> dict[str, Any]:
    """Log a reference to the checkpoint of the original, and say what the artifact is called."""
    import wandb

    path = dense_checkpoint(trainer, weights)
    if path is None:
        return {"dense_checkpoint": ""}
    artifact = wandb.Artifact(
        f"dense-{run.id}", type="model", description="The trained model before its compression, by reference"
    )
    artifact.add_reference(path.absolute().as_uri(), name=path.name)
    run.log_artifact(artifact, aliases=["latest", weights])
    return {"dense_checkpoint": str(path), "dense_artifact": f"dense-{run.id}", "dense_digest": artifact.digest}


def dense_checkpoint(trainer: Trainer, weights: str) -> Path | None:
    """The file with the weights that were compressed, None if they were not written, or not on this machine.

    Args:
        trainer: its checkpoint callbacks know their files.
        weights: ``last`` or ``best``.
    """
    if trainer.state.fn != TrainerFn.FITTING:  # nothing was trained
        found = [trainer.ckpt_path]
    elif weights == "best":
        found = [best_checkpoint_path(trainer)]
    else:
        # one that saves every few epochs has older weights
        callbacks = [c for c in trainer.checkpoint_callbacks if _saved_last(c) in (None, trainer.global_step)]
        found = [getattr(callback, "last_model_path", None) for callback in callbacks]
        # without a metric to watch, the best file is the latest one
        found += [getattr(c, "best_model_path", None) for c in callbacks if getattr(c, "monitor", "") is None]
    return next((Path(path) for path in found if path and Path(path).is_file()), None)


def _saved_last(callback: Any) -> int | None:
    """The step of a checkpoint callback's latest file, None if it does not say."""
    step = getattr(callback, "_last_global_step_saved", None)
    return step if isinstance(step, int) else None


def _metadata(result: Solution, figures: Mapping[str, float]) -> dict[str, Any]:
    """Flat, without the times of stages and calls, because W&B takes 100 keys; the map of ranks is one of them."""
    named = {name.removeprefix(PREFIX): value for name, value in figures.items()}
    return {
        **{name: value for name, value in named.items() if not name.startswith(TIMES)},
        **{name.removeprefix(PREFIX): text for name, text in texts(result).items()},
        "ranks": json.dumps(result.ranks),
        "settings": settings_text(result),
    }


def settings_text(result: Solution) -> str:
    """The settings as JSON; what has no JSON form, such as a function, as its description."""
    return json.dumps(asdict(result.settings), default=str)


def texts(result: Solution) -> dict[str, str]:
    """What is said in words, under the keys of the run's summary."""
    certificate = result.certificate
    return {
        f"{PREFIX}verdict": "none" if certificate is None else certificate.verdict,
        f"{PREFIX}verdict_sentence": verdict_sentence(result),
        f"{PREFIX}objective": result.settings.objective,
    }
