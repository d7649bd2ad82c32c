"""What all pictures share: colours, style, names that fit, and a scale on which small and large changes are seen.

Figures are built without pyplot, in matplotlib's default style whatever the user's is. The colours are those of Okabe
and Ito, which people with colour blindness can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any, TypeVar

import matplotlib
import matplotlib.style
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

from lrf_lightning.solver.result import LayerCurve, LayerResult
from lrf_lightning.solver.solution import Solution

__all__ = [
    "all_finite",
    "finite",
    "in_columns",
    "largest_layers",
    "loss_margin",
    "plain",
    "short_name",
    "style",
    "symmetric_log",
    "to_png",
]

T = TypeVar("T")

BLUE, ORANGE, GREEN, RED, SKY, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#707070"
DOTS_PER_INCH = 110
# a page of panels takes about a second to draw, and the tables hold all layers
MOST_LAYERS = 72
# W&B shows a picture as large as the screen at most, where more rows than this could not be read
MOST_ROWS = MOST_LAYERS // 2
LONGEST_NAME = 30

STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's defaults with ours on top; the user's settings are back afterwards."""
    with matplotlib.style.context(["default", STYLE]):
        yield


def to_png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = BytesIO()
    with style():
        figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    return buffer.getvalue()


def symmetric_log(axis: Axis, values: Sequence[float], margin: float) -> None:
    """Logarithmic on both sides of 0 where values are so large that those near the margin could not be told apart."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    if not 0 < 10 * margin < largest:
        return
    linear = _round_up(margin)
    set_scale = axis.axes.set_xscale if axis is axis.axes.xaxis else axis.axes.set_yscale
    set_scale("symlog", linthresh=linear, linscale=1.5)
    decades = max(math.ceil(math.log10(largest / linear)), 1)
    step = math.ceil(decades / 3)
    ticks = [linear * 10.0**i for i in range(0, decades + 1, step)]
    lowest = min(value for value in values if math.isfinite(value))
    negative = [-tick for tick in ticks if tick <= 10 * -lowest]
    axis.set_major_locator(FixedLocator([*reversed(negative), 0.0, *ticks]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FormatStrFormatter("%g"))


def _round_up(value: float) -> float:
    """The next of 1, 2 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= value * 0.999)


def largest_layers(result: Solution) -> list[tuple[LayerResult, LayerCurve]]:
    """The factorizable layers in the model's order, without the smallest ones if there are very many."""
    layers = [(layer, layer.curve) for layer in result.layers if layer.curve is not None]
    sizes = sorted((layer.params_before for layer, _ in layers), reverse=True)
    least = sizes[MOST_LAYERS - 1] if len(sizes) > MOST_LAYERS else 0
    return [pair for pair in layers if pair[0].params_before >= least][:MOST_LAYERS]


def in_columns(items: Sequence[T]) -> list[Sequence[T]]:
    """Cut into as few columns of about the same length as can be read beside each other."""
    columns = max(1, math.ceil(len(items) / MOST_ROWS))
    rows = math.ceil(len(items) / columns)
    return [items[start : start + rows] for start in range(0, len(items), rows)]


def short_name(layer: LayerResult | str) -> str:
    """A layer's name; in a long one, parts without a number are cut to their first letter, and then the front."""
    *parents, last = (layer if isinstance(layer, str) else layer.name or layer.kind).split(".")
    for i, part in enumerate(parents):
        if len(".".join([*parents, last])) > LONGEST_NAME and not any(letter.isdigit() for letter in part):
            parents[i] = part[:1]
    name = ".".join([*parents, last])
    return plain(name if len(name) <= LONGEST_NAME else f"..{name[-LONGEST_NAME + 2 :]}")


def loss_margin(result: Solution) -> float:
    """Largest increase of the loss that counts as not worse, 0 without a certificate."""
    return 0.0 if result.certificate is None else result.certificate.loss_margin


def plain(text: str) -> str:
    """Dollars would start a formula."""
    return text.replace("$", r"\$")


def all_finite(*values: float) -> bool:
    """Whether there is something to draw."""
    return all(math.isfinite(value) for value in values)


def finite(value: float | None) -> float:
    """An error bar of a single pair would be infinite: none is drawn."""
    return value if value is not None and math.isfinite(value) else 0.0
