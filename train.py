"""Train a model, compress it, and report both on the test split: ``python train.py +compress=lossless``.

:func:`train` can be called with any composed config; :func:`main` is the entry point of Hydra.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate, to_absolute_path
from lightning import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lrf_lightning import CompressionResult, LowRankCompression
from lrf_lightning.best_checkpoint import best_checkpoint_path
from lrf_lightning.best_effort import best_effort
from lrf_lightning.solver.settings import check_flag
from lrf_lightning.sweeps.training_cache import fit_once, source_files
from lrf_lightning.wandb_logging.account import offline_without_account
from lrf_lightning.wandb_logging.group import grouped_by_sweep

# parts of the config that do not decide the training
AFTER_TRAINING = ("cache_dir", "compress_margins", "logger", "optimized_metric", "paths", "task_name", "test", "train")

FLAGS = ("train", "test", "pretrained", "trusted")
MARGINS = ("loss", "score")
LARGEST_SEED = 2**32 - 1  # of NumPy
WORDS_FOR_CHECKPOINTS = ("best", "last", "hpc", "registry")


def train(cfg: DictConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run everything that the config asks for.

    Args:
        cfg: ``conf/train.yaml`` as composed by Hydra.

    Returns:
        All metrics by name, and the objects that were built: ``cfg``, ``datamodule``, ``model``, ``trainer``, and
        ``result``, what the compression found (None without a compression).

    Raises:
        ValueError: if the config asks for something that cannot be.
    """
    _check(cfg)
    cfg = cfg.copy()
    cfg.ckpt_path = _from_the_start(cfg.ckpt_path)
    with _threads(cfg.threads):
        return _run(cfg)


def _run(cfg: DictConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    seed_everything(cfg.seed, workers=True)
    offline_without_account()
    datamodule: LightningDataModule = instantiate(cfg.data)
    model: LightningModule = instantiate(cfg.model)
    untested = _missing_for_test(model, datamodule)
    _check_objective(cfg, untested)
    callbacks = [instantiate(node) for node in (cfg.get("callbacks") or {}).values()]
    loggers = [instantiate(node) for node in (cfg.get("logger") or {}).values()]
    trainer: Trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers)
    for logger in trainer.loggers:
        logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]

    compression = next((item for item in callbacks if isinstance(item, LowRankCompression)), None)
    trained = _train(cfg, trainer, model, datamodule, compression)
    if not trained and compression is not None:
        compression.compress_now(trainer, model)
    metrics = dict(trainer.callback_metrics)
    result = None if compression is None else compression.result
    if cfg.test and untested:
        _say(f"Nothing is tested: {untested}; test=false says that this is meant")
    elif cfg.test:
        metrics |= _test(trainer, model, datamodule, compression)
    return metrics, {"cfg": cfg, "datamodule": datamodule, "model": model, "trainer": trainer, "result": result}


@hydra.main(version_base="1.3", config_path="conf", config_name="train.yaml")
def main(cfg: DictConfig) -> float | tuple[float, ...] | None:
    """Run one job and return what a sweeper optimises, ``cfg.optimized_metric``."""
    try:
        with grouped_by_sweep():
            metrics, _ = train(cfg)
    finally:
        _finish_wandb()
    _say(f"Everything that was written is in {cfg.paths.output_dir}")
    return _objective(metrics, cfg.optimized_metric)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Let torch use as many threads on the CPU; the next job of a multirun may be another recipe."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(
    cfg: DictConfig,
    trainer: Trainer,
    model: LightningModule,
    datamodule: LightningDataModule,
    compression: LowRankCompression | None,
) -> bool:
    """Train, or load what was trained; says whether there was a fit, at whose end the compression works by itself."""
    cache = _cache_folder(cfg)
    if compression is not None:
        own = compression.cache_dir
        compression.cache_dir = cache if own is None else Path(to_absolute_path(str(own)))
    if not cfg.train:
        # loads the checkpoint and tells the trainer its data
        trainer.validate(model, datamodule=datamodule, ckpt_path=_to_load(cfg), verbose=False)
        return False
    if cache is None:
        trainer.fit(model, datamodule=datamodule, ckpt_path=cfg.ckpt_path)
        return True
    settings = _training_settings(cfg)
    loaded = fit_once(
        trainer,
        model,
        datamodule,
        folder=cache,
        settings=settings,
        sources=[Path(__file__), *source_files(_targets(settings))],
        ckpt_path=cfg.ckpt_path,
    )
    if loaded:
        _say("Trained weights are taken from another job with the same training")
    return not loaded


