"""One table and one picture of a finished sweep: ``python -m lrf_lightning.sweeps FOLDER``.

FOLDER is that of a Hydra multirun, with one folder per job. What every job was asked for is read from its
``.hydra/overrides.yaml``, and what it found from the ``summary.csv`` and ``frontier.csv`` of the compression, wherever
they lie below it. ``sweep.csv`` and ``sweep.png`` are written into FOLDER. The table
is about the model that each job chose; the picture shows all budgets of a job with ``objective=frontier``.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lrf_lightning.reports.cells import count
from lrf_lightning.reports.tables import Row, write_csv

__all__ = ["main", "sweep_rows", "write_sweep"]

FIGURES = (
    "params_model_after",
    "params_model_kept",
    "flops_layers_kept",
    "selection_loss",
    "selection_score",
    "loss_dense",
    "loss_change",
    "loss_change_upper",
    "score_dense",
    "score_change",
    "score_change_lower",
    "not_worse",
    "solve_seconds",
)

WIDE = 100
LONGEST_SETTING = 20


def write_sweep(folder: str | PathLike[str], *, console: Console | None = None) -> list[Row]:
    """Collect a sweep: print a table, write ``sweep.csv`` and ``sweep.png``, and return the rows of the table.

    Raises:
        ValueError: if the folder holds no job of a multirun.
        OSError: if the files cannot be written.
    """
    from lrf_lightning.plots.style import to_png
    from lrf_lightning.sweeps.plot import sweep_figure

    folder = Path(folder)
    rows = sweep_rows(folder)
    if not rows:
        raise ValueError(f"{os.fspath(folder)!r} holds no jobs of a multirun, that is, no */.hydra/overrides.yaml")
    write_csv(folder / "sweep.csv", rows)
    _print(rows, console or Console())
    figure = sweep_figure(rows, _settings(rows), {row["job"]: _budgets(folder / row["job"]) for row in rows})
    if figure is not None:
        (folder / "sweep.png").write_bytes(to_png(figure))
    return rows


def sweep_rows(folder: str | PathLike[str]) -> list[Row]:
    """One row per job: its name, the overrides that differ between jobs, and the figures of its chosen model.

    A job without a result has the verdict ``no result``; what is unknown is None. ``pareto`` tells the jobs that no
    other one beats in parameters and in loss and score on the selection split.
    """
    folder = Path(folder)
    jobs = sorted((path.parent.parent for path in folder.glob("*/.hydra/overrides.yaml")), key=_order)
    asked = {job: _overrides(job) for job in jobs}
    names = [name for name in dict.fromkeys(n for given in asked.values() for n in given) if _differs(name, asked)]
    rows = [{"job": job.name, **{name: asked[job].get(name, "") for name in names}, **_found(job)} for job in jobs]
    for row in rows:
        row["pareto"] = row["params_model_after"] is not None and not any(_beats(other, row) for other in rows)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m lrf_lightning.sweeps", description=__doc__)
    parser.add_argument("folder", help="folder of a Hydra multirun, such as multirun/2030-01-31_12-00-00")
    options = parser.parse_args(arguments)
    try:
        write_sweep(options.folder)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _order(job: Path) -> tuple[bool, int, str]:
    return (not job.name.isdigit(), int(job.name) if job.name.isdigit() else 0, job.name)


def _overrides(job: Path) -> dict[str, str]:
    from omegaconf import OmegaConf

    lines: Any = OmegaConf.load(job / ".hydra" / "overrides.yaml")
    pairs = (str(line).lstrip("+~").partition("=") for line in lines or ())
    return {name: value for name, _, value in pairs}


def _differs(name: str, asked: Mapping[Path, Mapping[str, str]]) -> bool:
    return len({given.get(name) for given in asked.values()}) > 1


def _found(job: Path) -> Row:
    """The figures of a job under their names without the prefix ``compress/``."""
    values = {row["name"]: row["value"] for path in _files(job, "summary.csv") for row in _read(path)}
    figures: Row = {name: _number(values.get(f"compress/{name}")) for name in FIGURES}
    return {**figures, "verdict": values.get("compress/verdict", "no result")}


def _budgets(job: Path) -> list[Row]:
    """The points of a job with many budgets; empty for others."""
    points = [row for path in _files(job, "frontier.csv") for row in _read(path) if row.get("budget")]
    return [{**point, **{name: _number(point[name]) for name in BUDGET_FIGURES}} for point in points]


BUDGET_FIGURES = (
    "params_model_kept",
    "verification_loss_change",
    "verification_loss_upper",
    "verification_score_change",
    "verification_score_lower",
)


def _files(job: Path, name: str) -> list[Path]:
    return [path for path in sorted(job.rglob(name)) if (path.parent / "layers.csv").is_file()][:1]


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _settings(rows: Sequence[Row]) -> list[str]:
    """The columns with overrides, which stand between the job and the figures."""
    names = list(rows[0])
    return names[1 : names.index(FIGURES[0])]


def _beats(one: Row, other: Row) -> bool:
    """Whether a job is at least as good in parameters, loss and score, and better in one of them."""
    pairs = [
        (sign * one[name], sign * other[name])
        for name, sign in (("params_model_after", 1), ("selection_loss", 1), ("selection_score", -1))
        if one[name] is not None and other[name] is not None
    ]
    known = one["params_model_after"] is not None and one["selection_loss"] is not None
    return known and all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def _print(rows: Sequence[Row], console: Console) -> None:
    settings = _settings(rows)
    short = _short(settings)
    table = Table(
        title=f"Sweep: {len(rows)} jobs, * no other job beats it on the selection split",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title_justify="left",
    )
    # the verdict heeds the score as well
    scored = console.width >= WIDE and any(row["score_change"] is not None for row in rows)
    table.add_column("job", justify="right", no_wrap=True)
    for name in settings:
        table.add_column(Text(short[name]), justify="right", overflow="fold", min_width=6)  # brackets are no markup
    headings = ["params", "kept %", "loss\nchange", "upper\nbound"]
    for heading in headings + (["score\nchange", "lower\nbound"] if scored else []):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for row in rows:
        scores = [_signed(row["score_change"]), _signed(row["score_change_lower"])] if scored else []
        kept, params = row["params_model_kept"], row["params_model_after"]
        table.add_row(
            row["job"] + ("*" if row["pareto"] else " "),
            *(Text(_setting(row[name])) for name in settings),
            "" if params is None else count(int(params), console.width >= WIDE),
            "" if kept is None else f"{100 * kept:.1f}",
            _signed(row["loss_change"]),
            _signed(row["loss_change_upper"]),
            *scores,
            row["verdict"],
        )
    console.print(table)


def _short(names: Sequence[str]) -> dict[str, str]:
    """Names without the part that all of them share, such as ``keep`` for ``callbacks.compress.keep``."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[name.rpartition(".")[2]].append(name)
    return {name: last if len(group) == 1 else name for last, group in groups.items() for name in group}


def _setting(text: str) -> str:
    """A value as it was given, but a number that a sampler drew with four digits."""
    number = _number(text)
    shown = text if number is None or len(text) <= 6 else f"{number:.4g}"
    return shown if len(shown) <= LONGEST_SETTING else f"{shown[: LONGEST_SETTING - 2]}.."


def _signed(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:+.4f}"


if __name__ == "__main__":
    main()
