"""The one table of a result with many budgets: every model on both splits, the front, the knee and the chosen one."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from lrf_lightning.reports.cells import (
    column_name,
    count,
    decimal_places,
    loss_places,
    new_table,
    optional,
    optional_ratio,
    percent,
    unsigned,
)
from lrf_lightning.reports.tables import Row, frontier_rows
from lrf_lightning.reports.verdict import score_name
from lrf_lightning.solver.points.pareto import holding
from lrf_lightning.solver.solution import Solution

__all__ = ["budget_notes", "budgets_table"]


def budgets_table(result: Solution, *, wide: bool) -> Table:
    """The original and all budgets, measured on the selection split and tested on the verification split."""
    rows = frontier_rows(result)
    scored = result.dense.score is not None
    samples = f"{result.dense.samples:,} selection and {result.certificate.dense.samples:,} verification samples"
    table = new_table(f"Budgets: measured on {samples}", wide=wide)
    table.add_column("", no_wrap=True)
    headings = ["budget\n%", "params", "model\nkept %", "loss\nchange", "std.\nerror"]
    headings += [f"{column_name(score_name(result), wide)}\nchange"] if scored else []
    for heading in (*headings, "verified\nchange", "upper\nbound"):
        table.add_column(Text(heading), justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    sizes = [size for size in ("large", "1") if wide and any(row[f"speedup_batch_{size}"] is not None for row in rows)]
    for size in sizes:
        table.add_column(Text(f"x as fast,\nbatch {_batch(result, size)}"), justify="right", no_wrap=True)
    digits, score_digits = loss_places(result), decimal_places(result.settings.score_margin)
    for row in rows:
        score = [optional(row["score_change"], score_digits)] if scored else []
        table.add_row(
            _mark(row),
            percent(row["budget"]),
            count(row["params_model"], wide),
            percent(row["params_model_kept"]),
            optional(row["loss_change"], digits) + ("" if row["within_range"] else "*"),
            unsigned(row["loss_change_error"], digits),
            *score,
            optional(row["verification_loss_change"], digits),
            optional(row["verification_loss_upper"], digits),
            row["verdict"] or "original",
            *(optional_ratio(row[f"speedup_batch_{size}"]) for size in sizes),
        )
    return table


def _batch(result: Solution, size: str) -> int:
    batches = [timing.batch for point in result.frontier if point.speed for timing in point.speed.timings]
    return 1 if size == "1" else max(batches)


def budget_notes(result: Solution) -> list[str]:
    """What the marks mean, and what the verdicts say together."""
    notes = ["> chosen, K knee, - not on the Pareto front; the choice looked at the selection samples only"]
    if any(not point.within_range for point in result.frontier):
        notes.append("* some rank lies outside the range in which predictions were found to hold")
    held = holding(result.frontier)
    confidence = f"{100 * result.certificate.confidence:g} %"
    if held:
        kept = percent(held[-1].params_model / result.params_model[0])
        notes.append(
            f"The favourable verdicts from the top down to {kept} % of the parameters hold together with {confidence} "
            "confidence; each one further down holds by itself only."
        )
    else:
        notes.append(f"Each verdict holds by itself with {confidence} confidence, not all of them together.")
    return notes


def _mark(row: Row) -> str:
    marks = (">" if row["chosen"] else "") + ("K" if row["knee"] else "")
    return marks or ("" if row["pareto"] else "-")
