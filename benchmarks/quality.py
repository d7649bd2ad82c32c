"""Loss and accuracy at equal size, side by side with the baselines, on Fashion-MNIST.

Every method sees the same 1,500 held-out calibration images, and nothing is fine-tuned. For a given size ranks are
chosen on the calibration images alone, by the published algorithms on 2,500 selection images too; the 10,000 test
images are only reported. ``python -m benchmarks.quality`` goes on where an earlier run stopped, and writes
``quality.csv``, its pictures and its part of ``RESULTS.md``. Networks and methods are measured side by side in
single-threaded processes.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import platform
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.fashion import batches, splits
from benchmarks.nets import NETS
from benchmarks.results import append_row, read_rows, write_section
from benchmarks.training import SCHEDULES, trained
from lrf_lightning import Settings, StepOutput
from lrf_lightning.solver.joint import calibrated, solve
from lrf_lightning.solver.points.frontier import Frontier
from lrf_lightning.solver.running.evaluation import Outcome, evaluate
from lrf_lightning.solver.verdict.certificate import certify

FOLDER = Path(__file__).parent
KEPT = (0.7, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1)
BASELINE: dict[str, Any] = {
    "prediction": "energy",
    "compensation": False,
    "probes": False,
    "conv_order": "kernel_first",  # as published
}
METHODS: dict[str, dict[str, Any]] = {
    "plain SVD": {"metric": "euclidean", **BASELINE},
    "activation-whitened SVD": {"metric": "activation", **BASELINE},
    "two-sided metric": {"metric": "fisher", **BASELINE},
    "joint": {},
}
PAPER = {f"paper, {variant}": {"objective": "paper", "variant": variant} for variant in ("lossless", "compact")}
# the overfitted network is also asked how far each of two methods gets with the verdict "not worse"
OVERFITTED, COMPARED = "resnet-overfitted", ("activation-whitened SVD", "joint")
FINE = tuple(round(0.65 - 0.05 * step, 2) for step in range(10))
COLOURS = ("#999999", "#E69F00", "#56B4E9", "#009E73")
FIELDS = [
    "net",
    "seed",
    "method",
    "keep",
    "params_model",
    "params_layers",
    "dense_loss",
    "dense_accuracy",
    "loss_change",
    "loss_error",
    "accuracy_change",
    "accuracy_error",
    "verdict",
    "seconds",
]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> StepOutput:
    """Cross-entropy and accuracy of every sample."""
    logits = model(batch[0])
    return StepOutput(F.cross_entropy(logits, batch[1], reduction="none"), (logits.argmax(1) == batch[1]).float())


def main() -> None:
    """Measure what is missing, then write tables and picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", nargs="+", default=list(SCHEDULES), choices=list(SCHEDULES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=[*METHODS, *PAPER], choices=[*METHODS, *PAPER])
    parser.add_argument("--jobs", type=int, default=2, help="single-threaded processes that work side by side")
    parser.add_argument("--csv", type=Path, default=FOLDER / "quality.csv")
    options = parser.parse_args()
    runs = [(net, seed) for seed in options.seeds for net in options.nets]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        tasks = [task for task in _missing(runs, read_rows(options.csv)) if task.method in options.methods]
        untrained = list(dict.fromkeys((task.net, task.seed) for task in tasks if not _weights(task).is_file()))
        for _ in as_completed([pool.submit(_train, *run) for run in untrained]):
            pass
        for done in as_completed([pool.submit(_measure, task) for task in tasks]):
            for row in done.result():
                append_row(options.csv, FIELDS, row)
                print(" ".join(f"{name}={row[name]}" for name in FIELDS), flush=True)
    rows = sorted(read_rows(options.csv), key=lambda row: (list(SCHEDULES).index(row["net"]), row["seed"]))
    _draw(rows, FOLDER / "quality.png")
    write_section(FOLDER / "RESULTS.md", "Quality", _report(rows))


@dataclass(frozen=True)
class Task:
    """One method on one network, at the shares that are missing; none for a method that finds its own size."""

    net: str
    seed: int
    method: str
    keeps: tuple[float, ...]


def _weights(task: Task) -> Path:
    return FOLDER / ".cache" / f"{task.net}-{task.seed}.pt"


def _missing(runs: list[tuple[str, int]], rows: list[dict[str, str]]) -> list[Task]:
    done = {(row["net"], row["seed"], row["method"], row["keep"]) for row in rows}
    tasks = []
    for net, seed in runs:
        for method in METHODS:
            wanted = sorted({*KEPT, *(FINE if net == OVERFITTED and method in COMPARED else ())}, reverse=True)
            keeps = tuple(keep for keep in wanted if (net, str(seed), method, f"{keep:g}") not in done)
            tasks += [Task(net, seed, method, keeps)] if keeps else []
        tasks += [Task(net, seed, method, ()) for method in PAPER if (net, str(seed), method, "") not in done]
    return tasks


