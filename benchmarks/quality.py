"""Loss and accuracy at equal size, side by side with the baselines, on Fashion-MNIST.

Every method sees the same 1,500 held-out calibration images, and nothing is fine-tuned. Ranks are chosen on the
calibration and the selection images; the 10,000 test images are only reported. ``python -m benchmarks.quality`` goes on
where an earlier run stopped, and writes ``quality.csv``, ``quality.png`` and its part of ``RESULTS.md``.
"""

from __future__ import annotations

import argparse
import csv
import math
import platform
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.fashion import batches, splits
from benchmarks.results import write_section
from benchmarks.training import SCHEDULES, trained
from lrf_lightning import Settings, StepOutput
from lrf_lightning.solver.evaluation import Outcome, evaluate
from lrf_lightning.solver.frontier import Frontier
from lrf_lightning.solver.joint import calibrated, solve

FOLDER = Path(__file__).parent
KEPT = (0.7, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1)
BASELINE: dict[str, Any] = {"prediction": "energy", "compensation": False, "probes": False}
METHODS: dict[str, dict[str, Any]] = {
    "plain SVD": {"metric": "euclidean", **BASELINE},
    "activation-whitened SVD": {"metric": "activation", **BASELINE},
    "two-sided metric": {"metric": "fisher", **BASELINE},
    "joint": {},
}
PAPER = {f"paper, {variant}": {"objective": "paper", "variant": variant} for variant in ("lossless", "compact")}
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
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", type=Path, default=FOLDER / "quality.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    for net in options.nets:
        for seed in options.seeds:
            _measure(net, seed, options.csv)
    rows = _read(options.csv)
    _draw(rows, FOLDER / "quality.png")
    write_section(FOLDER / "RESULTS.md", "Quality", _report(rows, time.perf_counter() - started))


def _measure(net: str, seed: int, path: Path) -> None:
    done = {(row["net"], row["seed"], row["method"], row["keep"]) for row in _read(path)}
    wanted = [(method, f"{keep:g}") for method in METHODS for keep in KEPT] + [(method, "") for method in PAPER]
    missing = [item for item in wanted if (net, str(seed), *item) not in done]
    if not missing:
        return
    data = splits(seed)
    model = trained(net, seed, data["train"], FOLDER / ".cache")
    parts = {name: batches(data[name]) for name in ("calibration", "selection", "verification")}
    test = batches(data["test"])
    dense = evaluate(model, loss, test, torch.device("cpu"))
    for method, keep, result in _solved(model, parts, missing):
        compressed, params, seconds = result
        row = {"net": net, "seed": seed, "method": method, "keep": keep, "seconds": f"{seconds:.1f}"}
        row |= params | _changes(dense, evaluate(compressed, loss, test, torch.device("cpu")))
        _append(path, row)
        print(" ".join(f"{name}={row[name]}" for name in FIELDS), flush=True)


def _solved(
    model: nn.Module, parts: dict[str, Any], missing: list[tuple[str, str]]
) -> Iterator[tuple[str, str, tuple[nn.Module, dict[str, Any], float]]]:
    """Every missing model; the budgets of one method share their calibration."""
    for method, options in METHODS.items():
        keeps = [keep for name, keep in missing if name == method]
        if not keeps:
            continue
        started = time.perf_counter()
        work, dense = calibrated(model, loss, parts, settings=Settings(objective="budget", **options))
        frontier, shared = Frontier(work, dense), time.perf_counter() - started
        for keep in keeps:
            started = time.perf_counter()
            point = frontier.at(float(keep))
            compressed = frontier.build(point.ranks)
            params = {"params_model": point.params_model, "params_layers": point.params_layers}
            yield method, keep, (compressed, params, time.perf_counter() - started + shared)
    for method, options in PAPER.items():
        if (method, "") in missing:
            result = solve(model, loss, **parts, settings=Settings(**options))
            params = {"params_model": result.params_model[1], "params_layers": result.params_layers[1]}
            yield method, "", (result.model, params, result.seconds["total"])


def _changes(dense: Outcome, compressed: Outcome) -> dict[str, str]:
    before = dense.measurement()
    assert dense.scores is not None
    assert compressed.scores is not None
    found = {"dense_loss": f"{before.loss:.5f}", "dense_accuracy": f"{before.score:.4f}"}
    for name, change in (("loss", compressed.losses - dense.losses), ("accuracy", compressed.scores - dense.scores)):
        found[f"{name}_change"] = f"{float(change.mean()):+.5f}"
        found[f"{name}_error"] = f"{float(change.std()) / math.sqrt(len(change)):.5f}"
    return found


def _read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _append(path: Path, row: dict[str, Any]) -> None:
    new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow(row)


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


def _report(rows: list[dict[str, str]], seconds: float) -> str:
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
        lines.append("")
    head = (
        f"`python -m benchmarks.quality`, {date.today()}, {platform.machine()} with {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}; the last call took {seconds / 60:.0f} minutes. No fine-tuning, 1,500 held-out "
        "calibration images, 2,500 for selection, the whole test set.\n\n![quality](quality.png)\n\n"
    )
    return head + "\n".join(lines)


def _cell(rows: list[dict[str, str]]) -> str:
    loss_change, loss_error = _mean(rows, "loss_change"), _mean(rows, "loss_error")
    accuracy, accuracy_error = 100 * _mean(rows, "accuracy_change"), 100 * _mean(rows, "accuracy_error")
    return f"{loss_change:+.4f} ± {loss_error:.4f} / {accuracy:+.2f} ± {accuracy_error:.2f}"


if __name__ == "__main__":
    main()
