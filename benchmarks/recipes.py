"""Everything that is claimed about the recipes: dense against lossless, compact and a frontier, beside two baselines.

``python -m benchmarks.recipes NAME`` runs one recipe through the Hydra app, ``train.py``: it trains once per seed, then
compresses what was trained with every objective, and with plain and activation-whitened SVD at the sizes of ours. The
objectives of a seed share one calibration, whose time counts for each of them. It goes on where an earlier run stopped.
Rows are in ``recipe_rows/NAME.csv``; tables and picture in ``RESULTS.md``.

Loss, score and verdict are those of the verification split, which decides nothing; the test split is only reported.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

import train as application
from benchmarks.quality import METHODS
from benchmarks.recipe_figures import BUDGETS
from benchmarks.recipe_report import write_report
from benchmarks.results import append_row, read_rows
from lrf_lightning import CompressionResult
from lrf_lightning.fingerprint import fingerprint
from lrf_lightning.reports.summary import PREFIX, summary
from lrf_lightning.solver.layers.latency import device_name

FOLDER = Path(__file__).parent
CONF = FOLDER.parent / "conf"
BASELINES = ("plain SVD", "activation-whitened SVD")
OURS = ("lossless", "compact", "frontier")
CALIBRATION = ("statistics", "factorization", "curves", "perturbation range")  # stages
QUIET = ("logger=none", "+trainer.enable_progress_bar=false", "hydra.mode=RUN")
# figures of lrf_lightning.reports.summary that are kept
FIGURES = (
    "params_model_before", "params_model_after", "params_layers_before", "params_layers_after",
    "params_factorized_before", "params_factorized_after", "flops_layers_before", "flops_layers_after",
    "flops_model_before", "flops_model_after", "loss_dense", "loss_dense_scaled", "loss_compressed_scaled",
    "loss_change", "loss_change_lower", "loss_change_upper", "loss_margin", "score_dense", "score_change",
    "score_change_lower", "score_change_upper", "score_margin", "latency_dense/eager_batch_1",
    "latency_compressed/eager_batch_1", "latency_dense/eager_batch_large", "latency_compressed/eager_batch_large",
    "speedup/eager_batch_1", "speedup/eager_batch_1_lower", "speedup/eager_batch_1_upper", "speedup/eager_batch_large",
    "speedup/eager_batch_large_lower", "speedup/eager_batch_large_upper", "samples_calibration", "samples_selection",
    "samples_verification", "solve_seconds",
)  # fmt: skip
FIELDS = (
    "recipe", "overrides", "seed", "method", "keep", "verdict", "score_name", *FIGURES, "test_loss_dense", "test_loss",
    "test_score_name", "test_score_dense", "test_score", "processor_seconds", "training_seconds",
    "training_processor_seconds", "load", "date", "machine",
)  # fmt: skip
Row = dict[str, Any]


def main() -> None:
    """Measure what is missing of some recipes, then write tables and picture."""
    known = sorted(path.stem for path in (CONF / "recipe").glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", metavar="NAME", choices=known, help=", ".join(known))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS, help="shares of the factorizable layers")
    parser.add_argument("--methods", nargs="+", default=[*OURS, *BASELINES], choices=[*OURS, *BASELINES])
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="overrides for Hydra")
    parser.add_argument("--as", dest="name", metavar="NAME", help="of the rows of one recipe with --set")
    parser.add_argument("--cache", type=Path, default=FOLDER / ".cache" / "recipes", help="folder of trained models")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where recipe_rows/ and RESULTS.md are")
    options = parser.parse_args()
    if options.name and len(options.recipes) > 1:
        parser.error(f"--as={options.name} names the rows of one recipe, not of {options.recipes}")
    for recipe in options.recipes:
        name = options.name or recipe
        path = options.out / "recipe_rows" / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        for seed in options.seeds:
            run = Run(recipe, seed, tuple(options.set), tuple(options.budgets), options.cache)
            for method in sorted(options.methods, key=[*OURS, *BASELINES].index):
                done = read_rows(path)
                if any(row["seed"] == str(seed) and row["method"] == method for row in done):
                    continue
                for row in run.rows(method, [row for row in done if row["seed"] == str(seed)]):
                    row |= {"overrides": " ".join(options.set)}
                    append_row(path, FIELDS, {field: row.get(field, "") for field in FIELDS})
        write_report(name, options.out)


class Run:
    """One recipe with one seed.

    Args:
        recipe: name of a file in ``conf/recipe``.
        seed: of everything.
        overrides: for Hydra.
        budgets: shares of the factorizable layers' parameters.
        cache: folder of trained models.
    """

    def __init__(
        self, recipe: str, seed: int, overrides: Sequence[str], budgets: tuple[float, ...], cache: Path
    ) -> None:
        self.recipe, self.seed, self.budgets, self.cache = recipe, seed, budgets, cache
        self._calibrations = TemporaryDirectory()
        self._calibration_seconds = 0.0
        self.overrides = [f"recipe={recipe}", f"seed={seed}", *QUIET, *overrides]
        # a training without compression has no such settings
        self.of_training = [override for override in self.overrides if not override.startswith("callbacks.compress.")]

    def rows(self, method: str, done: Sequence[dict[str, str]]) -> list[Row]:
        """Measure one method.

        Args:
            method: one of ours, or a baseline.
            done: the rows of this seed so far; baselines are measured at their sizes too.
        """
        trained, training = self._trained()
        started, before = time.process_time(), date.today()
        with (
            TemporaryDirectory() as folder,
            _composed(folder, *self.overrides, *trained, *self._asked(method, done)) as cfg,
        ):
            metrics, objects = application.train(cfg)
            result = self._with_calibration(objects["result"])
            shared = training | {
                "recipe": self.recipe,
                "seed": self.seed,
                "method": method,
                "processor_seconds": f"{time.process_time() - started:.1f}",
                "load": f"{os.getloadavg()[1]:.1f}" if hasattr(os, "getloadavg") else "",
                "date": before,
                "machine": device_name(objects["trainer"].strategy.root_device),
            }
            if method in OURS and method != "frontier":
                return [shared | _figures(result) | _tested(metrics)]
            rows = []
            for point in result.frontier:
                model = result if point.chosen else result.at(point.keep)
                row = shared | _figures(model) | {"keep": f"{point.budget:.6g}"}
                # the test split takes long; of the baselines the sizes of lossless and compact are those that matter
                tested = cfg.test and (method in OURS or point.budget not in self.budgets)
                rows.append(row | (self._point_tested(metrics, objects, model) if tested else {}))
            return rows

    def _asked(self, method: str, done: Sequence[dict[str, str]]) -> list[str]:
        """The overrides that make one method of the callback."""
        if method in OURS:
            budgets, settings = self.budgets, {}
        else:
            sizes = {_kept(row) for row in done if row["method"] in ("lossless", "compact")}
            budgets, settings = (*self.budgets, *sorted(sizes - {1.0})), METHODS[method]
        asked = {"save": False, "objective": method if method in OURS else "frontier", **settings}
        asked |= {"budgets": f"[{','.join(f'{budget:.6g}' for budget in budgets)}]"} if budgets else {}
        asked |= {"speed": "none"} if method in BASELINES else {"cache_dir": self._calibrations.name}
        return [
            f"+compress={asked['objective']}",
            *(f"callbacks.compress.{name}={value}" for name, value in asked.items()),
        ]

    def _with_calibration(self, result: CompressionResult) -> CompressionResult:
        """The result as if its solve had calibrated, instead of reading what an earlier one of this seed found."""
        seconds = dict(result.seconds)
        reading = seconds.pop("calibration from the cache", None)
        if reading is None:
            self._calibration_seconds = sum(seconds.get(stage, 0.0) for stage in CALIBRATION)
            return result
        seconds["total"] += self._calibration_seconds - reading
        return replace(result, seconds=seconds)

    def _trained(self) -> tuple[list[str], Row]:
        """Overrides that load what was trained, and the seconds that it took; a recipe without training has none."""
        with TemporaryDirectory() as folder, _composed(folder, *self.of_training, "test=false") as cfg:
            if not cfg.train:
                return [], {}
            settings = fingerprint(application._training_settings(cfg))
            path = (self.cache / f"{self.recipe}-{self.seed}-{settings}.ckpt").absolute()
            seconds = path.with_suffix(".json")
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                wall, processor = time.perf_counter(), time.process_time()
                _, objects = application.train(cfg)
                took = {
                    "training_seconds": round(time.perf_counter() - wall, 1),
                    "training_processor_seconds": round(time.process_time() - processor, 1),
                }
                seconds.write_text(json.dumps(took))
                part = path.with_suffix(".part")
                objects["trainer"].save_checkpoint(part)
                part.replace(path)
        return ["train=false", f"ckpt_path='{path}'"], json.loads(seconds.read_text()) if seconds.is_file() else {}

    @staticmethod
    def _point_tested(metrics: Row, objects: Row, result: CompressionResult) -> Row:
        found = objects["trainer"].test(result.model, datamodule=objects["datamodule"], verbose=False)[0]
        return _tested(metrics | {f"{PREFIX}{name}": value for name, value in found.items()})


@contextmanager
def _composed(folder: str, *overrides: str) -> Iterator[DictConfig]:
    """The config of a job of ``train.py`` that writes into ``folder``."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("train.yaml", [f"hydra.runtime.output_dir='{folder}'", *overrides], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    try:
        yield OmegaConf.masked_copy(cfg, [name for name in cfg if name != "hydra"])
    finally:
        HydraConfig.instance().cfg = None


