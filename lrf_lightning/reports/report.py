"""The report of a result for people: layers, frontier and verdict, on the terminal or in a file.

Only ASCII is written besides the frames of the tables, for which rich has a fallback, so that the report can be piped
anywhere. Below 100 columns counts are abbreviated, and long names are folded, never cut.
"""

from __future__ import annotations

from collections import defaultdict

from rich.console import Console
from rich.segment import Segments
from rich.table import Table
from rich.text import Text

from lrf_lightning.reports.budgets import budget_notes, budgets_table
from lrf_lightning.reports.cells import (
    column_name,
    count,
    decimal_places,
    loss_places,
    new_table,
    optional,
    percent,
    unsigned,
)
from lrf_lightning.reports.speed import speed_notes, speed_table
from lrf_lightning.reports.summary import factorized_params
from lrf_lightning.reports.tables import Row, frontier_rows, share
from lrf_lightning.reports.verdict import score_name, signed, temperature_sentence, verdict_sentence
from lrf_lightning.solver.result import LayerResult
from lrf_lightning.solver.solution import Solution

__all__ = ["print_report"]

NARROWEST, WIDE = 78, 100
# more rows than fit a few screens are read from layers.csv
MOST_LAYERS, MOST_NAMES = 80, 4


def print_report(result: Solution, *, console: Console | None = None) -> None:
    """Print one table of the layers, one of the frontier, and the verdict in one sentence.

    A result with many budgets has one table, that of the budgets; ``layers.csv`` has the layers of the chosen model.

    Args:
        result: what the solver found.
        console: where to print; standard output by default.
    """
    console = console or Console()
    settings = result.settings
    console.print()
    console.rule(f"Low-rank compression: objective={settings.objective}, metric={settings.metric}", characters="-")
    budgets = any(point.certificate is not None for point in result.frontier)
    if not budgets and any(layer.curve is not None for layer in result.layers):
        _show(console, _layers_table(result, wide=console.width >= WIDE))
    for line in _left_alone(result):
        _say(console, line)
    if budgets:
        _show(console, budgets_table(result, wide=console.width >= WIDE))
        for line in budget_notes(result):
            _say(console, line)
    elif result.frontier:
        _show(console, _frontier_table(result, wide=console.width >= WIDE))
        _say(console, _frontier_note(result))
    if result.speed is not None:
        _show(console, speed_table(result, wide=console.width >= WIDE))
        for line in speed_notes(result):
            _say(console, line)
    console.print()
    _say(console, verdict_sentence(result), style="bold")
    scaled = temperature_sentence(result.certificate) if result.ranks else ""
    for line in (_choice(result), scaled, _time(result)):
        _say(console, line)
    console.print()


def _show(console: Console, table: Table) -> None:
    """Lines that are longer than a narrow terminal go on in the next one: figures that are cut would mislead."""
    options = console.options.update(width=max(console.width, NARROWEST))
    console.print(Segments(console.render(table, options)), crop=False, end="")


def _say(console: Console, line: str, style: str = "") -> None:
    """Names of modules may hold brackets and colons, which are no markup."""
    if line:
        console.print(Text(line, style=style))