def _train(net: str, seed: int) -> None:
    started = time.perf_counter()
    trained(net, seed, splits(seed)["train"], FOLDER / ".cache")
    print(f"trained {net} with seed {seed} in {time.perf_counter() - started:.0f} s", flush=True)


@dataclass(frozen=True)
class Subject:
    """A trained network, its data and its losses on the test images."""

    model: nn.Module
    parts: dict[str, Any]
    test: list[tuple[Tensor, Tensor]]
    dense: Outcome


@lru_cache(maxsize=1)  # the methods of one network follow each other
def _subject(net: str, seed: int) -> Subject:
    data = splits(seed)
    # grouped convolutions take half the time so
    model = trained(net, seed, data["train"], FOLDER / ".cache").to(memory_format=torch.channels_last)

    def split(name: str) -> list[tuple[Tensor, Tensor]]:
        return [(images.to(memory_format=torch.channels_last), labels) for images, labels in batches(data[name])]

    parts, test = {name: split(name) for name in ("calibration", "selection", "verification")}, split("test")
    return Subject(model, parts, test, evaluate(model, loss, test, torch.device("cpu")))


def _measure(task: Task) -> list[dict[str, Any]]:
    started = time.process_time()
    subject = _subject(task.net, task.seed)
    rows: list[dict[str, Any]] = []
    for keep, compressed, params in _solved(subject.model, subject.parts, task):
        row = {"net": task.net, "seed": task.seed, "method": task.method, "keep": keep}
        row |= params | _changes(subject.dense, evaluate(compressed, loss, subject.test, torch.device("cpu")))
        rows.append(row)
    seconds = f"{(time.process_time() - started) / len(rows):.1f}"  # the budgets of one method share their passes
    return [row | {"seconds": seconds} for row in rows]


def _solved(model: nn.Module, parts: dict[str, Any], task: Task) -> Iterator[tuple[str, nn.Module, dict[str, int]]]:
    """Every missing model; the budgets of one method share their calibration."""
    if task.method in PAPER:
        result = solve(model, loss, **parts, settings=Settings(**PAPER[task.method]))
        yield "", result.model, {"params_model": result.params_model[1], "params_layers": result.params_layers[1]}
        return
    # the size is given, so that the selection images decide no more than whether predicted gains are believed
    parts = parts | {"selection": parts["selection"][:1]}
    work, dense = calibrated(model, loss, parts, settings=Settings(objective="budget", **METHODS[task.method]))
    models: dict[int, nn.Module] = {}
    points = Frontier(work, dense).measure_shares(
        task.keeps, lambda point, compressed: models.update({id(point): compressed})
    )
    for keep, point in zip(task.keeps, points, strict=True):
        params = {"params_model": point.params_model, "params_layers": point.params_layers}
        yield f"{keep:g}", models[id(point)], params


def _changes(dense: Outcome, compressed: Outcome) -> dict[str, str]:
    before = dense.measurement()
    assert dense.scores is not None
    assert compressed.scores is not None
    found = {"dense_loss": f"{before.loss:.5f}", "dense_accuracy": f"{before.score:.4f}"}
    for name, change in (("loss", compressed.losses - dense.losses), ("accuracy", compressed.scores - dense.scores)):
        found[f"{name}_change"] = f"{float(change.mean()):+.5f}"
        found[f"{name}_error"] = f"{float(change.std()) / math.sqrt(len(change)):.5f}"
    found["verdict"] = certify(dense, compressed, Settings()).verdict
    return found


Key = tuple[str, str, str]


