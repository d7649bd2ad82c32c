"""The callback that compresses the trained model when a fit ends."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console
from torch import Tensor, nn

from lrf_lightning import safe_files
from lrf_lightning.api import compress
from lrf_lightning.callbacks import checks, fine_tuning
from lrf_lightning.callbacks.attempts import Attempts
from lrf_lightning.callbacks.best_weights import load_best_weights
from lrf_lightning.callbacks.isolation import detached_copy, undisturbed
from lrf_lightning.callbacks.leftovers import POINTS, remove_leftovers
from lrf_lightning.callbacks.tracking import log_solution
from lrf_lightning.copies.model_copy import copied_model
from lrf_lightning.copies.unsharded import whole_weights
from lrf_lightning.data.batches import dealt
from lrf_lightning.data.device_batches import DeviceBatches
from lrf_lightning.data.loaders import ROLES, check_loaders, resolve_loaders
from lrf_lightning.data.sample_images import find_images
from lrf_lightning.distributed import current_processes
from lrf_lightning.export.files import ExportedFile, ExportError, export_model
from lrf_lightning.export.sample_call import Sample, find_sample
from lrf_lightning.progress import stage_progress
from lrf_lightning.reports.report import print_report
from lrf_lightning.run_folder import run_folder
from lrf_lightning.saving.checkpoint import lightning_checkpoint, register_structure_hook, save_compressed
from lrf_lightning.solver.devices import solver_device
from lrf_lightning.solver.running.evaluation import Batches, LossFunction
from lrf_lightning.solver.running.seeded_batches import split_seed
from lrf_lightning.solver.settings import (
    BUDGETS,
    ConvOrder,
    Cost,
    GammaKind,
    Metric,
    Objective,
    PaperVariant,
    Prediction,
    Settings,
    SpeedRuntime,
    check_flag,
)
from lrf_lightning.steps.step_loss import Score, StepLoss
from lrf_lightning.wandb_logging.fork import finish_before_exit

if TYPE_CHECKING:
    from lrf_lightning.api import CompressionResult

__all__ = ["LowRankCompression"]

logger = logging.getLogger(__name__)

FLAGS = ("in_place", "save", "save_points", "log_artifact", "strict")  # arguments that are not the solver's
MOST_IMAGES = 64  # of samples on which the models disagree


class LowRankCompression(Callback):
    """Make the trained model smaller without making it worse, when ``Trainer.fit`` ends.

    The work is done in ``on_fit_end`` on a copy of the model: by then checkpoints are written and averaged weights are
    in place. The module, the trainer, the random states and torch's flags stay as they were. A failure is reported as
    a warning and as ``compress/failed`` among the trainer's metrics; it never costs the trained model.

    After training with DDP or FSDP2 all processes solve together, each on its share of the data, and end with the same
    model; the first one writes. What fails on one process fails on all. Of strategies that start their processes anew
    for a fit, ``ddp_spawn``, ``ddp_fork`` and ``ddp_notebook``, only the files come back.

    Example::

        compression = LowRankCompression()
        Trainer(callbacks=[compression]).fit(module, datamodule=datamodule)
        compression.result.model, compression.result.certificate

    Args:
        loss: ``loss(module, batch)``, a Tensor of shape (batch,) or () or a ``StepOutput``; None takes the loss from
            the module's own steps, see :mod:`lrf_lightning.steps.step_loss`.
        score: ``score(module, batch)`` of shape (batch,) or (), larger is better, or the name of a value that a step
            logs, such as ``"val/acc"``; None is the accuracy where the loss is a cross-entropy.
        calibration: loader for statistics, or the name of a method of the datamodule or the module that makes it; None
            takes the method ``calibration_dataloader``, or else a part of the validation data.
        selection: likewise, for the choice among candidates.
        verification: likewise, for the verdict.
        dirpath: folder for the compressed model, figures and tables, or the URL of one that fsspec understands; None
            is ``compressed`` in the run's own folder of the first logger.
        weights: ``last``, the weights at the end of the fit, or ``best``, those of the best checkpoint by the first
            ``ModelCheckpoint`` that has a ``monitor``.
        in_place: whether the layers of the live module are replaced as well.
        save: whether the compressed model is written, as a folder for ``load_compressed`` and as a checkpoint for
            ``Trainer.test(ckpt_path=...)``.
        save_points: whether the models of all budgets of ``objective="frontier"`` are written too, each into a folder
            of its own.
        export: formats in which the compressed model is also written, of ``onnx`` (the extra ``export``) and ``pt2``
            (``torch.export``); it is called with the module's ``example_input_array``, or else with the inputs of a
            batch. See :mod:`lrf_lightning.export.files`.
        log_artifact: whether the compressed model is also handed to a W&B logger as an artifact.
        cache_dir: folder of calibrations that the jobs of a sweep share; None for none.
        strict: whether a failure is raised instead of reported.
        objective: see :class:`~lrf_lightning.solver.settings.Settings`, as for all arguments that follow.
        metric: metric of the factorization.
        keep: share of the factorizable layers' cost that ``objective="budget"`` keeps, in (0, 1].
        budgets: shares of that cost that ``objective="frontier"`` measures, each in (0, 1].
        cost: what is counted, ``params``, ``flops`` or ``latency``, the time measured on the device at hand.
        tolerance: increase of the selection loss that is accepted beyond its noise.
        score_tolerance: fall of the selection score that is accepted beyond its noise.
        ties: paired standard errors within which differences on the selection split count as ties.
        loss_margin: increase of the loss that counts as not worse; None is the larger of 2 % and 0.005.
        score_margin: fall of the score that counts as not worse.
        confidence: one-sided confidence of the verdict, in (0.5, 1).
        speed: how both models are timed for the report, ``none``, ``eager`` or ``compile``.
        points: number of shares of the cost that ``compact`` and ``lossless`` measure.
        refinements: bisection steps between them.
        prediction: what the allocation trusts, the change of the ``loss`` or the lost ``energy`` of the weights.
        probes: whether the perturbation range is found by measuring a few truncations.
        compensation: whether factors are fitted to the inputs that they will really see.
        conv_order: order of a convolution's factors, ``kernel_first``, ``pointwise_first``, ``spatial_split``, or
            ``best``: whichever leaves the smallest error, for every layer.
        batch_norm: whether statistics of batch norms are estimated anew where the selection split shows that it helps.
        damping: relative damping of second moments.
        first_order_errors: standard errors by which first-order terms are shrunk. Ranks with and without the gains that
            are left are both measured.
        range_factor: largest ratio of measured to predicted change inside the perturbation range.
        rows_per_feature: sampled input rows per input dimension of a layer.
        rank_multiple: ranks are rounded to a multiple of this; None is 8 on CUDA and with ``cost="latency"``, and 1
            elsewhere.
        memory_gib: GiB that statistics may take on every process, half-finished passes again, and copies again.
        include: shell patterns on module names; empty means all.
        exclude: shell patterns on module names that are left alone.
        types: shell patterns on class names of layers; empty means all that are supported.
        exclude_types: shell patterns on class names of layers that are left alone.
        predicate: ``predicate(name, module)``; layers for which it is false are left alone.
        frozen: whether layers whose weight does not require a gradient are factorized too.
        min_params: layers with fewer weight entries are left alone.
        variant: which published algorithm ``objective="paper"`` runs.
        gamma: largest error of a layer's weight in ``objective="paper"``.
        gamma_kind: what ``gamma`` bounds, the ``relative`` squared error or the ``mean_square`` elementwise error.
        seed: seed of everything that is sampled, the split of the validation data included.

    Attributes:
        settings: the checked settings of the solver.
        result: the :class:`~lrf_lightning.api.CompressionResult` of the last fit, None before it and after a failure.

    Raises:
        MisconfigurationException: if an argument is not allowed.
    """

    def __init__(
        self,
        *,
        loss: LossFunction | None = None,
        score: Score | str | None = None,
        calibration: Batches | str | None = None,
        selection: Batches | str | None = None,
        verification: Batches | str | None = None,
        dirpath: str | PathLike[str] | None = None,
        weights: Literal["last", "best"] = "last",
        in_place: bool = False,
        save: bool = True,
        save_points: bool = True,
        export: tuple[str, ...] = (),
        log_artifact: bool = True,
        cache_dir: str | PathLike[str] | None = None,
        strict: bool = False,
        objective: Objective = "lossless",
        metric: Metric = "fisher",
        keep: float = 0.5,
        budgets: tuple[float, ...] = BUDGETS,
        cost: Cost = "params",
        tolerance: float = 0.0,
        score_tolerance: float = 0.0,
        ties: float = 1.0,
        loss_margin: float | None = None,
        score_margin: float = 0.005,
        confidence: float = 0.95,
        speed: SpeedRuntime = "eager",
        points: int = 8,
        refinements: int = 3,
        prediction: Prediction = "loss",
        probes: bool = True,
        compensation: bool = True,
        conv_order: ConvOrder = "best",
        batch_norm: bool = False,
        damping: float = 1e-2,
        first_order_errors: float = 2.0,
        range_factor: float = 3.0,
        rows_per_feature: int = 32,
        rank_multiple: int | None = None,
        memory_gib: float = 4.0,
        include: tuple[str, ...] = (),
        exclude: tuple[str, ...] = (),
        types: tuple[str, ...] = (),
        exclude_types: tuple[str, ...] = (),
        predicate: Callable[[str, nn.Module], bool] | None = None,
        frozen: bool = False,
        min_params: int = 0,
        variant: PaperVariant = "lossless",
        gamma: float = 0.1,
        gamma_kind: GammaKind = "relative",
        seed: int = 0,
    ) -> None:
        arguments = locals()
        try:
            self.settings = Settings(**{f.name: arguments[f.name] for f in dataclasses.fields(Settings)})
            for name in FLAGS:
                check_flag(name, arguments[name])
        except ValueError as error:
            raise MisconfigurationException(f"LowRankCompression: {error}") from error
        for ignored in self.settings.without_effect:
            rank_zero_warn(f"LowRankCompression: {ignored}")
        self.loaders: dict[str, Any] = {role: arguments[role] for role in ROLES}
        checks.check_arguments(
            loss=loss, score=score, weights=weights, dirpath=dirpath, cache_dir=cache_dir, loaders=self.loaders
        )
        self.loss, self.score, self.weights = loss, score, weights
        self.dirpath = None if dirpath is None else safe_files.path_or_url(dirpath)
        self.in_place, self.save, self.log_artifact, self.strict = in_place, save, log_artifact, strict
        self.save_points, self.export = save_points, checks.checked_formats(export)
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.result: CompressionResult | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the module load compressed checkpoints, and before a fit check what can be checked.

        Raises:
            MisconfigurationException: if loaders, patterns, strategy, checkpoint callback or folder will not do.
        """
        register_structure_hook(pl_module)
        if stage != TrainerFn.FITTING:
            return
        self.result = None
        finish_before_exit(trainer)
        checks.check_processes(trainer, in_place=self.in_place)
        checks.check_layers(pl_module, self.settings)
        if self.weights == "best":
            checks.check_best_weights(trainer)
        if self.loss is None:
            checks.check_steps(pl_module)
        try:
            check_loaders(trainer, pl_module, **self.loaders)
        except ValueError as error:
            raise MisconfigurationException(f"LowRankCompression: {error}") from error
        directory = self._directory(trainer)  # asks all processes
        if self.save and trainer.is_global_zero and self._keeps_files(trainer):
            # loggers look whether their folder exists, so only a folder of ours is created ahead
            if isinstance(directory, Path):
                checks.check_folder(directory, create=self.dirpath is not None)
            callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
            others = [c for c in callbacks if isinstance(c, LowRankCompression) and c is not self and c.save]
            checks.check_single_writer(directory, [other._directory(trainer) for other in others])

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """In the sanity check, before hours of training, see whether the loss will be found."""
        if trainer.sanity_checking and batch_idx == dataloader_idx == 0 and self.loss is None:
            checks.check_loss(trainer, pl_module, batch, score=self.score, loaders=self.loaders)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse compressed checkpoints of a future version or with changed weights.

        Raises:
            CheckpointError: if the checkpoint is one, or its description is damaged.
        """
        from lrf_lightning.saving.lightning_checkpoint import check_loaded

        # a hook of the module may have changed the weights on purpose
        check_loaded(checkpoint, weights=not is_overridden("on_load_checkpoint", pl_module))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let a fit resume from what is saved after layers of the live module were replaced."""
        from lrf_lightning.saving.optimizer_state import drop_replaced_parameters

        if self.in_place and self.result is not None:
            drop_replaced_parameters(trainer, pl_module, checkpoint)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the optimizers what a compressed checkpoint kept of their state, and see that they train the factors.

        Raises:
            MisconfigurationException: if another callback averages weights of the module without its low-rank layers.
        """
        from lrf_lightning.saving.optimizer_state import restore_optimizer_states

        fine_tuning.check_averages(trainer, pl_module)
        fine_tuning.check_optimizers(trainer, pl_module)
        restore_optimizer_states(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compress a copy of the module, report, log and save; see the class."""
        bar = trainer.progress_bar_callback
        if isinstance(bar, RichProgressBar):
            bar.teardown(trainer, pl_module, stage="fit")  # it draws until then, and two cannot draw at a time
        try:
            self.result, images, sample = self._solve(trainer, pl_module)
        # Lightning ends the process on a KeyboardInterrupt, and with it a model that may not have been saved
        except (Exception, KeyboardInterrupt) as error:
            if self.strict:
                raise
            self._report_failure(trainer, error)
            return
        trainer.callback_metrics["compress/failed"] = torch.tensor(0.0)
        target = self._directory(trainer) if self._keeps_files(trainer) else None  # asks all processes
        attempts = Attempts(strict=self.strict)
        with ExitStack() as stack:
            directory = target if isinstance(target, Path) else _temporary_folder(trainer, attempts, stack)
            self._publish(trainer, pl_module, self.result, images, sample, directory, attempts)
            if isinstance(target, str) and trainer.is_global_zero:
                attempts.run(f"copy the files to {target}", lambda: safe_files.upload(directory, target))
        attempts.settle(current_processes(trainer.strategy.root_device))

    def compress_now(self, trainer: Trainer, pl_module: LightningModule) -> CompressionResult:
        """Compress a module that is trained already, without a fit.

        The trainer must know the data, as it does after ``trainer.validate(module, datamodule, ckpt_path=...)``, which
        also loads the weights. Unlike after a fit there is nothing to lose, so whatever fails is raised.

        Returns:
            The result, which is also the attribute ``result``.

        Raises:
            MisconfigurationException: as :meth:`setup` does.
            Exception: whatever the solver, the report, the writing or the logging raise.
        """
        self.setup(trainer, pl_module, TrainerFn.FITTING)
        strict, self.strict = self.strict, True
        try:
            self.on_fit_end(trainer, pl_module)
        finally:
            self.strict = strict
        assert self.result is not None  # whatever fails is raised
        return self.result

    def _solve(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> tuple[CompressionResult, dict[int, Tensor], Sample | None]:
        """The result, images of the verification samples on which the models disagree, and a sample for an export."""
        device = solver_device(trainer.strategy.root_device)
        bars = trainer.is_global_zero and trainer.progress_bar_callback is not None
        processes, seed = current_processes(device), self.settings.seed
        with undisturbed(trainer), stage_progress(enabled=bars) as progress:
            whole, failure = whole_weights(pl_module)  # asks all processes
            with processes.together("the preparation"):
                if failure is not None:
                    raise failure
                module = detached_copy(pl_module, whole)
                del whole
                if self.weights == "best":
                    load_best_weights(trainer, module)
                module.to(device)
                loaders = resolve_loaders(trainer, pl_module, **self.loaders, seed=seed)
                host = copied_model(module).eval()  # transfer hooks may use buffers and look at the training mode
            for note in loaders.notes:
                logger.info(note)
            shares = {role: dealt(getattr(loaders, role), processes) for role in ROLES}
            batches = [
                DeviceBatches(share, trainer, host, device, seed=split_seed(seed, role), processes=processes)
                for role, share in shares.items()
            ]
            loss = StepLoss(trainer, score=self.score, loss=self.loss)
            loss.agree(module, batches[0], processes)
            result = compress(
                module,
                loss,
                *batches,
                device=device,
                progress=progress,
                score_name=loss.score_name,
                cache_dir=self.cache_dir,
                **{f.name: getattr(self.settings, f.name) for f in dataclasses.fields(Settings)},
            )
            _move(result, pl_module.device)
            images = find_images(batches[-1], [change.sample for change in result.changes[:MOST_IMAGES]], processes)
            sample = find_sample(module, batches[0]) if self.export else None
        return result, images, sample

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Move the result to the CPU after a fit, as the trainer does with the module."""
        if stage == "fit" and self.result is not None:
            _move(self.result, torch.device("cpu"))

    def _replace_layers(self, pl_module: LightningModule, result: CompressionResult, device: torch.device) -> None:
        """Give the live module structure and weights of the result, wholly or not at all, on all processes or none.

        The hook that :meth:`setup` registered lets the structure follow the weights.
        """
        before = copy.deepcopy(pl_module.state_dict())
        try:
            with current_processes(device).together("replacing the layers"):
                pl_module.load_state_dict(result.model.state_dict())
        except BaseException:
            pl_module.load_state_dict(before)
            raise

    def _publish(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        result: CompressionResult,
        images: dict[int, Tensor],
        sample: Sample | None,
        directory: Path,
        attempts: Attempts,
    ) -> None:
        """Report, save and log, each on its own, so that one failure does not cost the others."""
        device = trainer.strategy.root_device
        if self.in_place:
            attempts.run(
                "replace the layers of the live module",
                lambda: self._replace_layers(pl_module, result, device),
                together=True,
            )
        if trainer.is_global_zero:
            attempts.run("print the report", lambda: print_report(result))
        if self.save and trainer.is_global_zero:
            attempts.run("remove the files of an earlier result", lambda: remove_leftovers(directory))
            attempts.run("write the compressed model", lambda: save_compressed(result, directory))
            if self.save_points and result.point_models is not None:
                attempts.run("write the models of all budgets", lambda: _save_points(result, directory / POINTS))
        if self.save:
            attempts.run(
                "write the Lightning checkpoint",
                lambda: lightning_checkpoint(trainer, pl_module, result, directory / "compressed.ckpt"),
                together=True,
            )
        exports: list[ExportedFile] = []
        for name in self.export if trainer.is_global_zero else ():
            attempts.run(f"export {name}", lambda: exports.append(_export(name, result, sample, directory)))  # noqa: B023 (called at once)
        attempts.run(
            "log the results",
            lambda: log_solution(
                trainer,
                result,
                directory,
                images=images,
                exports=exports,
                log_artifact=self.log_artifact and self.save,
                weights=self.weights,
            ),
        )

    def _report_failure(self, trainer: Trainer, error: BaseException) -> None:
        logger.error("Compression failed", exc_info=error)
        how = "was interrupted" if isinstance(error, KeyboardInterrupt) else f"failed ({type(error).__name__}: {error})"
        rank_zero_warn(f"LowRankCompression {how}; the trained model and its checkpoints are untouched")
        trainer.callback_metrics["compress/failed"] = torch.tensor(1.0)

    def _keeps_files(self, trainer: Trainer) -> bool:
        """Like Lightning's own callbacks, leave no files behind in ``fast_dev_run`` unless a folder is asked for."""
        return self.dirpath is not None or not getattr(trainer, "fast_dev_run", False)

    def _directory(self, trainer: Trainer) -> Path | str:
        """A URL is a string."""
        return self.dirpath or safe_files.path_or_url(safe_files.join(run_folder(trainer), "compressed"))


def _temporary_folder(trainer: Trainer, attempts: Attempts, stack: ExitStack) -> Path:
    """A folder that vanishes with the stack, on the process that writes; the others get a name alone."""
    made: list[str] = []
    if trainer.is_global_zero:
        attempts.run("create a temporary folder", lambda: made.append(stack.enter_context(TemporaryDirectory())))
    return Path(made[0]) if made else Path(gettempdir()) / "lrf_lightning"


def _export(name: str, result: CompressionResult, sample: Sample | None, directory: Path) -> ExportedFile:
    """Write the compressed model in a format and say how large the file is."""
    if sample is None:
        raise ExportError("there is no sample to call the model with; set example_input_array of the module")
    exported = export_model(name, result.model, sample, directory)
    Console(highlight=False, markup=False, soft_wrap=True).print(f"Exported {exported}")
    return exported


def _save_points(result: CompressionResult, directory: Path) -> None:
    """Write the model of every budget into a folder that is named after what is kept, in per cent."""
    for point in result.frontier:
        result.at(point.keep).save(directory / f"keep_{100 * (point.budget or point.keep):g}")


def _move(result: CompressionResult, device: torch.device) -> None:
    result.model.to(device)
    if result.point_models is not None:
        result.point_models.dense.to(device)
