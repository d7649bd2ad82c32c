"""Calibrations that several solves share: what is learnt about a model's layers, in a file.

The file is named after the content of everything that it depends on: weights and structure of the model, the
calibration batches, the settings that calibration reads, the loss as far as the original's figures on the selection
split show it, the device, and the source of all of this package that has a part in it. Anything else, such as a
budget, does not matter.

Parallel jobs can share a folder: a file is written whole or not at all, and while a job works on a calibration the
others that need it wait. A calibration takes about as much disk as the moments of the layers take memory
(``memory_gib`` at most).
"""

from __future__ import annotations

import dataclasses
import io
import logging
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from lrf_lightning import safe_files
from lrf_lightning.best_effort import best_effort
from lrf_lightning.fingerprint import UnknownContentError, fingerprint
from lrf_lightning.solver.layers.layer_curve import Curve, Prediction, Probe
from lrf_lightning.solver.layers.layer_input import LayerInput
from lrf_lightning.solver.layers.layer_statistics import LayerStatistics, TiedUse, empty_statistics
from lrf_lightning.solver.layers.moments import Moment
from lrf_lightning.solver.layers.statistics import RowSampler
from lrf_lightning.solver.predictions.calibration import calibrate
from lrf_lightning.solver.running.evaluation import Outcome
from lrf_lightning.solver.settings import Settings
from lrf_lightning.solver.workspace import Workspace
from lrf_lightning.surgery import Candidate, Skipped

__all__ = ["CalibrationCache", "locked"]

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
# what is read after the calibration only; a new setting counts until it is listed here
LATER = {
    "objective", "keep", "budgets", "cost", "tolerance", "score_tolerance", "ties", "loss_margin", "score_margin",
    "confidence", "speed", "points", "refinements", "rank_multiple", "variant", "gamma", "gamma_kind",
}  # fmt: skip
# the candidates themselves are in the key
CHOICE = {"include", "exclude", "types", "exclude_types", "predicate", "frozen", "min_params"}
# what ties a record to the model at hand
LINKS = ("candidate", "module", "reader")