def _cache_folder(cfg: DictConfig) -> Path | None:
    """Where trained weights and calibrations are shared: the folder of the sweep, if there is one."""
    if cfg.cache_dir != "sweep":
        return None if cfg.cache_dir is None else Path(to_absolute_path(cfg.cache_dir))
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return Path(to_absolute_path(HydraConfig.get().sweep.dir)) / "cache"


def _from_the_start(checkpoint: str | None) -> str | None:
    """The whole path of a file, seen from where the user has started, which hydra.job.chdir leaves.

    Words that Lightning knows, such as ``last``, and URLs stay.
    """
    if checkpoint is None or "://" in checkpoint or checkpoint.partition(":")[0] in WORDS_FOR_CHECKPOINTS:
        return checkpoint
    return to_absolute_path(os.path.expanduser(checkpoint))


def _training_settings(cfg: DictConfig) -> dict[str, Any]:
    """What decides the training: the config without what comes after it, and without the job's own folder."""
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    for name in AFTER_TRAINING:
        settings.pop(name, None)
    callbacks = settings.get("callbacks") or {}
    settings["callbacks"] = {name: node for name, node in callbacks.items() if name != "compress"}
    return _without(settings, str(cfg.paths.output_dir))


def _without(node: Any, folder: str) -> Any:
    if isinstance(node, dict):
        return {name: _without(value, folder) for name, value in node.items()}
    if isinstance(node, list):
        return [_without(value, folder) for value in node]
    return node.replace(folder, "OUTPUT") if isinstance(node, str) else node


def _targets(node: Any) -> list[str]:
    values = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    own = [node["_target_"]] if isinstance(node, dict) and "_target_" in node else []
    return own + [name for value in values for name in _targets(value)]


def _to_load(cfg: DictConfig) -> str | None:
    """The checkpoint that is loaded into the model, None if a recipe has done that."""
    return None if cfg.pretrained else cfg.ckpt_path


def _check(cfg: DictConfig) -> None:
    """Find what would only be noticed after the training."""
    if isinstance(cfg.get("compress"), str):
        raise ValueError(
            f"Hydra took compress={cfg.compress} for a plain value, because it did not find the config group compress: "
            "the model would not be compressed. Install the package into this environment (pip install -e .), and look "
            "for the provider lrf_lightning in the output of: python train.py --info searchpath"
        )
    missing = " ".join(f"{name}=VALUE" for name in sorted(cfg) if OmegaConf.is_missing(cfg, name))
    if missing:
        raise ValueError(f"{missing} is missing; what it means is said in conf/recipe/{cfg.task_name}.yaml")
    for name in FLAGS:
        check_flag(name, cfg.get(name, False))
    if cfg.threads is not None and not _is_whole(cfg.threads, 1):
        raise ValueError(f"threads={cfg.threads!r} is no number of threads; give 1 or more, or null")
    if not _is_whole(cfg.seed, 0, LARGEST_SEED):
        raise ValueError(f"seed={cfg.seed!r} is no seed; give a whole number from 0 to {LARGEST_SEED}")
    for name in ("cache_dir", "ckpt_path"):
        if not isinstance(cfg[name], (str, type(None))):
            raise ValueError(f"{name}={cfg[name]!r} is no path; give a path, such as ./{cfg[name]}, or null")
    _check_margins(cfg.get("compress_margins"))
    if not cfg.train and not cfg.pretrained and cfg.ckpt_path is None:
        raise ValueError("train=false needs a trained model; add ckpt_path=PATH of a checkpoint")


def _check_margins(margins: Any) -> None:
    """Find names that none of the callback's margins is taken from."""
    if not isinstance(margins, (DictConfig, type(None))):
        raise ValueError(f"compress_margins={margins!r} holds no names; give {{loss: ..., score: ...}}")
    for name in margins or ():
        if name not in MARGINS:
            near = get_close_matches(str(name), MARGINS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"compress_margins.{name} is unknown, allowed are {', '.join(MARGINS)}{hint}")