def _grouped(rows: list[dict[str, str]]) -> dict[Key, list[dict[str, str]]]:
    grouped: dict[Key, list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        grouped[row["net"], row["method"], row["keep"]].append(row)
    return grouped


def _mean(rows: list[dict[str, str]], field: str) -> float:
    return sum(float(row[field]) for row in rows) / len(rows)


def _draw(rows: list[dict[str, str]], path: Path) -> None:
    """Increase of the test loss and fall of the accuracy against the share of parameters kept."""
    nets = list(dict.fromkeys(row["net"] for row in rows))
    grouped = _grouped(rows)
    figure = Figure(figsize=(4.2 * len(nets), 7), layout="constrained")
    axes = figure.subplots(2, len(nets), squeeze=False, sharex=True)
    for column, net in enumerate(nets):
        for line, (field, label) in enumerate(
            (("loss_change", "change of the test loss, nats"), ("accuracy_change", "change of the accuracy, points"))
        ):
            ax, factor = axes[line][column], 100 if "accuracy" in field else 1
            for method, colour in zip(METHODS, COLOURS, strict=True):
                points = [(keep, grouped.get((net, method, f"{keep:g}"))) for keep in KEPT]
                known = [(keep, found) for keep, found in points if found]
                ax.errorbar(
                    [keep for keep, _ in known],
                    [factor * _mean(found, field) for _, found in known],
                    [factor * _mean(found, field.replace("change", "error")) for _, found in known],
                    marker="o",
                    markersize=4,
                    capsize=2,
                    color=colour,
                    label=method,
                )
            ax.axhline(0, color="black", linewidth=0.6)
            ax.set_yscale("symlog", linthresh=0.01 * factor)
            ax.grid(alpha=0.3)
            if column == 0:
                ax.set_ylabel(label)
        axes[0][column].set_title(net)
        axes[1][column].set_xlabel("share of the factorizable parameters kept")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def _report(rows: list[dict[str, str]]) -> str:
    grouped, lines = _grouped(rows), []
    for net in dict.fromkeys(row["net"] for row in rows):
        ours = [row for row in rows if row["net"] == net]
        seeds = sorted({row["seed"] for row in ours})
        lines += [
            f"### {net}",
            "",
            f"Seeds {', '.join(seeds)}; dense test loss {_mean(ours, 'dense_loss'):.4f}, accuracy "
            f"{100 * _mean(ours, 'dense_accuracy'):.2f} %. Change of the test loss / of the accuracy in points, means "
            "over the seeds with the mean paired standard error of one seed; the last column is the joint solver's "
            "increase of the loss over that of activation-whitened SVD.",
            "",
            f"| kept | parameters of the model | {' | '.join(METHODS)} | ratio |",
            "|---" * (len(METHODS) + 3) + "|",
        ]
        for keep in KEPT:
            cells = [grouped.get((net, method, f"{keep:g}")) for method in METHODS]
            if not all(cells):
                continue
            known = [cell for cell in cells if cell]
            base, joint = _mean(known[1], "loss_change"), _mean(known[3], "loss_change")
            ratio = f"{joint / base:.2f}" if base > 0 else "-"
            shown = " | ".join(map(_cell, known))
            lines.append(f"| {keep:g} | {_mean(known[3], 'params_model'):,.0f} | {shown} | {ratio} |")
        lines.append("")
        for method in PAPER:
            found = grouped.get((net, method, ""))
            if found:
                lines.append(
                    f"- {method}: {_mean(found, 'params_model'):,.0f} parameters of the model, "
                    f"{_mean(found, 'params_layers'):,.0f} of the factorizable layers, {_cell(found)}"
                )
        lines += ["", *(_farthest(ours) if net == OVERFITTED else [])]
    minutes = sum(float(row["seconds"]) for row in rows) / 60
    head = (
        f"`python -m benchmarks.quality`, {date.today()}, {platform.machine()}, torch {torch.__version__}. Measuring "
        f"took {minutes:.0f} minutes of one core, training not counted. No fine-tuning, 1,500 held-out calibration "
        "images, the whole test set; the joint solver runs with its "
        "defaults.\n\n![quality](quality.png)\n\n"
    )
    return head + "\n".join(lines)


def _farthest(rows: list[dict[str, str]]) -> list[str]:
    """How many parameters of the factorizable layers go at most with a good verdict on the test images."""
    lines = [
        "Smallest share kept whose verdict on the 10,000 test images is `better` or `not worse` in loss and accuracy "
        "(margins: the larger of 2 % of the loss and 0.005; half a point), among shares 0.05 apart, and the reduction "
        "of the whole model's parameters there:",
        "",
        f"| seed | {' | '.join(COMPARED)} | ratio of the reductions |",
        "|---" * (len(COMPARED) + 2) + "|",
    ]
    for seed in sorted({row["seed"] for row in rows}):
        cells, reductions = [], []
        for method in COMPARED:
            ours = [row for row in rows if row["seed"] == seed and row["method"] == method]
            good = [row for row in ours if row["verdict"] in ("better", "not worse")]
            best = min(good, key=lambda row: float(row["keep"]), default=None)
            whole = _whole(rows)
            reduction = 0.0 if best is None else 1 - int(best["params_model"]) / whole
            reductions.append(reduction)
            cells.append("none" if best is None else f"{best['keep']} ({-100 * reduction:.1f} %, {_cell([best])})")
        ratio = f"{reductions[1] / reductions[0]:.2f}" if reductions[0] else "-"
        lines.append(f"| {seed} | {' | '.join(cells)} | {ratio} |")
    return [*lines, ""]


def _whole(rows: list[dict[str, str]]) -> int:
    return sum(parameter.numel() for parameter in NETS[SCHEDULES[rows[0]["net"]].net]().parameters())


def _cell(rows: list[dict[str, str]]) -> str:
    loss_change, loss_error = _mean(rows, "loss_change"), _mean(rows, "loss_error")
    accuracy, accuracy_error = 100 * _mean(rows, "accuracy_change"), 100 * _mean(rows, "accuracy_error")
    return f"{loss_change:+.4f} ± {loss_error:.4f} / {accuracy:+.2f} ± {accuracy_error:.2f}"


if __name__ == "__main__":
    main()
