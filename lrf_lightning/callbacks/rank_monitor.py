"""The callback that watches, while a model is trained, how compressible it is becoming."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Mapping
from functools import partial
from io import BytesIO
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

from lrf_lightning import safe_files
from lrf_lightning.best_effort import best_effort
from lrf_lightning.callbacks.checks import SHARDED
from lrf_lightning.callbacks.clock import Clock
from lrf_lightning.callbacks.compression import LowRankCompression
from lrf_lightning.callbacks.isolation import detached_copy, undisturbed
from lrf_lightning.data.device_batches import DeviceBatches
from lrf_lightning.data.loaders import resolve_loaders
from lrf_lightning.run_folder import run_folder
from lrf_lightning.solver.devices import solver_device
from lrf_lightning.solver.factors.factorization import decomposition_cost
from lrf_lightning.solver.layers.spectra import Spectrum, spectrum
from lrf_lightning.solver.predictions.forecast import Forecast, forecast
from lrf_lightning.solver.running.batch_contents import batch_size
from lrf_lightning.solver.settings import check_flag, checked_patterns
from lrf_lightning.steps.step_loss import StepLoss
from lrf_lightning.surgery import find_layers
from lrf_lightning.wandb_logging.fork import finish_before_exit

__all__ = ["RankMonitor"]

logger = logging.getLogger(__name__)

# what is done, with its part of the time: whatever is slow shall not keep the rest from being done
PARTS = {"measure ranks": 0.3, "predict": 0.5, "draw": 0.2}
GRACE = 5.0  # seconds that a training may be prolonged at its end
OPERATIONS = 3e10  # multiply-adds per second of a decomposition, on a modest processor


class RankMonitor(Callback):
    """Log every few epochs how low the ranks of the layers are, and what a compression would keep.

    Every logger gets, per factorizable layer and under keys that stay the same:

    ==============================  ====================================================================================
    ``rank_effective/<layer>``      effective, ``rank_stable/<layer>`` stable and ``rank_numerical/<layer>`` numerical
                                    rank of the weight, see :mod:`lrf_lightning.solver.layers.spectra`
    ``rank_energy/<layer>``         share of the squared weights within the largest rank that saves parameters
    ``rank_params/<layer>``         weight entries that a ``compact`` solve is predicted to keep
    ``rank/params_model``           parameters that it is predicted to keep of the whole model, and
                                    ``rank/params_model_kept``, their share; see
                                    :mod:`lrf_lightning.solver.predictions.forecast`
    ``rank/seconds``                time that the callback has taken so far; ``rank/time_share`` is its share of the
                                    time that the training has taken without it
    ==============================  ====================================================================================

    The singular values over the epochs are drawn into ``ranks/spectra.png`` in the run's own folder, and for W&B under
    ``rank/pictures/spectra``. All figures are also in ``trainer.callback_metrics`` of the first process.

    Whatever would exceed ``max_share`` of the training time is left out this time: 30 % of that are for ranks, 50 % for
    predictions and 20 % for pictures. When the training ends, the picture is drawn, and what was never made is made if
    it takes a few seconds. Nothing that fails here fails the training. With DDP the first process measures and logs.

    A :class:`~lrf_lightning.LowRankCompression` in the same trainer lends its loss, data and settings to the
    prediction, which needs calibration data and is otherwise left out. The verification data is not looked at.

    Args:
        every_n_epochs: epochs between two measurements.
        max_share: largest share of the training time that they may take, in (0, 1].
        predict: whether the parameters that a ``compact`` solve would keep are predicted.
        samples: calibration samples for that, rounded up to whole batches.
        picture: whether the singular values are drawn.
        include: shell patterns on module names; empty means all.
        exclude: shell patterns on module names that are left alone.

    Attributes:
        history: the measured spectra by epoch and layer, on the first process.

    Raises:
        MisconfigurationException: if an argument is not allowed.
    """

    def __init__(
        self,
        *,
        every_n_epochs: int = 1,
        max_share: float = 0.02,
        predict: bool = True,
        samples: int = 128,
        picture: bool = True,
        include: tuple[str, ...] = (),
        exclude: tuple[str, ...] = (),
    ) -> None:
        for name, count in (("every_n_epochs", every_n_epochs), ("samples", samples)):
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise MisconfigurationException(f"RankMonitor: {name}={count!r} must be a whole number of at least 1")
        if isinstance(max_share, bool) or not isinstance(max_share, (int, float)) or not 0 < max_share <= 1:
            raise MisconfigurationException(f"RankMonitor: max_share={max_share!r} must lie in (0, 1]")
        self.every_n_epochs, self.max_share, self.samples = every_n_epochs, max_share, samples
        try:
            for name, flag in (("predict", predict), ("picture", picture)):
                check_flag(name, flag)
            self.include, self.exclude = checked_patterns("include", include), checked_patterns("exclude", exclude)
        except ValueError as error:
            raise MisconfigurationException(f"RankMonitor: {error}") from error
        self.predict, self.picture = predict, picture
        self.history: dict[int, dict[str, Spectrum]] = {}
        self._clock = Clock({})
        self._folder = ""
        self._batches: list[Any] | None = None
        self._loss: StepLoss | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the patterns.

        Raises:
            MisconfigurationException: if a pattern matches no module.
        """
        finish_before_exit(trainer)
        try:
            find_layers(pl_module, include=self.include, exclude=self.exclude)
        except ValueError as error:
            raise MisconfigurationException(f"RankMonitor: {error}") from error

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.history, self._batches, self._loss = {}, None, None
        shares = {what: part * self.max_share for what, part in PARTS.items()}
        self._clock = Clock(shares, _expected(pl_module, self.include, self.exclude))
        self._folder = safe_files.join(run_folder(trainer), "ranks")  # asks all processes
        if isinstance(trainer.strategy, SHARDED):
            self._clock.close(*PARTS)
            rank_zero_warn(
                f"RankMonitor measures nothing with {type(trainer.strategy).__name__}, whose weights are spread over "
                "devices"
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, predict, log and draw, as far as the time allows."""
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._measure(trainer, pl_module, self._clock.due(self._wanted))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make once what was never made, and draw the whole training."""
        missing = [what for what in self._wanted if what == "draw" or what not in self._clock.costs]
        self._measure(trainer, pl_module, self._clock.due(missing, grace=GRACE))
        self._batches = self._loss = None

    @property
    def _wanted(self) -> list[str]:
        return ["measure ranks", *(["predict"] if self.predict else []), *(["draw"] if self.picture else [])]

    def _measure(self, trainer: Trainer, pl_module: LightningModule, due: list[str]) -> None:
        due = trainer.strategy.broadcast(due)  # one process decides for all, since its clock differs from theirs
        if "measure ranks" in due and trainer.is_global_zero:
            self._clock.run("measure ranks", lambda: self._log(trainer, self._ranks(trainer, pl_module)))
        if "predict" in due:  # on all processes, since the module's steps may talk to each other
            self._clock.run("predict", lambda: self._log(trainer, self._prediction(trainer, pl_module)))
        if "draw" in due and trainer.is_global_zero and self.history and not getattr(trainer, "fast_dev_run", False):
            self._clock.run("draw", lambda: _draw(trainer, self.history, self._folder))

    def _log(self, trainer: Trainer, figures: dict[str, float]) -> None:
        if not trainer.is_global_zero:
            return
        figures |= {"rank/seconds": self._clock.spent, "rank/time_share": self._clock.share}
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in figures.items()})
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for sink in trainer.loggers:
            best_effort(f"log ranks to {type(sink).__name__}", partial(sink.log_metrics, dict(figures), step=step))

    def _ranks(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        candidates, _ = find_layers(pl_module, include=self.include, exclude=self.exclude)
        spectra = {candidate.name: spectrum(candidate) for candidate in candidates}
        self.history[_epochs(trainer)] = spectra
        figures: dict[str, float] = {}
        for kind in ("effective", "stable", "numerical"):
            figures |= {f"rank_{kind}/{name}": getattr(item, f"{kind}_rank") for name, item in spectra.items()}
        return figures | {f"rank_energy/{name}": item.energy for name, item in spectra.items()}

    def _prediction(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        compression = _compression(trainer)
        device = solver_device(trainer.strategy.root_device)
        with undisturbed(trainer):
            if self._batches is None:
                self._batches = self._read(trainer, pl_module, compression)
            self._loss = self._loss or StepLoss(trainer, loss=compression.loss)
            module, host = detached_copy(pl_module), detached_copy(pl_module).eval()
            found: Forecast = forecast(
                module.to(device),
                self._loss,
                DeviceBatches(self._batches, trainer, host.to(device), device),
                device,
                compression.settings,
            )
        before, after = found.params_model
        return {
            **{f"rank_params/{name}": float(count) for name, count in found.params.items()},
            "rank/params_model": float(after),
            "rank/params_model_kept": after / before,
        }

    def _read(self, trainer: Trainer, pl_module: LightningModule, compression: LowRankCompression) -> list[Any]:
        """The first calibration batches, which are kept in memory."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compression itself warns of loaders that overlap
            loaders = resolve_loaders(trainer, pl_module, **compression.loaders, seed=compression.settings.seed)
        batches = iter(loaders.calibration)
        kept = list(itertools.islice(batches, 1))
        while kept and sum(map(batch_size, kept)) < self.samples:
            more = next(batches, None)
            if more is None:
                break
            kept.append(more)
        return kept


def _epochs(trainer: Trainer) -> int:
    """Epochs that have begun, the one that is just ending included."""
    return int(trainer.fit_loop.epoch_progress.current.ready)


def _expected(module: LightningModule, include: tuple[str, ...], exclude: tuple[str, ...]) -> dict[str, float]:
    """Seconds that the work is taken for before it was done once."""
    candidates, _ = find_layers(module, include=include, exclude=exclude)
    ranks = sum(decomposition_cost(c.groups, c.rows, c.columns) for c in candidates) / OPERATIONS
    return {"measure ranks": ranks, "predict": 0.5 + 5 * ranks, "draw": 0.5}


def _compression(trainer: Trainer) -> LowRankCompression:
    """The compression of this trainer, or one with the usual settings."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    found = next((item for item in callbacks if isinstance(item, LowRankCompression)), None)
    return found or LowRankCompression(objective="compact")


def _draw(trainer: Trainer, history: Mapping[int, Mapping[str, Spectrum]], folder: str) -> None:
    from lrf_lightning.plots.spectra import spectra_over_time
    from lrf_lightning.plots.style import to_png

    picture = to_png(spectra_over_time(history))
    best_effort("write the picture of the ranks", lambda: _write(folder, picture))
    for sink in trainer.loggers:
        if isinstance(sink, WandbLogger):
            best_effort("log the picture of the ranks to W&B", partial(_log_picture, sink, picture, trainer))


def _write(folder: str, picture: bytes) -> None:
    safe_files.make_folder(folder)
    safe_files.write_bytes(safe_files.join(folder, "spectra.png"), picture)


def _log_picture(sink: WandbLogger, picture: bytes, trainer: Trainer) -> None:
    import wandb
    from PIL import Image

    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    image = wandb.Image(Image.open(BytesIO(picture)), caption="singular values over the epochs")
    sink.experiment.log({"rank/pictures/spectra": image, "trainer/global_step": step})
