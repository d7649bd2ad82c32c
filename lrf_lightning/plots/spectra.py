"""A picture of how singular values change while a model is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from lrf_lightning.plots.style import short_name, style
from lrf_lightning.solver.layers.spectra import Spectrum

__all__ = ["spectra_over_time"]

COLUMNS, MOST_LAYERS, MOST_EPOCHS = 4, 16, 12
Colour = tuple[float, float, float, float]
COLOURS = "cividis_r"  # from light to dark: the latest one is seen best


def spectra_over_time(history: Mapping[int, Mapping[str, Spectrum]]) -> Figure:
    """One panel per layer with its singular values over the largest one, a line per epoch.

    Args:
        history: spectra by epoch and layer, of at least one epoch; the largest layers are drawn.
    """
    epochs = _some(sorted(history), MOST_EPOCHS)
    latest = history[epochs[-1]]
    largest = sorted(latest, key=lambda name: -latest[name].params)[:MOST_LAYERS]
    names = [name for name in latest if name in largest]
    rows = max(1, math.ceil(len(names) / COLUMNS))
    height = 1.25 + 1.75 * rows
    scale, colours = Normalize(min(epochs[0], epochs[-1] - 1), epochs[-1]), colormaps[COLOURS]
    with style():
        figure = Figure(figsize=(11, height))
        # fixed margins in inches: a layout engine would take most of the time of the picture
        figure.subplots_adjust(
            left=0.05, right=0.92, bottom=0.55 / height, top=1 - 0.7 / height, hspace=0.55, wspace=0.25
        )
        for place, name in enumerate(names):
            ax = figure.add_subplot(rows, COLUMNS, place + 1)
            spectra = [(colours(scale(epoch)), history[epoch][name]) for epoch in epochs if name in history[epoch]]
            _draw_layer(ax, name, spectra)
        bar = figure.add_axes((0.94, 0.55 / height, 0.012, 1 - 1.25 / height))
        figure.colorbar(ScalarMappable(scale, colours), cax=bar, label="epoch", ticks=MaxNLocator(6, integer=True))
        fewer = f", the {len(names)} largest of {len(latest)} layers" if len(names) < len(latest) else ""
        figure.text(0.012, 1 - 0.25 / height, f"singular value / largest one{fewer}", size=10)
        figure.text(
            0.48, 0.12 / height, "number of the singular value (dashed: effective rank now)", ha="center", size=9
        )
    return figure


def _draw_layer(ax: Axes, name: str, spectra: Sequence[tuple[Colour, Spectrum]]) -> None:
    for colour, spectrum in spectra:
        values = spectrum.singular_values
        if float(values[0]) > 0:
            ax.plot(range(1, len(values) + 1), (values / values[0]).tolist(), color=colour, linewidth=1)
    _, latest = spectra[-1]
    ax.set_yscale("log")
    ax.set_ylim(1e-4, 1.5)
    ax.yaxis.set_minor_locator(NullLocator())
    ax.axvline(latest.effective_rank, color="black", linewidth=1, linestyle="--")
    ax.set_title(
        f"{short_name(name)}\neffective rank {latest.effective_rank:.1f} of {latest.full_rank}", size=7, loc="left"
    )
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    ax.tick_params(labelsize=7)


def _some(values: list[int], most: int) -> list[int]:
    """The first, the last and evenly spread ones between them."""
    if len(values) <= most:
        return values
    return sorted({values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)})