class CalibrationCache:
    """Takes the place of :func:`lrf_lightning.solver.predictions.calibration.calibrate`.

    Args:
        folder: where the files are; it is created if need be.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        self.folder = Path(folder)

    def __call__(self, work: Workspace, candidates: list[Candidate], dense: Outcome) -> None:
        """Fill the workspace from a file, or calibrate and write it."""
        if work.processes.size > 1:
            logger.info("Calibrations are not cached when several processes work together.")
            calibrate(work, candidates)
            return
        try:
            key = _key(work, candidates, dense)
        except UnknownContentError as error:
            logger.info("The calibration is not cached: %s.", error)
            calibrate(work, candidates)
            return
        path = self.folder / f"calibration-{key}.pt"
        with locked(path):
            if path.is_file() and self._taken(work, candidates, path):
                return
            calibrate(work, candidates)
            best_effort("keep the calibration", lambda: safe_files.write_bytes(path, _packed(work)))

    def _taken(self, work: Workspace, candidates: list[Candidate], path: Path) -> bool:
        with work.stage("calibration from the cache", 0):
            try:
                content = torch.load(path, map_location=work.device, weights_only=True)
                _unpack(work, candidates, content)
            except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, ValueError, TypeError) as error:
                logger.warning("The cached calibration %s cannot be read (%s); it is made anew.", path, error)
                return False
        logger.info("The calibration is taken from %s.", path)
        return True


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time work on a file; the lock of a process that dies is released.

    Where no lock can be had, because the folder is read-only or its file system has none, processes do not wait.
    """
    lock = FileLock(f"{path}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except TimeoutError:
            logger.info("Waiting for another job that works on %s.", path.name)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        logger.warning("No lock for %s (%s); jobs that need the same do not wait for each other.", path, error)
    try:
        yield
    finally:
        lock.release()


def _key(work: Workspace, candidates: list[Candidate], dense: Outcome) -> str:
    measured = dense.measurement()
    settings = {
        field.name: getattr(work.settings, field.name)
        for field in dataclasses.fields(Settings)
        if field.name not in LATER | CHOICE
    }
    # digits that rounding leaves alone; the figures only tell another loss or model code from this one
    figures = [f"{value:.3e}" for value in (measured.loss, measured.score or 0.0)]
    return fingerprint(
        FORMAT_VERSION,
        _code(),
        str(torch.__version__),
        work.device.type,
        work.model,
        work.calibration,
        settings,
        work.settings.objective == "paper",
        [(c.name, c.kind, c.groups, c.rows, c.columns, list(c.twins)) for c in candidates],
        # orders of the factors are compared at equal cost
        work.settings.cost if any(len(c.orders(work.settings.conv_order)) > 1 for c in candidates) else None,
        measured.samples,
        figures,
        f"{dense.terms:.3e}",  # the same loss may be given with its terms or without
    )


@cache
def _code() -> str:
    """A digest of this package's source, which decides what a calibration holds."""
    return fingerprint(*(path.read_bytes() for path in _code_files()))


def _code_files() -> list[Path]:
    folder = Path(__file__).parents[1]
    parts = ("copies", "modules", "solver", "steps", "surgery")
    files = [path for name in parts for path in sorted((folder / name).rglob("*.py"))]
    return [
        *files,
        *(folder / f"{name}.py" for name in ("distributed", "matmul_precision", "random_state")),
        Path(__file__),
    ]


def _packed(work: Workspace) -> bytes:
    buffer = io.BytesIO()
    sampler = work.sampler
    torch.save(
        {
            "layers": [(name, _dump(layer)) for name, layer in work.layers.items()],
            "skipped": [dataclasses.asdict(skipped) for skipped in work.skipped],
            "splits": {name: layer.candidate.split for name, layer in work.layers.items()},
            "curves": {name: _dump(curve) for name, curve in work.curves.items()},
            "sampler": [sampler.rows_per_feature, sampler.samples, sampler.seed],
            "batches": work.batches,
            "keeps_gradients": work.keeps_gradients,
            "samples": work.samples["calibration"],
        },
        buffer,
    )
    return buffer.getvalue()


def _unpack(work: Workspace, candidates: list[Candidate], content: Mapping[str, Any]) -> None:
    """Fill the workspace; nothing is changed if the content does not fit."""
    by_name = {candidate.name: candidate for candidate in candidates}
    layers = {}
    for name, stored in content["layers"]:
        layers[name] = empty_statistics(work.model, by_name[name])
        layers[name].set_order(content["splits"][name])
        _fill(layers[name], stored)
    curves = {name: _curve(stored) for name, stored in content["curves"].items()}
    sampler, skipped = RowSampler(*content["sampler"]), [Skipped(**stored) for stored in content["skipped"]]
    work.samples["calibration"], work.batches = int(content["samples"]), int(content["batches"])
    work.keeps_gradients = bool(content["keeps_gradients"])
    work.layers, work.curves, work.sampler, work.skipped = layers, curves, sampler, skipped


def _dump(record: Any) -> Any:
    """Records as dictionaries of tensors and plain values; readers and candidates are made anew when they are read."""
    if isinstance(record, (LayerStatistics, LayerInput, TiedUse, Moment, Curve, Prediction, Probe)):
        fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
        return {name: _dump(value) for name, value in fields.items() if name not in LINKS}
    if isinstance(record, list):
        return [_dump(item) for item in record]
    return dict(record) if isinstance(record, Mapping) else record


def _fill(record: Any, stored: Mapping[str, Any]) -> None:
    for name, value in stored.items():
        own = getattr(record, name)
        if isinstance(own, (Moment, TiedUse)):
            _fill(own, value)
        elif name == "observed":
            record.observed = None if value is None else LayerInput(**value)
        else:
            setattr(record, name, value)


def _curve(stored: Mapping[str, Any]) -> Curve:
    tensors = {name: value.cpu() for name, value in stored.items() if isinstance(value, Tensor)}
    prediction = Prediction(**{name: value.cpu() for name, value in stored["prediction"].items()})
    probes = [Probe(**probe) for probe in stored["probes"]]
    return Curve(**{**stored, **tensors, "prediction": prediction, "probes": probes})
