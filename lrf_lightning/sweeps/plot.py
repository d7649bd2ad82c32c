"""The picture of a sweep: what every job's model lost on the verification split, over what it keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lrf_lightning.plots.style import BLUE, GREEN, GREY, ORANGE, RED, SKY, plain, style, symmetric_log
from lrf_lightning.reports.tables import Row

__all__ = ["sweep_figure"]

# setting names that say how much is kept: they are the x axis already
SIZES = ("keep", "tolerance", "budgets")
LOOKS = [(colour, marker) for marker in "os^Dv" for colour in (BLUE, ORANGE, GREEN, RED, SKY, GREY)]
LONGEST_LABEL = 44
MARGIN = 0.005  # changes below it are drawn on a linear scale; it is the usual margin of a verdict
PANELS = {"loss": "upper", "score": "lower"}


def sweep_figure(rows: Sequence[Row], settings: Sequence[str], budgets: Mapping[str, Sequence[Row]]) -> Figure | None:
    """Change of loss and score with its bound; jobs that differ in size only are one series. None without results.

    Args:
        rows: of :func:`lrf_lightning.sweeps.summary.sweep_rows`.
        settings: the columns that the jobs differ in.
        budgets: all points of jobs that measured many, by job.
    """
    series: dict[str, list[Row]] = {}
    for row in rows:
        if row["params_model_kept"] is not None and row["loss_change"] is not None:
            points = _as_rows(budgets.get(row["job"], ())) or [row]
            series.setdefault(_label(row, settings), []).extend(points)
    if not series:
        return None
    found = [row for points in series.values() for row in points]
    panels = [name for name in PANELS if any(row[f"{name}_change"] is not None for row in found)]
    columns = 1 if len(series) == 1 else 2
    lines = math.ceil(len(series) / columns) if len(series) > 1 else 0
    with style():
        figure = Figure(figsize=(7.5, 1.2 + 2.6 * len(panels) + 0.2 * lines), layout="constrained")
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for ax, name in zip(axes, panels, strict=True):
            ax.axhline(0, color=GREY, linewidth=1)
            for (label, points), (colour, marker) in zip(series.items(), LOOKS * len(series), strict=False):
                _draw(ax, points, name, label, colour, marker)
            ax.set_ylabel(f"change of the {name}\n(bar: its {PANELS[name]} bound)")
            changes = [row[f"{name}_change"] for row in found if row[f"{name}_change"] is not None]
            symmetric_log(ax.yaxis, changes, MARGIN)
        axes[-1].set_xlabel("parameters kept, % of the whole model")
        axes[0].set_title(f"{len(rows)} jobs, on their verification samples (filled: not worse)", loc="left")
        if len(series) > 1:
            figure.legend(
                *axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=columns, frameon=False, fontsize=8
            )
    return figure


def _label(row: Row, settings: Sequence[str]) -> str:
    parts = [f"{name.rpartition('.')[2]}={row[name]}" for name in settings if name.rpartition(".")[2] not in SIZES]
    text = ", ".join(parts) or "all jobs"
    return plain(text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 2]}..")


def _as_rows(points: Sequence[Row]) -> list[Row]:
    """Points of a frontier under the names that rows of jobs have."""
    return [
        {
            "params_model_kept": point["params_model_kept"],
            "loss_change": point["verification_loss_change"],
            "loss_change_upper": point["verification_loss_upper"],
            "score_change": point["verification_score_change"],
            "score_change_lower": point["verification_score_lower"],
            "not_worse": float(point["verdict"] in ("better", "not worse")),
        }
        for point in points
    ]


def _draw(ax: Axes, points: Sequence[Row], name: str, label: str, colour: str, marker: str) -> None:
    bound = f"{name}_change_{PANELS[name]}"
    shown = sorted(
        (row for row in points if row[f"{name}_change"] is not None and math.isfinite(row[f"{name}_change"])),
        key=lambda row: -row["params_model_kept"],
    )
    x = [100 * row["params_model_kept"] for row in shown]
    y = [row[f"{name}_change"] for row in shown]
    reach = [abs(row[bound] - row[f"{name}_change"]) if _finite(row[bound]) else 0.0 for row in shown]
    none = [0.0] * len(reach)
    spans = [none, reach] if name == "loss" else [reach, none]
    ax.errorbar(
        x, y, yerr=spans, color=colour, marker=marker, markersize=5, markerfacecolor="white", linewidth=0.9, capsize=2,
        elinewidth=0.8, label=label,
    )  # fmt: skip
    held = [(a, b) for a, b, row in zip(x, y, shown, strict=True) if row["not_worse"]]
    if held:
        # matplotlib draws the line of error bars a little above other lines
        ax.plot(*zip(*held, strict=True), marker=marker, markersize=5, color=colour, linestyle="none", zorder=3)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