def _is_whole(value: Any, least: int, most: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _check_objective(cfg: DictConfig, untested: str) -> None:
    """Find that a sweeper's figure would come from a test that there is not."""
    names = [cfg.optimized_metric] if isinstance(cfg.optimized_metric, str) else cfg.optimized_metric or []
    for name in names:
        if "test" in name.split("/") and (untested or not cfg.test):
            raise ValueError(f"optimized_metric={name} is a figure of the test, but {untested or 'test=false'}")


def _missing_for_test(model: LightningModule, datamodule: LightningDataModule) -> str:
    """What the user's own code lacks for a test, empty if nothing is."""
    if not is_overridden("test_step", model):
        return f"{type(model).__name__} has no test_step"
    if not is_overridden("test_dataloader", datamodule):
        return f"{type(datamodule).__name__} has no test_dataloader"
    return ""


def _test(
    trainer: Trainer, model: LightningModule, datamodule: LightningDataModule, compression: LowRankCompression | None
) -> dict[str, Any]:
    """Metrics of the dense model, and those of the compressed one under ``compress/``; both only reported."""
    rows: dict[str, tuple[int, Mapping[str, float]]] = {}
    metrics: dict[str, Any] = {}
    result = None if compression is None else compression.result
    if result is not None:
        loggers, trainer.loggers = trainer.loggers, []  # the loggers' test metrics stay those of the dense model
        try:
            found = _of_all_loaders(trainer.test(result.model, datamodule=datamodule, verbose=False))
        finally:
            trainer.loggers = loggers
        metrics |= {f"compress/{name}": torch.tensor(value) for name, value in found.items()}
        rows["compressed"] = result.params_model[1], found
    if compression is None or not compression.in_place:
        quick = bool(getattr(trainer, "fast_dev_run", False))  # which keeps no checkpoint
        best = compression is not None and compression.weights == "best" and not quick
        # Lightning's own "best" is that of the first checkpoint callback, whether it watches a metric or not
        path = (best_checkpoint_path(trainer) or "best") if best else None
        found = _of_all_loaders(trainer.test(model, datamodule=datamodule, ckpt_path=path, verbose=False))
        metrics |= {name: torch.tensor(value) for name, value in found.items()}
        rows["dense"] = sum(parameter.numel() for parameter in model.parameters()), found
    for logger in trainer.loggers:
        logger.log_metrics({name: float(value) for name, value in metrics.items() if name.startswith("compress/")})
    _print_test(rows, result)
    return metrics


def _of_all_loaders(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Figures of all test loaders, whose names tell them apart; none if no batch was tested."""
    return {name: value for figures in found for name, value in figures.items()}


@rank_zero_only
def _print_test(rows: dict[str, tuple[int, Mapping[str, float]]], result: CompressionResult | None) -> None:
    names = sorted({name for _, found in rows.values() for name in found})
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("model", "parameters", *names):
        table.add_column(Text(heading), justify="left" if heading == "model" else "right")  # brackets are no markup
    for model, (parameters, found) in sorted(rows.items(), reverse=True):
        table.add_row(model, f"{parameters:,}", *(f"{found[name]:.4f}" if name in found else "" for name in names))
    _say("Test split: only reported, it took no part in any decision")
    Console().print(table)
    if result is not None:
        before, after = result.params_model
        _say(f"Whole model: {before:,} -> {after:,} parameters ({after / before - 1:+.1%})")


@rank_zero_only
def _say(line: str) -> None:
    Console(highlight=False, markup=False, soft_wrap=True).print(line)


def _objective(metrics: Mapping[str, Any], names: str | Sequence[str] | None) -> float | tuple[float, ...] | None:
    """The value that a sweeper optimises, several of them for several names.

    Raises:
        ValueError: if there is no metric of that name.
    """
    if names is None:
        return None
    if not isinstance(names, str):
        return tuple(float(_objective(metrics, name)) for name in names)  # type: ignore[arg-type]
    if names not in metrics:
        raise ValueError(f"optimized_metric={names!r} is no metric of this run; there are {', '.join(sorted(metrics))}")
    return float(metrics[names])


def _finish_wandb() -> None:
    """Close the run, so that the next job of a multirun opens its own."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        best_effort("close the run of W&B", wandb.finish)


def _let_help_be_lazy() -> None:
    """Let Hydra 1.3 start on Python 3.14, whose argparse looks into every help, also into the one that is no string."""
    check = getattr(argparse.ArgumentParser, "_check_help", None)
    if check is not None:
        argparse.ArgumentParser._check_help = (  # type: ignore[attr-defined]
            lambda parser, action: check(parser, action) if isinstance(action.help, str) else None
        )


_let_help_be_lazy()

if __name__ == "__main__":
    main()
