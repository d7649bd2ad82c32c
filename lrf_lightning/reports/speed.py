"""The part of the report on speed and size: one table, and why the compressed model is not faster where it is not."""

from __future__ import annotations

import statistics

from rich.table import Table
from rich.text import Text

from lrf_lightning.reports.cells import new_table, optional_ratio, scaled
from lrf_lightning.reports.tables import Row, share, speed_rows
from lrf_lightning.solver.solution import Solution
from lrf_lightning.solver.speed_result import SlowerLayer, Speed, Timing

__all__ = ["speed_notes", "speed_table"]

FEW_RANKS = 16  # components that a vector unit works on at once (AVX-512, and tiles of matrix units)
MOST_NAMES = 3


def speed_table(result: Solution, *, wide: bool) -> Table:
    """Size, operations, memory and times of both models; ``result.speed`` must be known."""
    assert result.speed is not None
    what = "forward pass" if result.speed.what == "forward" else "step"
    table = new_table(f"Speed and size: one {what}, both models in turn", wide=wide)
    table.add_column("", no_wrap=True)
    for heading in ("dense", "compressed", "ratio", "95 %\ninterval"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in speed_rows(result):
        table.add_row(Text(_label(row, result.speed)), *_cells(row))
    return table


def _label(row: Row, speed: Speed) -> str:
    if row["batch"] is None:
        return str(row["figure"])
    runtime = f", {row['runtime']}" if len({timing.runtime for timing in speed.timings}) > 1 else ""
    return f"{row['figure']}, batch {row['batch']}{runtime}"


def _cells(row: Row) -> tuple[str, str, str, str]:
    interval = "" if row["lower"] is None else f"{row['lower']:.2f} to {row['upper']:.2f}"
    unit = row["unit"]
    return scaled(row["dense"], unit), scaled(row["compressed"], unit), optional_ratio(row["ratio"]), interval


def speed_notes(result: Solution) -> list[str]:
    """Where it was measured, whether the compressed model is faster, if not why, and what could not be measured."""
    speed = result.speed
    assert speed is not None
    notes = [f"A ratio of latencies above 1 is faster; medians of paired runs. Measured on {speed.device}."]
    slow = [timing for timing in speed.timings if not timing.is_faster]
    if slow:
        slower = [timing for timing in slow if timing.is_slower]
        parts = (("slower", slower), ("not measurably faster", [timing for timing in slow if timing not in slower]))
        where = ", ".join(f"{how} {', '.join(_where(t, speed) for t in found)}" for how, found in parts if found)
        notes.append(f"{where[0].upper()}{where[1:]}: {'; '.join(_reasons(result, speed, slow))}.")
    return notes + [f"Speed: {problem}." for problem in speed.problems]


def _where(timing: Timing, speed: Speed) -> str:
    several = len({other.runtime for other in speed.timings}) > 1
    return f"at batch {timing.batch}" + (f" ({timing.runtime})" if several else "")


def _reasons(result: Solution, speed: Speed, slow: list[Timing]) -> list[str]:
    """What the measurements say, the likeliest first; at least one reason."""
    reasons = []
    if speed.slower_layers:
        shown = ", ".join(f"{layer.name} x{layer.ratio:.1f}" for layer in speed.slower_layers[:MOST_NAMES])
        costliest = "costliest " if speed.timed_layers < len(result.ranks) else ""
        number = len(speed.slower_layers)
        take = "takes" if number == 1 else "take"
        reasons.append(
            f"{number} of the {speed.timed_layers} {costliest}factorized layers {take} longer than the "
            f"dense ones (time {shown}){_few_ranks(speed.slower_layers)}; use cost=latency"
        )
    kept = _operations_kept(result, speed)
    if kept is not None and kept > 0.8:
        reasons.append(f"{100 * kept:.0f} % of the operations remain, since the costly layers stay dense or nearly so")
    if all(timing.batch == 1 for timing in slow):
        number = len(result.ranks)
        calls = f"{number} layer{'s make' if number > 1 else ' makes'} two calls instead of one"
        reasons.append(f"a single sample leaves little work per call, and {calls}")
    if not reasons:
        reasons.append(
            "what is saved in the factorized layers disappears in the rest of the model and in the noise"
            + ("" if kept is None else f" ({100 * kept:.0f} % of the operations remain)")
        )
    return reasons


def _operations_kept(result: Solution, speed: Speed) -> float | None:
    """Share of the whole model's operations that is left, or of the factorizable layers' if that is all one knows."""
    if speed.flops is not None and speed.flops[0]:
        return speed.flops[1] / speed.flops[0]
    return share(result.flops_layers[1], result.flops_layers[0])


def _few_ranks(layers: list[SlowerLayer]) -> str:
    median = statistics.median(layer.rank for layer in layers)
    return f", their median rank of {median:g} being too small to fill vector units" if median < FEW_RANKS else ""
