"""Tables of the report and how their numbers are written."""

from __future__ import annotations

from rich import box
from rich.table import Table

from lrf_lightning.solver.result import Solution
from lrf_lightning.verdict import decimals, signed

__all__ = ["column_name", "count", "decimal_places", "loss_places", "new_table", "optional", "percent", "unsigned"]

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
