"""Tables of the report and how their numbers are written."""

from __future__ import annotations

from rich import box
from rich.table import Table

from lrf_lightning.reports.verdict import decimals, signed
from lrf_lightning.solver.solution import Solution

__all__ = [
    "column_name",
    "count",
    "decimal_places",
    "loss_places",
    "new_table",
    "optional",
    "optional_ratio",
    "percent",
    "scaled",
    "unsigned",
]

NARROW = 7


def new_table(title: str, *, wide: bool) -> Table:
    """An empty table; cells stand closer where the console is narrow."""
    padding = (0, 1 if wide else 0, 0, 0)
    return Table(title=title, box=box.SIMPLE_HEAD, padding=padding, pad_edge=False, title_justify="left")


def decimal_places(margin: float) -> int:
    """Decimal places in the tables: four, more for very small margins, fewer for large ones."""
    return max(decimals(margin), 4) if margin < 1 else decimals(margin) + 1


def loss_places(result: Solution) -> int:
    """Decimal places for losses and their changes."""
    return decimal_places(0.005 if result.certificate is None else result.certificate.loss_margin)


def optional(value: float | None, places: int) -> str:
    """A number with its sign, nothing for None."""
    return "" if value is None else signed(value, places)


def unsigned(value: float, places: int) -> str:
    """A number without a plus."""
    return f"{value:.{places}f}"


def optional_ratio(value: float | None) -> str:
    """A ratio with two places, nothing for None."""
    return "" if value is None else f"{value:.2f}"


def scaled(value: float, unit: str) -> str:
    """At least three digits of seconds, bytes, samples per second or operations, with a prefix."""
    scales: list[tuple[float, str]]
    if unit == "bytes":
        scales = [(2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes")]
    elif unit == "s":
        scales = [(1, "s"), (1e-3, "ms"), (1e-6, "us")]
    elif unit == "samples/s":
        scales = [(1, "/s")]
    else:
        scales = [(1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP"), (1, "FLOP")]
    size, name = next(((size, name) for size, name in scales if value >= size), scales[-1])
    digits = value / size
    whole = len(str(int(digits)))
    return f"{digits:,.{max(0, 3 - whole)}f} {name}"


def percent(value: float | None) -> str:
    """A share in per cent, nothing for None."""
    return "" if value is None else f"{100 * value:.1f}"


def count(number: int, wide: bool) -> str:
    """All digits on a wide console, else three of them and a unit."""
    if wide or number < 10_000:
        return f"{number:,}"
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            digits = number / size
            return f"{digits:.{max(0, 2 - len(str(int(digits))) + 1)}f}{unit}"
    return str(number)


def column_name(name: str, wide: bool) -> str:
    """The heading of a column of scores, on a narrow console no wider than the numbers below it."""
    return name if wide or len(name) <= NARROW else {"accuracy": "acc."}.get(name, f"{name[: NARROW - 1]}.")
