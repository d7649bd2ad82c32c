"""The function for users without a Trainer."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lrf_lightning import random_state
from lrf_lightning.copies.model_copy import copied_model
from lrf_lightning.copies.uncompiled import is_compiled, uncompile_children
from lrf_lightning.data.batches import fixed_order, overlaps
from lrf_lightning.distributed import current_processes
from lrf_lightning.fingerprint import weights_fingerprint
from lrf_lightning.solver.joint import CalibrationStep, solve
from lrf_lightning.solver.running.evaluation import Batches, LossFunction
from lrf_lightning.solver.running.seeded_batches import SeededBatches, split_seed
from lrf_lightning.solver.settings import Settings
from lrf_lightning.solver.solution import Solution
from lrf_lightning.solver.workspace import Progress
from lrf_lightning.steps.loss_explanation import ExplainedLoss
from lrf_lightning.surgery import settle

if TYPE_CHECKING:
    from lrf_lightning.saving.given_weights import Weights

__all__ = ["CompressionResult", "compress"]


@dataclasses.dataclass(frozen=True)
class CompressionResult(Solution):
    """A :class:`~lrf_lightning.solver.solution.Solution` that can be saved."""

    def save(self, path: str | PathLike[str]) -> Path | str:
        """Write ``model.safetensors`` and ``compression.json`` into the folder ``path``.

        If the weights of the model have changed since it was judged, it is saved with a warning and the description
        says so.

        Raises:
            OSError: if the folder cannot be written; the model stays in memory.
        """
        from lrf_lightning.saving.checkpoint import save_compressed

        return save_compressed(self, path)

    def at(self, keep: float) -> CompressionResult:
        """The result for another point of the frontier: its model, ranks, layers and verdict, which can be saved.

        Args:
            keep: share of the cost that may be kept; the largest point within it is taken.

        Raises:
            ValueError: if no point is that small, or the models were not kept because the objective is another one.
        """
        if self.point_models is None:
            objective = self.settings.objective
            raise ValueError(f"objective={objective!r} keeps one model; use objective='frontier' with budgets=[...]")
        # a budget may be given as it is printed
        fitting = [point for point in self.frontier if point.keep <= keep + 1e-9]
        if not fitting:
            smallest = min((point.keep for point in self.frontier), default=1.0)
            raise ValueError(f"keep={keep!r} is below {smallest:.4f}, the smallest point; add budgets=[..., {keep}]")
        point = max(fitting, key=lambda point: point.keep)
        model = self.point_models.build(point.ranks)
        settle(model)
        latency = self.latency_layers
        return dataclasses.replace(
            self,
            model=model,
            ranks=dict(point.ranks),
            layers=self.point_models.layers(point.ranks),
            frontier=[dataclasses.replace(other, chosen=other is point) for other in self.frontier],
            certificate=point.certificate or self.certificate,
            params_model=(self.params_model[0], point.params_model),
            params_layers=(self.params_layers[0], point.params_layers),
            flops_layers=(self.flops_layers[0], point.flops_layers),
            speed=point.speed,
            latency_layers=latency and (latency[0], latency[0] * point.keep),
            changes=[],
            message=f"Taken from the frontier at {point.keep:.4f} of the {self.settings.cost}.",
            fingerprint=weights_fingerprint(model),
        )


def compress(
    model: nn.Module,
    loss: LossFunction,
    calibration: Batches,
    selection: Batches,
    verification: Batches,
    *,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    score_name: str = "",
    cache_dir: str | PathLike[str] | None = None,
    weights: Weights | None = None,
    **settings: Any,
) -> CompressionResult:
    """Make a trained model smaller without making it worse, and say how sure that is.

    Random states, gradient mode and the model's flags are as they were on return.

    Within a process group of ``torch.distributed`` all processes must call it, with the same model and settings, and
    batch i of a split must be given to process i modulo the number of processes. All of them get the same result.

    Args:
        model: any trained module; a copy of it is compressed, the model itself is not touched.
        loss: ``loss(model, batch)``, a Tensor of shape (batch,) with one loss per sample or () with the mean over the
            batch, or a :class:`~lrf_lightning.StepOutput` that also holds a score. It is called in evaluation mode. The
            tokens or pixels that a sample's loss is a mean over are found where it calls a common loss function of
            torch (:class:`~lrf_lightning.steps.loss_explanation.ExplainedLoss`); otherwise give them as
            ``StepOutput.terms``.
        calibration: batches for statistics, predictions and compensation, best held out from training. Like the other
            two, a DataLoader, whose order is drawn once; an iterator, which is read into memory; or any iterable that
            yields the same samples in the same order each time it is run through.
        selection: batches on which the choice among candidates is made.
        verification: batches on which the verdict is reached; they take no part in the choice. Random numbers that are
            drawn while a batch is loaded, or by the loss, are the same ones on every pass.
        device: where the work is done, by default where the model is.
        progress: called as ``progress(stage, done, total)``; a total of 0 is unknown.
        score_name: what the score is called in the report, such as ``"accuracy"``.
        cache_dir: folder of calibrations that solves of the same model and data share, whatever their objective and
            budget; see :mod:`lrf_lightning.sweeps.calibration_cache`.
        weights: what a copy of the model gets first: a state dict, or the path or URL of a file with one, such as a
            checkpoint of Lightning or a ``.safetensors`` file. None takes the model's own.
        **settings: fields of :class:`~lrf_lightning.solver.settings.Settings`.

    Returns:
        The compressed model with its ranks, frontier, certificate and predictions.

    Raises:
        TypeError: if a setting is unknown, or ``model`` or ``loss`` is of the wrong kind.
        ValueError: if a setting is out of its range, a split is empty, the loss is no finite scalar or per-sample
            vector, ``weights`` does not fit the model, weights are not finite, or the budget cannot be met.
    """
    checked = _checked_settings(settings)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give the trained torch.nn.Module")
    if not callable(loss):
        raise TypeError(f"loss={loss!r} is no callable; give loss(model, batch) that returns a Tensor or a StepOutput")
    if is_compiled(model):
        raise TypeError(
            "model is the result of torch.compile; give what was compiled, model._orig_mod, and compile what comes back"
        )
    if weights is not None:
        from lrf_lightning.saving.given_weights import with_weights

        model = with_weights(model, weights)
    if any(is_compiled(child) for child in model.modules()):
        model = copied_model(model)
        uncompile_children(model)
    given = {"calibration": calibration, "selection": selection, "verification": verification}
    with random_state.preserved(), torch.inference_mode(False), torch.enable_grad():
        splits = {role: _ordered(role, batches, checked.seed) for role, batches in given.items()}
        for warning in overlaps(splits):
            warnings.warn(warning, stacklevel=2)
        solution = solve(
            model,
            ExplainedLoss(loss),
            **{role: _seeded(batches, split_seed(checked.seed, role)) for role, batches in splits.items()},
            settings=checked,
            device=None if device is None else torch.device(device),
            progress=progress,
            calibration_step=None if cache_dir is None else _cached(cache_dir),
        )
    found = {f.name: getattr(solution, f.name) for f in dataclasses.fields(solution)}
    return CompressionResult(**found | {"score_name": score_name, "fingerprint": weights_fingerprint(solution.model)})


def _cached(folder: str | PathLike[str]) -> CalibrationStep:
    from lrf_lightning.sweeps.calibration_cache import CalibrationCache

    return CalibrationCache(folder)


def _checked_settings(settings: dict[str, Any]) -> Settings:
    names = [field.name for field in dataclasses.fields(Settings)]
    for name in settings:
        if name not in names:
            near = get_close_matches(name, names, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"compress has no setting {name!r}{hint}; settings are {', '.join(names)}")
    checked = Settings(**settings)
    if len(settings) < len(names):  # the callback gives all of them, and has told it before the training
        for ignored in checked.without_effect:
            warnings.warn(ignored, stacklevel=3)
    return checked


def _ordered(role: str, batches: Batches, seed: int) -> Batches:
    if not isinstance(batches, Iterable):
        raise TypeError(f"{role} is a {type(batches).__name__}; give a DataLoader or an iterable of batches")
    return fixed_order(batches, seed)


def _seeded(batches: Batches, seed: int) -> Batches:
    if isinstance(batches, SeededBatches):
        return batches
    return SeededBatches(batches, seed, current_processes(torch.device("cpu")))