def _kept(row: dict[str, str]) -> float:
    return float(row["params_layers_after"]) / float(row["params_layers_before"])


def _figures(result: CompressionResult) -> Row:
    """The figures of one result."""
    known = summary(result)
    rounded = {name: known[PREFIX + name] for name in FIGURES if PREFIX + name in known}
    before, after = result.params_layers
    return {
        "keep": f"{after / before:.6g}" if before else "",
        "verdict": result.certificate.verdict,
        "score_name": result.score_name,
        **{name: int(value) if value.is_integer() else f"{value:.6g}" for name, value in rounded.items()},
    }


def _tested(metrics: Row) -> Row:
    """Loss and score of both models on the test split: what the recipe logs as ``test/loss``, and the first other."""
    names = [name.removeprefix("test/") for name in metrics if name.startswith("test/")]
    found: Row = {}
    for kind, name in (("loss", "loss"), ("score", next((name for name in names if name != "loss"), ""))):
        if name in names:
            dense, compressed = (float(metrics.get(f"{prefix}test/{name}", "nan")) for prefix in ("", PREFIX))
            found |= {f"test_{kind}_dense": f"{dense:.6g}", f"test_{kind}": f"{compressed:.6g}"}
            found |= {"test_score_name": name} if kind == "score" else {}
    return found


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    main()
