"""Predicted against actual change of the loss, for every layer at several ranks and for whole allocations.

Single layers of the regularised ResNet of ``benchmarks.quality`` are truncated without compensation, which is what the
curves predict; the actual change is that on the 10,000 test images, which no prediction has seen. ``python -m
benchmarks.predictions`` writes ``predictions.png`` and its part of ``RESULTS.md``.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.fashion import batches, splits
from benchmarks.quality import KEPT, loss
from benchmarks.results import write_section
from benchmarks.training import trained
from lrf_lightning import Settings
from lrf_lightning.solver.factors.decomposition import stand_in
from lrf_lightning.solver.factors.factorization import Factors
from lrf_lightning.solver.joint import calibrated
from lrf_lightning.solver.layers.layer_statistics import LayerStatistics
from lrf_lightning.solver.points.frontier import Frontier
from lrf_lightning.solver.running.evaluation import Outcome, evaluate
from lrf_lightning.solver.workspace import Workspace
from lrf_lightning.surgery import replace_module

FOLDER = Path(__file__).parent
CPU = torch.device("cpu")
SHARES = (0.1, 0.25, 0.5, 0.8)  # of a layer's break-even rank
FACTOR = 2.0


@dataclass(frozen=True)
class Point:
    """One comparison.

    Attributes:
        kind: what was truncated.
        raw: the prediction of the curves, first order and curvature.
        corrected: the prediction after the measured truncations of the perturbation range, which the allocation uses.
        actual: change of the test loss.
        error: its paired standard error.
        allowed: whether it lies inside the perturbation range.
    """

    kind: str
    raw: float
    corrected: float
    actual: float
    error: float
    allowed: bool


def main() -> None:
    """Measure, draw, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    options = parser.parse_args()
    torch.set_num_threads(1)
    points = [point for seed in options.seeds for point in _measured(seed)]
    _draw(points, FOLDER / "predictions.png")
    write_section(FOLDER / "RESULTS.md", "Predictions", _report(points, options.seeds))


def _measured(seed: int) -> Iterator[Point]:
    data = splits(seed)
    model = trained("resnet", seed, data["train"], FOLDER / ".cache")
    parts = {name: batches(data[name]) for name in ("calibration", "selection", "verification")}
    test = batches(data["test"])
    dense = evaluate(model, loss, test, CPU)
    settings = Settings(objective="budget")
    work, selection = calibrated(model, loss, parts, settings=settings)
    # the moments of the inputs are forgotten after the curves, so the components are taken from a pass of their own
    layers = work.statistics([layer.candidate for layer in work.layers.values()])
    factors = work.factorized(layers, lambda: None)
    for name in work.layers:
        yield from _layer(work, layers[name], factors[name], dense, test)
    frontier = Frontier(work, selection)
    for keep in KEPT:
        point = frontier.at(keep)
        chosen = [(work.curves[name], rank - 1) for name, rank in point.ranks.items()]
        raw = sum(float(curve.prediction.change(settings.first_order_errors)[i]) for curve, i in chosen)
        actual, error = _change(frontier.build(point.ranks), dense, test)
        yield Point("whole model, compensated", raw, point.predicted, actual, error, point.within_range)


def _layer(
    work: Workspace, layer: LayerStatistics, factors: Factors, dense: Outcome, test: list[tuple[Tensor, Tensor]]
) -> Iterator[Point]:
    name, module = layer.candidate.name, layer.candidate.module
    curve = work.curves[name]
    count = len(curve.change)
    for rank in sorted({max(1, round(share * count)) for share in SHARES}):
        replace_module(work.model, name, stand_in(work, layer, factors, rank))
        actual, error = _change(work.model, dense, test)
        replace_module(work.model, name, module)
        raw = float(curve.prediction.change(work.settings.first_order_errors)[rank - 1])
        yield Point("one layer", raw, float(curve.change[rank - 1]), actual, error, bool(curve.allowed[rank - 1]))


def _change(model: nn.Module, dense: Outcome, test: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    difference = evaluate(model, loss, test, CPU).losses - dense.losses
    return float(difference.mean()), float(difference.std()) / math.sqrt(len(difference))


def _draw(points: list[Point], path: Path) -> None:
    figure = Figure(figsize=(10, 5), layout="constrained")
    for ax, name, title in zip(
        figure.subplots(1, 2, sharex=True, sharey=True),
        ("raw", "corrected"),
        ("curves alone", "corrected by measured truncations"),
        strict=True,
    ):
        for kind, colour, marker in (("one layer", "#0072B2", "o"), ("whole model, compensated", "#D55E00", "s")):
            for allowed in (True, False):
                shown = [point for point in points if (point.kind, point.allowed) == (kind, allowed)]
                if shown:
                    ax.errorbar(
                        [getattr(point, name) for point in shown],
                        [point.actual for point in shown],
                        [point.error for point in shown],
                        fmt=marker,
                        color=colour,
                        markerfacecolor=colour if allowed else "none",
                        markersize=4,
                        elinewidth=0.7,
                        label=kind if allowed else f"{kind}, outside of the range",
                    )
        limits = [1e-4, 3.0]
        ax.plot([-1e-3, *limits], [-1e-3, *limits], color="black", linewidth=0.8)
        ax.set_xscale("symlog", linthresh=1e-3)
        ax.set_yscale("symlog", linthresh=1e-3)
        ax.grid(alpha=0.3)
        ax.set_title(title)
        ax.set_xlabel("predicted change of the loss, nats")
    figure.axes[0].set_ylabel("actual change of the test loss, nats, std. error")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def _report(points: list[Point], seeds: list[int]) -> str:
    lines = [
        f"`python -m benchmarks.predictions`, {date.today()}, the regularised ResNet of Quality, seeds "
        f"{', '.join(map(str, seeds))}. Every layer at up to {len(SHARES)} ranks, truncated alone, and allocations at "
        f"{len(KEPT)} shares with compensation. Counted are points whose actual change is at least two "
        "standard errors from zero. The compensation undoes part of what the curves predict for whole models.",
        "",
        "![predictions](predictions.png)",
        "",
        f"| what | points | curves alone: median of actual / predicted, share within a factor of {FACTOR:g} | "
        "corrected by measured truncations |",
        "|---|---|---|---|",
    ]
    for kind in ("one layer", "whole model, compensated"):
        for allowed in (True, False):
            shown = [point for point in points if (point.kind, point.allowed) == (kind, allowed)]
            counted = [point for point in shown if abs(point.actual) > 2 * point.error]
            if counted:
                cells = " | ".join(_agreement(counted, name) for name in ("raw", "corrected"))
                where = "inside" if allowed else "outside"
                lines.append(f"| {kind}, {where} the perturbation range | {len(counted)} of {len(shown)} | {cells} |")
    return "\n".join(lines)


def _agreement(points: list[Point], name: str) -> str:
    ratios = [point.actual / getattr(point, name) for point in points if getattr(point, name) != 0]
    within = sum(1 / FACTOR <= ratio <= FACTOR for ratio in ratios) / len(ratios)
    return f"{statistics.median(ratios):.2f}, {100 * within:.0f} %"


if __name__ == "__main__":
    main()
