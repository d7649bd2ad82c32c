"""Pictures of what changed: which predictions became which others, and the samples themselves where they are images."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lrf_lightning.plots.style import GREEN, GREY, RED, style, to_png
from lrf_lightning.solver.result import SampleChange
from lrf_lightning.solver.solution import Solution

__all__ = ["changes_figures", "draw_samples", "samples_figure"]

MOST_CLASSES = 20
SHEET_COLUMNS, SHEET_ROWS = 8, 4


def changes_figures(result: Solution) -> list[Figure]:
    """Heat map: how often the original's prediction, a row, became the compressed model's, a column."""
    pairs = Counter(
        (change.predicted_before, change.predicted_after)
        for change in result.changes
        if change.predicted_before is not None and change.predicted_after is not None
    )
    if not pairs:
        return []
    every = Counter(cls for pair, count in pairs.items() for cls in pair for _ in range(count))
    classes = sorted(cls for cls, _ in every.most_common(MOST_CLASSES))
    counts = [[pairs.get((row, column), 0) for column in classes] for row in classes]
    shown, total = sum(map(sum, counts)), sum(pairs.values())
    side = max(3.2, 1.6 + 0.32 * len(classes))
    with style():
        figure = Figure(figsize=(side + 1.2, side), layout="constrained")
        ax = figure.subplots()
        image = ax.imshow(counts, cmap="cividis", vmin=0, interpolation="nearest")
        highest = max(map(max, counts))
        for i, row in enumerate(counts):
            for j, count in enumerate(row):
                if count:
                    colour = "black" if count > highest / 2 else "white"
                    ax.text(j, i, str(count), ha="center", va="center", color=colour, size=8)
        ax.set_xticks(range(len(classes)), [str(cls) for cls in classes], size=8)
        ax.set_yticks(range(len(classes)), [str(cls) for cls in classes], size=8)
        ax.grid(visible=False)
        ax.set_xlabel("class that the compressed model predicts")
        ax.set_ylabel("class that the original predicts")
        samples = result.samples.get("verification", total)
        part = "" if shown == total else f", {shown} of them shown"
        ax.set_title(f"{total} of {samples:,} predictions changed{part}", loc="left", size=8)
        bar = figure.colorbar(image, ax=ax, label="verification samples")
        bar.ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    return [figure]


def draw_samples(result: Solution, images: Mapping[int, Tensor]) -> dict[str, bytes]:
    """The samples whose prediction changed as a PNG file by name, nothing without images."""
    figure = samples_figure(result, images)
    return {} if figure is None else {"changed_samples": to_png(figure)}


def samples_figure(result: Solution, images: Mapping[int, Tensor]) -> Figure | None:
    """A sheet of the images on which the models disagree, the largest change of the loss first.

    Args:
        result: what the solver found.
        images: by the number of the sample, shape (height, width, 1 or 3), uint8.
    """
    changes = [change for change in result.changes if change.sample in images][: SHEET_COLUMNS * SHEET_ROWS]
    if not changes:
        return None
    columns = min(len(changes), SHEET_COLUMNS)
    rows = math.ceil(len(changes) / columns)
    width, height = max(1.2 * columns, 5.4), 0.75 + 1.6 * rows
    with style():
        figure = Figure(figsize=(width, height))
        figure.subplots_adjust(
            left=0.01, right=0.99, bottom=0.03 / height, top=1 - 0.85 / height, hspace=0.42, wspace=0.08
        )
        for place, change in enumerate(changes):
            _draw_sample(figure.add_subplot(rows, columns, place + 1), change, images[change.sample])
        heading = (
            f"{len(changes)} of {len(result.changes)} samples that changed: original's → compressed model's answer"
        )
        figure.text(0.012, 1 - 0.2 / height, heading, size=9)
        figure.text(0.012, 1 - 0.38 / height, "green: now right; red: now wrong; grey: neither", size=8)
    return figure


def _draw_sample(ax: Axes, change: SampleChange, image: Tensor) -> None:
    pixels = image.numpy()
    ax.imshow(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels, cmap="gray", interpolation="nearest")
    before, after = change.score_before, change.score_after
    gain = 0.0 if before is None or after is None else after - before
    if change.predicted_before is None:
        text = f"loss {change.loss_before:.2g}→{change.loss_after:.2g}"
    else:
        text = f"{change.predicted_before}→{change.predicted_after}\nright: {change.target}"
    ax.set_title(text, size=8, color=GREEN if gain > 0 else RED if gain < 0 else GREY)
    ax.set_axis_off()
