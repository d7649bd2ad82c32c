"""Pictures with one small panel per layer, split into pages: singular values, and predicted changes of the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from lrf_lightning.plots.style import (
    BLUE,
    GREY,
    ORANGE,
    RED,
    SKY,
    all_finite,
    finite,
    largest_layers,
    loss_margin,
    short_name,
    style,
    symmetric_log,
)
from lrf_lightning.solver.result import LayerCurve, LayerResult
from lrf_lightning.solver.solution import Solution

__all__ = ["curves_figures", "spectra_figures"]

PANEL_COLUMNS, PANEL_ROWS = 4, 4


def spectra_figures(result: Solution) -> list[Figure]:
    """Singular values of every factorizable layer over the largest one, in the metric of the factorization."""
    label = f"singular value / largest one, {result.settings.metric} metric"
    return _pages(result, label, "orange: chosen", _draw_spectrum)


def _draw_spectrum(ax: Axes, layer: LayerResult, curve: LayerCurve) -> None:
    largest = max(curve.singular_values, default=0.0)
    if not all_finite(largest) or largest <= 0:
        return
    ax.set_yscale("log")
    ax.plot(range(1, len(curve.singular_values) + 1), [value / largest for value in curve.singular_values], color=BLUE)
    ax.set_ylim(1e-4, 1.5)
    ax.yaxis.set_minor_locator(NullLocator())


def curves_figures(result: Solution) -> list[Figure]:
    """Predicted change of the loss of every factorizable layer over its rank, with what was measured."""
    margin = loss_margin(result)

    def draw(ax: Axes, layer: LayerResult, curve: LayerCurve) -> None:
        _draw_curve(ax, curve)
        symmetric_log(ax.yaxis, curve.predicted, margin)

    note = "orange: chosen; squares: measured, where truncated alone; grey: outside of the perturbation range"
    return _pages(result, "predicted change of the loss, std. error", note, draw)


def _draw_curve(ax: Axes, curve: LayerCurve) -> None:
    pairs = list(zip(curve.predicted, curve.standard_error, strict=True))
    ax.plot(curve.ranks, curve.predicted, color=BLUE)
    ax.fill_between(
        curve.ranks, [p - e for p, e in pairs], [p + e for p, e in pairs], color=SKY, alpha=0.4, linewidth=0
    )
    outside = [rank for rank, allowed in zip(curve.ranks, curve.allowed, strict=True) if not allowed]
    if outside:
        ax.axvspan(min(outside) - 0.5, max(outside) + 0.5, color=GREY, alpha=0.2, linewidth=0)
    # what was measured for several layers at once says nothing about this one
    for rank, _, measured, error in [] if curve.probed_with else curve.probes:
        if all_finite(measured):
            ax.errorbar([rank], [measured], yerr=[finite(error)], fmt="s", color=RED, markersize=3, capsize=2)


def _pages(
    result: Solution, label: str, note: str, draw: Callable[[Axes, LayerResult, LayerCurve], None]
) -> list[Figure]:
    """Pages of small panels, one per factorizable layer, with the chosen rank as a vertical line."""
    layers = largest_layers(result)
    size = PANEL_COLUMNS * PANEL_ROWS
    return [_page(layers[start : start + size], label, note, draw) for start in range(0, len(layers), size)]


def _page(
    layers: Sequence[tuple[LayerResult, LayerCurve]],
    label: str,
    note: str,
    draw: Callable[[Axes, LayerResult, LayerCurve], None],
) -> Figure:
    rows = math.ceil(len(layers) / PANEL_COLUMNS)
    height = 1.0 + 1.75 * rows
    with style():
        figure = Figure(figsize=(11, height))
        # fixed margins in inches: a layout engine would take most of the time of a page
        figure.subplots_adjust(
            left=0.05, right=0.99, bottom=0.55 / height, top=1 - 0.65 / height, hspace=0.62, wspace=0.25
        )
        for place, (layer, curve) in enumerate(layers):
            ax = figure.add_subplot(rows, PANEL_COLUMNS, place + 1)
            draw(ax, layer, curve)
            if layer.rank is not None:
                ax.axvline(layer.rank, color=ORANGE, linewidth=2)
            rank = "dense, full rank" if layer.rank is None else f"rank {layer.rank} of"
            ax.set_title(f"{short_name(layer)}\n{rank} {layer.full_rank}", size=7, loc="left")
            ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            ax.tick_params(labelsize=7)
        figure.text(0.5, 0.12 / height, f"rank ({note})", ha="center", size=9)
        figure.text(0.012, 1 - 0.22 / height, label, size=10)
    return figure
