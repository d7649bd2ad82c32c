"""Pictures of a result: frontier, layers, ranks, predicted against measured, spectra, predicted curves and changes.

Every entry of ``PICTURES`` draws a list of figures, which is empty where there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from lrf_lightning.plots.changes import changes_figures
from lrf_lightning.plots.frontier import frontier_figures
from lrf_lightning.plots.layers import curves_figures, spectra_figures
from lrf_lightning.plots.style import (
    BLUE,
    GREY,
    RED,
    SKY,
    all_finite,
    finite,
    in_columns,
    largest_layers,
    loss_margin,
    short_name,
    style,
    symmetric_log,
    to_png,
)
from lrf_lightning.reports.tables import Row, frontier_rows, probe_rows
from lrf_lightning.solver.result import LayerResult
from lrf_lightning.solver.solution import Solution

__all__ = ["PICTURES", "draw"]


def draw(result: Solution, picture: str) -> dict[str, bytes]:
    """One picture of a result as PNG files by name without extension; several pages end in ``_1``, ``_2`` and so on.

    Args:
        result: what the solver found.
        picture: a key of ``PICTURES``.
    """
    pages = [to_png(figure) for figure in PICTURES[picture](result)]
    return {picture if len(pages) == 1 else f"{picture}_{i + 1}": page for i, page in enumerate(pages)}


def layers_figures(result: Solution) -> list[Figure]:
    """Parameters of every factorizable layer before and after, with its rank; the largest ones if there are many."""
    layers = [layer for layer, _ in largest_layers(result)]
    if not layers:
        return []
    every = sum(layer.curve is not None for layer in result.layers)
    columns = in_columns(layers)
    with style():
        figure = Figure(figsize=(8 if len(columns) == 1 else 6.2 * len(columns), 1.4 + 0.2 * len(columns[0])))
        figure.set_layout_engine("constrained")
        axes = figure.subplots(1, len(columns), sharex=True, squeeze=False)[0]
        for ax, column in zip(axes, columns, strict=True):
            _draw_layers(ax, column, len(columns[0]))
        fewer = f", the {len(layers)} largest of {every}" if len(layers) < every else ""
        axes[0].set_title(f"Factorizable layers{fewer}", loc="left")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    return [figure]


def _draw_layers(ax: Axes, layers: Sequence[LayerResult], rows: int) -> None:
    places = range(len(layers))
    ax.barh(places, [layer.params_before for layer in layers], color=SKY, alpha=0.5, label="before")
    ax.barh(places, [layer.params_after for layer in layers], height=0.45, color=BLUE, label="after")
    for place, layer in zip(places, layers, strict=True):
        text = "dense" if layer.rank is None else f"rank {layer.rank}/{layer.full_rank}"
        ax.annotate(text, (layer.params_before, place), (4, 0), textcoords="offset points", va="center", size=7)
    ax.set_yticks(places, [short_name(layer) for layer in layers], size=7)
    ax.set_ylim(rows - 0.4, -0.6)
    ax.grid(visible=False, axis="y")
    ax.margins(x=0.18)
    ax.set_xlabel("weight entries of the layer")
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(_thousands)


def ranks_figures(result: Solution) -> list[Figure]:
    """Heat map: rank over full rank of every layer at every measured point."""
    layers = [layer for layer, _ in largest_layers(result)]
    points = [row for row in frontier_rows(result) if row["params_model_kept"] is not None][1:]
    if not layers or not points or len(points) != len(result.frontier):
        return []
    columns = in_columns(layers)
    width = max(len(columns) * (2 + 0.45 * len(points)) + 1, 5.6)
    with style():
        figure = Figure(figsize=(width, max(1.6 + 0.2 * len(columns[0]), 3.0)), layout="constrained")
        axes = figure.subplots(1, len(columns), squeeze=False)[0]
        for ax, column in zip(axes, columns, strict=True):
            image = _draw_ranks(ax, result, column, points, len(columns[0]))
        figure.suptitle("Ranks on the frontier (framed: chosen; 100: dense)", size=9)
        figure.supxlabel("parameters kept, % of the whole model", size=9)
        figure.colorbar(image, ax=axes, label="rank, % of full rank", aspect=30)
    return [figure]


def _draw_ranks(
    ax: Axes, result: Solution, layers: Sequence[LayerResult], points: Sequence[Row], rows: int
) -> AxesImage:
    values = [
        [100 * point.ranks.get(layer.name, layer.full_rank) / layer.full_rank for point in result.frontier]
        for layer in layers
    ]
    image = ax.imshow(values, aspect="auto", cmap="cividis", vmin=0, vmax=100, interpolation="nearest")
    ax.set_ylim(rows - 0.5, -0.5)
    ax.set_yticks(range(len(layers)), [short_name(layer) for layer in layers], size=7)
    labels = [f"{100 * row['params_model_kept']:.1f}" for row in points]
    ax.set_xticks(range(len(points)), labels, rotation=90 if len(points) > 6 else 0, size=8)
    for place, row in enumerate(points):
        if row["chosen"]:
            frame = (place - 0.5, -0.5), 1, len(layers)
            ax.add_patch(Rectangle(*frame, fill=False, edgecolor=RED, linewidth=2, clip_on=False))
    ax.grid(visible=False)
    return image


def probes_figures(result: Solution) -> list[Figure]:
    """Predicted against measured change of the loss, of one or a few truncated layers and of whole allocations."""
    probes = [row for row in probe_rows(result) if all_finite(row["predicted_change"], row["measured_change"])]
    points = [point for point in result.frontier if all_finite(point.predicted, point.loss_change)]
    if not probes and not points:
        return []
    series = [
        (
            "one or a few layers truncated (calibration split)",
            BLUE,
            "o",
            [(row["predicted_change"], row["measured_change"], finite(row["error"])) for row in probes],
        ),
        (
            "whole model, compensated (selection split)",
            RED,
            "s",
            [(point.predicted, point.loss_change, finite(point.loss_change_error)) for point in points],
        ),
    ]
    with style():
        figure = Figure(figsize=(6.5, 6), layout="constrained")
        ax = figure.subplots()
        for label, colour, marker, triples in series:
            if triples:
                x, y, errors = zip(*triples, strict=True)
                ax.errorbar(
                    x, y, yerr=errors, fmt=marker, color=colour, markersize=4, alpha=0.7, elinewidth=0.8, label=label
                )
        values = [value for *_, triples in series for x, y, _ in triples for value in (x, y)]
        low, high = min(values), max(values)
        ax.plot([low, high], [low, high], color=GREY, linewidth=1, label="prediction holds")
        margin = loss_margin(result)
        symmetric_log(ax.xaxis, values, margin)
        symmetric_log(ax.yaxis, values, margin)
        ax.set_xlabel("predicted change of the loss")
        ax.set_ylabel("measured change of the loss, std. error")
        figure.legend(*ax.get_legend_handles_labels(), loc="outside upper left", frameon=False)
    return [figure]


def _thousands(value: float, _: float) -> str:
    return f"{value:,.0f}"


PICTURES: dict[str, Callable[[Solution], list[Figure]]] = {
    "frontier": frontier_figures,
    "layers": layers_figures,
    "ranks": ranks_figures,
    "predicted_vs_measured": probes_figures,
    "spectra": spectra_figures,
    "curves": curves_figures,
    "changes": changes_figures,
}