def _layers_table(result: Solution, *, wide: bool) -> Table:
    layers = [layer for layer in result.layers if layer.curve is not None]
    table = new_table(f"Layers: {len(result.ranks)} of {len(layers)} factorizable ones are factorized", wide=wide)
    table.add_column("layer", overflow="fold")
    table.add_column("kind", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    ordered = wide and any(layer.order for layer in layers)
    if ordered:
        table.add_column("order", no_wrap=True)
    for heading in ("rank", "params\nbefore", "params\nafter", "predicted\nchange", "std.\nerror"):
        table.add_column(heading, justify="right", no_wrap=True)
    places = loss_places(result) + 1
    shown = _largest_savings(layers)
    for layer in shown:
        table.add_row(
            Text(layer.name or "(the model)"),
            Text(layer.kind),
            "x".join(map(str, layer.shape)),
            *([(layer.order or "").replace("_", " ")] if ordered else []),
            f"dense/{layer.full_rank}" if layer.rank is None else f"{layer.rank}/{layer.full_rank}",
            count(layer.params_before, wide),
            count(layer.params_after, wide),
            optional(layer.predicted_change, places),
            "" if layer.predicted_error is None else unsigned(layer.predicted_error, places),
        )
    if len(shown) < len(layers):
        table.add_row(f"... and {len(layers) - len(shown)} more")
    table.add_section()
    for label, (before, after) in (
        (f"factorized ({len(result.ranks)})", factorized_params(result)),
        (f"factorizable ({len(layers)})", result.params_layers),
        ("whole model", result.params_model),
    ):
        fewer = "" if not before else f"{100 * (after / before - 1):+.1f} %"
        table.add_row(label, *[""] * (4 if ordered else 3), count(before, wide), count(after, wide), fewer)
    return table


def _largest_savings(layers: list[LayerResult]) -> list[LayerResult]:
    """The layers that save most, in the order of the model."""
    ranked = sorted(layers, key=lambda layer: layer.params_after - layer.params_before)[:MOST_LAYERS]
    chosen = {layer.name for layer in ranked}
    return [layer for layer in layers if layer.name in chosen]


def _left_alone(result: Solution) -> list[str]:
    """One line per reason, with the first names and the number of parameters."""
    groups: dict[str, list[LayerResult]] = defaultdict(list)
    for layer in result.layers:
        if layer.curve is None:
            groups[layer.reason or "no reason given"].append(layer)
    lines = []
    for reason, layers in groups.items():
        names = ", ".join(layer.name or "(the model)" for layer in layers[:MOST_NAMES])
        more = f" and {len(layers) - MOST_NAMES} more" if len(layers) > MOST_NAMES else ""
        params = sum(layer.params_before for layer in layers)
        lines.append(f"Left alone ({params:,} parameters): {names}{more}: {reason}")
    return lines


def _frontier_table(result: Solution, *, wide: bool) -> Table:
    split = f"{result.dense.samples:,} selection samples"
    table = new_table(f"Frontier: measured on {split}, > is the chosen one", wide=wide)
    table.add_column("", no_wrap=True)
    scored = result.dense.score is not None
    headings = ["params", "model\nkept %", "layers\nkept %", "predicted\nchange", "loss", "loss\nchange", "std.\nerror"]
    name = column_name(score_name(result), wide)
    headings += [name, f"{name}\nchange", "std.\nerror"] if scored else []
    for heading in headings:
        table.add_column(Text(heading), justify="right", no_wrap=True)
    places, score_places = loss_places(result), decimal_places(result.settings.score_margin)
    for row in frontier_rows(result):
        cells = [
            ">" if row["chosen"] else "",
            count(row["params_model"], wide),
            percent(row["params_model_kept"]),
            percent(row["params_layers_kept"]),
            signed(row["predicted_change"], places) + ("" if row["within_range"] else "*"),
            unsigned(row["loss"], places),
            *_change_cells(row, "loss", places),
        ]
        if scored:
            score = row["score"]
            cells += ["" if score is None else unsigned(score, score_places)]
            cells += _change_cells(row, "score", score_places)
        table.add_row(*cells)
    return table


def _frontier_note(result: Solution) -> str:
    outside = any(not point.within_range for point in result.frontier)
    return "* some rank lies outside the range in which predictions were found to hold" if outside else ""


def _change_cells(row: Row, name: str, places: int) -> tuple[str, str]:
    change, error = row[f"{name}_change"], row[f"{name}_change_error"]
    return optional(change, places), "" if error is None else unsigned(error, places)


def _choice(result: Solution) -> str:
    """How the point was chosen; an unchanged model's verdict says so itself."""
    if not result.ranks:
        return ""
    before, after = result.flops_layers
    kept = share(after, before)
    flops = "" if kept is None else f" Multiply-adds of the factorizable layers: {100 * (kept - 1):+.1f} %."
    return f"Choice: {result.message}{flops}{_measured_time(result)}"


def _measured_time(result: Solution) -> str:
    kept = None if result.latency_layers is None else share(result.latency_layers[1], result.latency_layers[0])
    return "" if kept is None else f" Their time, added up from single layers: {100 * (kept - 1):+.1f} %."


def _time(result: Solution) -> str:
    splits = ", ".join(f"{count:,} {split}" for split, count in result.samples.items())
    seconds = result.seconds.get("total")
    took = "" if seconds is None else f"Solved in {seconds:.1f} s"
    return f"{took or 'Solved'} on {splits} samples." if splits else f"{took}." if took else ""
