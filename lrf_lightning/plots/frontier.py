"""The picture of the frontier: loss, score and speed over what is kept, with front, knee and what was chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lrf_lightning.plots.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    SKY,
    finite,
    loss_margin,
    plain,
    style,
    symmetric_log,
)
from lrf_lightning.reports.tables import Row, frontier_rows
from lrf_lightning.reports.verdict import score_name
from lrf_lightning.solver.solution import Solution

__all__ = ["frontier_figures"]


def frontier_figures(result: Solution) -> list[Figure]:
    """Change of loss and score over the parameters kept, with one standard error and the margins of the verdict.

    Where all points were tested on the verification split, its changes with their bounds stand beside them; where all
    were timed, a panel shows how many times as fast as the original they are.
    """
    rows = [row for row in frontier_rows(result) if row["params_model_kept"] is not None]
    if len(rows) < 2:
        return []
    panels = [("loss", loss_margin(result), 1.0)]
    if any(row["score_change"] is not None for row in rows):
        panels.append(("score", result.settings.score_margin, -1.0))
    timed = [row for row in rows if row["speedup_batch_large"] is not None or row["speedup_batch_1"] is not None]
    with style():
        count = len(panels) + bool(timed)
        figure = Figure(figsize=(7.5, 1.4 + 2.6 * min(count, 2) + 2.0 * (count > 2)), layout="constrained")
        axes = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
        for ax, (name, margin, sign) in zip(axes, panels, strict=False):
            _draw_frontier(ax, rows, name, margin, sign)
        if timed:
            _draw_speed(axes[-1], timed)
        original = f"original: {result.dense.loss:.4g}"
        axes[0].set_ylabel(f"change of the loss\n({original})")
        if len(panels) == 2:
            axes[1].set_ylabel(f"change of the {plain(score_name(result))}\n(original: {result.dense.score:.4g})")
        axes[-1].set_xlabel(f"parameters kept, % of the whole model's {result.params_model[0]:,}")
        axes[0].set_title(_title(result, rows), loc="left")
        # the legend of the first panel serves both, above them, where no point can lie
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return [figure]


def _title(result: Solution, rows: Sequence[Row]) -> str:
    title = f"Measured on {result.dense.samples:,} selection samples"
    if _tested(rows):
        title += f", tested on {result.certificate.dense.samples:,} verification samples"
    return title


def _tested(rows: Sequence[Row]) -> bool:
    return any(row["verdict"] is not None for row in rows)


def _draw_frontier(ax: Axes, rows: Sequence[Row], name: str, margin: float, sign: float) -> None:
    shown = [row for row in rows if row[f"{name}_change"] is not None and math.isfinite(row[f"{name}_change"])]
    y = [row[f"{name}_change"] for row in shown]
    ax.axhline(0, color=GREY, linewidth=1)
    _draw_verification(ax, shown, name)
    front = [row for row in shown if row["pareto"]]
    beaten = [row for row in shown[1:] if not row["pareto"]]
    _draw_measured(ax, front, name, color=BLUE, marker="o", linewidth=1.2, label="Pareto front, std. error")
    _draw_measured(
        ax, beaten, name, color=BLUE, marker="o", markerfacecolor="white", linestyle="none", label="not on the front"
    )
    if margin > 0:
        ax.axhline(sign * margin, color=GREEN, linestyle="--", linewidth=1, label="margin of the verdict")
    marks: list[tuple[str, list[Row], dict[str, Any]]] = [
        ("original", shown[:1], {"marker": "D", "markersize": 6, "color": GREY}),
        (
            "outside of the perturbation range",
            [row for row in shown if not row["within_range"]],
            {"marker": "x", "markersize": 8, "color": RED},
        ),
        (
            "knee of the front",
            [row for row in shown if row["knee"]],
            {"marker": "D", "markersize": 11, "markerfacecolor": "none", "color": RED, "markeredgewidth": 2},
        ),
        (
            "chosen",
            [row for row in shown if row["chosen"]],
            {"marker": "o", "markersize": 13, "markerfacecolor": "none", "color": ORANGE, "markeredgewidth": 2.5},
        ),
    ]
    for label, marked, looks in marks:
        if marked:
            ax.plot(_kept(marked), [row[f"{name}_change"] for row in marked], linestyle="none", label=label, **looks)
    symmetric_log(ax.yaxis, y, margin)


def _draw_speed(ax: Axes, rows: Sequence[Row]) -> None:
    ax.axhline(1, color=GREY, linewidth=1)
    looks = {"large": (BLUE, "o", "large batch"), "1": (SKY, "s", "a single sample")}
    for size, (colour, marker, label) in looks.items():
        name = f"speedup_batch_{size}"
        shown = [row for row in rows if row[name] is not None]
        if shown:
            values = [row[name] for row in shown]
            below = [row[name] - row[f"{name}_lower"] for row in shown]
            above = [row[f"{name}_upper"] - row[name] for row in shown]
            ax.errorbar(
                _kept(shown), values, yerr=[below, above], color=colour, marker=marker, markersize=4, linewidth=1.2,
                capsize=2.5, label=f"{label}, 95 % interval",
            )  # fmt: skip
    ax.set_ylabel("times as fast\n(eager PyTorch)")
    ax.legend(frameon=False)


def _draw_measured(ax: Axes, rows: Sequence[Row], name: str, **looks: Any) -> None:
    if rows:
        errors = [finite(row[f"{name}_change_error"]) for row in rows]
        changes = [row[f"{name}_change"] for row in rows]
        ax.errorbar(_kept(rows), changes, yerr=errors, markersize=4, capsize=2.5, **looks)


def _draw_verification(ax: Axes, rows: Sequence[Row], name: str) -> None:
    """The change on the verification split and, as a bar to one side, its bound."""
    bound = {"loss": "verification_loss_upper", "score": "verification_score_lower"}[name]
    tested = [row for row in rows if row[bound] is not None and math.isfinite(row[bound])]
    if not tested:
        return
    changes = [row[f"verification_{name}_change"] for row in tested]
    reach = [abs(row[bound] - change) for row, change in zip(tested, changes, strict=True)]
    none = [0.0] * len(reach)
    ax.errorbar(
        _kept(tested),
        changes,
        yerr=[none, reach] if name == "loss" else [reach, none],
        color=SKY,
        marker="s",
        markersize=4,
        linewidth=1,
        capsize=2.5,
        label="verification, with its bound",
    )


def _kept(rows: Sequence[Row]) -> list[float]:
    return [100 * row["params_model_kept"] for row in rows]
