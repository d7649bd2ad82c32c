"""The picture of :mod:`benchmarks.recipes`, ``recipes.png``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.recipe_figures import METHODS, NAMES, Rows, percent_kept, rows_of, score_factor, score_name, seeds_of
from lrf_lightning.plots.style import BLUE, GREEN, GREY, ORANGE, symmetric_log

__all__ = ["picture"]

STYLES = dict(zip(METHODS, ((GREY, "s"), (ORANGE, "^"), (BLUE, "o")), strict=True))
COLUMNS = 4  # recipes beside each other


def picture(every: Mapping[str, Rows]) -> Figure:
    """Change of loss and score over the share of the whole model's parameters, a column per recipe."""
    across = min(len(every), COLUMNS)
    bands = math.ceil(len(every) / across)
    figure = Figure(figsize=(max(3.1 * across, 5), 0.4 + 4.6 * bands), layout="constrained")
    axes = figure.subplots(2 * bands, across, squeeze=False)
    for place, (name, rows) in enumerate(every.items()):
        band, column = divmod(place, across)
        loss, score = axes[2 * band][column], axes[2 * band + 1][column]
        factor = score_factor(rows)
        margin = max(float(row["loss_margin"]) for row in rows)
        _panel(loss, rows, lambda row: float(row["loss_change"]), margin)
        scored = [row for row in rows if row["score_change"]]
        if scored:
            fall = -factor * float(scored[0]["score_margin"])
            _panel(score, scored, lambda row, factor=factor: factor * float(row["score_change"]), fall)
        loss.set_title(name)
        score.set_xlabel("parameters of the model kept, %", fontsize=8)
        if column == 0:
            loss.set_ylabel("change of the loss")
        score.set_ylabel(f"{score_name(rows)}, points" if factor > 1 else score_name(rows))
    for empty in range(len(every), across * bands):
        for row in range(2):
            axes[2 * (empty // across) + row][empty % across].set_visible(False)
    marks = axes[0][0].get_legend_handles_labels()
    figure.legend(*marks, loc="outside upper center", ncols=3 if across > 1 else 2, frameon=False)
    return figure


def _panel(ax: Axes, rows: Rows, value: Callable[[dict[str, str]], float], margin: float) -> None:
    ax.axhline(0, color=GREY, linewidth=1)
    ax.axhline(margin, color=GREEN, linestyle="--", linewidth=1, label="margin of the verdict")
    ours = [value(row) for row in rows_of(rows, "frontier")]
    for method, (colour, marker) in STYLES.items():
        for index, seed in enumerate(seeds_of(rows)):
            found = rows_of(rows, method, seed)
            label = NAMES.get(method, method) if index == 0 else None
            x, y = [percent_kept(row) for row in found], [value(row) for row in found]
            ax.plot(x, y, color=colour, marker=marker, markersize=3.5, linewidth=1, alpha=0.8, label=label)
    chosen = [row for row in rows_of(rows, "compact") if row["verdict"] != "unchanged"]
    if chosen:
        ax.plot(
            [percent_kept(row) for row in chosen],
            [value(row) for row in chosen],
            linestyle="none", marker="*", markersize=9, color=GREEN, label="compact",
        )  # fmt: skip
    symmetric_log(ax.yaxis, [*ours, *(value(row) for row in rows)], abs(margin))
