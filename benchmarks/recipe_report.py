"""Tables of :mod:`benchmarks.recipes`: its sections of ``RESULTS.md``, with the picture beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.recipe_figures import (
    BUDGETS,
    GOOD,
    METHODS,
    NAMES,
    Rows,
    in_points,
    is_share,
    percent_kept,
    rows_of,
    score_factor,
    score_name,
    seeds_of,
    smallest_holding,
    tested_score_name,
)
from benchmarks.recipe_picture import picture
from benchmarks.results import read_rows, write_section
from lrf_lightning.plots.style import to_png
from lrf_lightning.reports.cells import scaled

__all__ = ["write_report"]

OBJECTIVES = ("lossless", "compact")


def write_report(recipe: str, folder: Path) -> None:
    """Write the section of one recipe, and the overview and the picture of all that have rows.

    Args:
        recipe: name of the rows that were measured.
        folder: holds ``recipe_rows/`` and ``RESULTS.md``.
    """
    every = {path.stem: read_rows(path) for path in sorted((folder / "recipe_rows").glob("*.csv"))}
    every = {name: rows for name, rows in every.items() if rows}
    if recipe not in every:
        return
    results = folder / "RESULTS.md"
    (folder / "recipes.png").write_bytes(to_png(picture(every)))
    write_section(results, "Recipes", _overview(every))
    write_section(results, f"Recipe {recipe}", _section(recipe, every[recipe]))


def _overview(every: dict[str, Rows]) -> str:
    lines = [
        "`python -m benchmarks.recipes NAME` makes the rows of one recipe; each has a section below. Parameters "
        "removed from the whole model (in brackets: from the factorizable layers), and the verdict on data that took "
        "no part; one entry per seed. The frontier holds down to the last size, from the largest on, before the first "
        "that is neither `better` nor `not worse`, as sizes that are tested one after the other must.",
        "",
        "| recipe | parameters | lossless | compact | down to where the frontier holds |",
        "|---|---|---|---|---|",
    ]
    for name, rows in every.items():
        found = [[next(iter(rows_of(rows, method, seed)), None) for seed in seeds_of(rows)] for method in OBJECTIVES]
        found.append([smallest_holding(rows, "frontier", seed) for seed in seeds_of(rows)])
        before = rows[0]["params_model_before"]
        lines.append(f"| {name} | {int(before):,} | {' | '.join(map(_entries, found))} |")
    return "\n".join([*lines, "", "![recipes](recipes.png)"])


def _entries(found: Sequence[dict[str, str] | None]) -> str:
    return "; ".join("-" if row is None else f"{_removed(row)} {row['verdict']}" for row in found)


def _removed(row: dict[str, str]) -> str:
    return f"{100 - percent_kept(row):.1f} % ({100 - percent_kept(row, 'layers'):.1f} %)"


def _section(recipe: str, rows: Rows) -> str:
    first = rows[0]
    days = sorted({row["date"] for row in rows})
    samples = ", ".join(f"{int(first[f'samples_{split}']):,} {split}" for split in ("calibration", "selection"))
    lines = [
        f"`python -m benchmarks.recipes {_options(recipe, rows)} --seeds {' '.join(seeds_of(rows))}`, "
        f"{' to '.join(sorted({days[0], days[-1]}))}, "
        f"{'; '.join(sorted({row['machine'] for row in rows}))}. {samples} and "
        f"{int(first['samples_verification']):,} verification samples. {_load(rows)}",
        "",
        *_dense_table(rows),
        *_objective_table(rows),
        *_speed_table(rows),
        *_size_table(rows),
    ]
    return "\n".join(lines)


def _options(name: str, rows: Rows) -> str:
    """What ``python -m benchmarks.recipes`` was told, but for the seeds."""
    first, budgets = rows[0], _budgets(rows)
    overrides = f" --set {first['overrides']}" if first["overrides"] else ""
    shares = "" if [float(budget) for budget in budgets] in ([], list(BUDGETS)) else f" --budgets {' '.join(budgets)}"
    return first["recipe"] + overrides + (f" --as {name}" if name != first["recipe"] else "") + shares


def _budgets(rows: Rows) -> list[str]:
    return sorted({row["keep"] for row in rows if row["method"] == "frontier"}, key=float, reverse=True)


def _load(rows: Rows) -> str:
    loads = [float(row["load"]) for row in rows if row["load"]]
    return f"On average {sum(loads) / len(loads):.1f} processes wanted the machine meanwhile." if loads else ""


def _dense_table(rows: Rows) -> list[str]:
    """The original of every seed, on the verification and the test split."""
    name = score_name(rows)
    lines = [
        f"| original, seed | parameters | factorizable | loss | at its best temperature | {name} | test loss "
        f"| test {tested_score_name(rows)} | training, s | of a processor, s |",
        "|---" * 10 + "|",
    ]
    for seed in seeds_of(rows):
        row = next(row for row in rows if row["seed"] == seed)
        cells = [seed, f"{int(row['params_model_before']):,}", f"{int(row['params_layers_before']):,}"]
        cells += [_number(row[key]) for key in ("loss_dense", "loss_dense_scaled", "score_dense")]
        cells += [_number(row[key]) for key in ("test_loss_dense", "test_score_dense")]
        cells += [_number(row[key], 0) for key in ("training_seconds", "training_processor_seconds")]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _objective_table(rows: Rows) -> list[str]:
    """Lossless and compact of every seed, and both baselines at the size of ours."""
    if not any(rows_of(rows, objective) for objective in OBJECTIVES):
        return []
    name = score_name(rows) + (", points" if in_points(rows) else "")
    lines = [
        "Change on the verification split, with the one-sided 95 % bound that matters; baselines at the same share of "
        "the factorizable layers.",
        "",
        f"| seed | method | removed, model (layers) | loss | bound | at best temperature | {name} | bound | verdict "
        f"| test loss | test {tested_score_name(rows)} | FLOPs of the layers | solve, s |",
        "|---" * 13 + "|",
    ]
    for seed in seeds_of(rows):
        for objective in OBJECTIVES:
            for row in rows_of(rows, objective, seed):
                lines.append(_objective_line(row, objective))
                equal = [_equal(rows_of(rows, method, seed), row) for method in METHODS if method != "frontier"]
                lines += [_objective_line(other, f"- {other['method']}") for other in equal if other]
    return [*lines, ""]


def _equal(rows: Rows, ours: dict[str, str]) -> dict[str, str] | None:
    """The row of a baseline that was asked for the size of ours."""
    if ours["verdict"] == "unchanged":
        return None
    return next((row for row in rows if math.isclose(float(row["keep"]), float(ours["keep"]), rel_tol=1e-4)), None)


def _objective_line(row: dict[str, str], method: str) -> str:
    scaled_change = _difference(row, "loss_compressed_scaled", "loss_dense_scaled")
    factor = score_factor([row])
    cells = [
        row["seed"],
        method,
        _removed(row),
        _signed(row["loss_change"]),
        _signed(row["loss_change_upper"]),
        scaled_change,
        _signed(row["score_change"], factor),
        _signed(row["score_change_lower"], factor),
        row["verdict"],
        _difference(row, "test_loss", "test_loss_dense"),
        _difference(row, "test_score", "test_score_dense", 100.0 if is_share(tested_score_name([row])) else 1.0),
        _ratio(row, "flops_layers"),
        _number(row["solve_seconds"], 0),
    ]
    return f"| {' | '.join(cells)} |"


def _speed_table(rows: Rows) -> list[str]:
    """Latency of the original and of what the objectives chose."""
    timed = [row for row in rows if row["latency_dense/eager_batch_1"] and row["method"] in OBJECTIVES]
    if not timed:
        return []
    lines = [
        "Latency in eager PyTorch, both models in turn; above 1 is faster, with the 95 % interval of the median.",
        "",
        "| seed | method | FLOPs of the model | batch 1, dense | compressed | ratio | large batch, dense | compressed "
        "| ratio |",
        "|---" * 9 + "|",
    ]
    for row in sorted(timed, key=lambda row: int(row["seed"])):
        cells = [row["seed"], row["method"], _ratio(row, "flops_model")]
        for size in ("1", "large"):
            call = f"eager_batch_{size}"
            if not row[f"speedup/{call}"]:
                cells += ["", "", ""]
                continue
            cells += [scaled(float(row[f"latency_{which}/{call}"]), "s") for which in ("dense", "compressed")]
            ends = [f"{float(row[f'speedup/{call}_{end}']):.2f}" for end in ("lower", "upper")]
            cells.append(f"{float(row[f'speedup/{call}']):.2f} ({' to '.join(ends)})")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _size_table(rows: Rows) -> list[str]:
    """All methods at the budgets of the frontier, means over the seeds."""
    budgets = _budgets(rows)
    unit = "points" if in_points(rows) else "units"
    lines = [
        f"At equal size: change of the loss / of the {score_name(rows)} in {unit} on the verification split, means "
        "over the seeds, and how many of them are `better` or `not worse`. The last columns are about this package: "
        "the same changes on the test split as far as it was run, operations of the model, and times as fast as the "
        "original in eager mode, with the outermost ends of the seeds' 95 % intervals, which are wide where other "
        "programs ran meanwhile.",
        "",
        f"| kept of the layers | parameters of the model | {' | '.join(NAMES.get(name, name) for name in METHODS)} "
        f"| test loss / {tested_score_name(rows)} | FLOPs of the model | batch 1 | large batch |",
        "|---" * (len(METHODS) + 6) + "|",
    ]
    for budget in budgets:
        cells = [[row for row in rows if row["method"] == method and row["keep"] == budget] for method in METHODS]
        ours = cells[METHODS.index("frontier")]
        params = _mean([float(row["params_model_after"]) for row in ours])
        more = [_mean_test(ours), *_mean_cells(ours)]
        lines.append(f"| {budget} | {params:,.0f} | {' | '.join([*map(_mean_cell, cells), *more])} |")
    return [*lines, ""]


def _mean_test(rows: Rows) -> str:
    """Mean changes of the loss and of the score on the test split, where that was seen."""
    factor = 100.0 if is_share(tested_score_name(rows)) else 1.0
    means = [_mean_change(_with(rows, f"test_{kind}"), f"test_{kind}") for kind in ("loss", "score")]
    if math.isnan(means[0]):
        return "-"
    return f"{means[0]:+.4f}" + ("" if math.isnan(means[1]) else f" / {factor * means[1]:+.2f}")


def _mean_change(rows: Rows, name: str) -> float:
    return _mean([float(row[name]) - float(row[f"{name}_dense"]) for row in rows])


def _mean_cells(rows: Rows) -> list[str]:
    flops = [
        float(row["flops_model_after"]) / float(row["flops_model_before"]) for row in _with(rows, "flops_model_after")
    ]
    cells = [f"{100 * _mean(flops):.0f} %" if flops else "-"]
    for size in ("1", "large"):
        name = f"speedup/eager_batch_{size}"
        ratios = [math.log(float(row[name])) for row in _with(rows, name)]
        ends = [float(row[f"{name}_{end}"]) for row in _with(rows, name) for end in ("lower", "upper")]
        cells.append(f"{math.exp(_mean(ratios)):.2f} ({min(ends):.2f} to {max(ends):.2f})" if ratios else "-")
    return cells


def _with(rows: Rows, name: str) -> Rows:
    return [row for row in rows if row[name]]


def _mean_cell(rows: Rows) -> str:
    if not rows:
        return "-"
    text = f"{_mean([float(row['loss_change']) for row in rows]):+.4f}"
    if rows[0]["score_change"]:
        text += f" / {score_factor(rows) * _mean([float(row['score_change']) for row in rows]):+.2f}"
    good = sum(row["verdict"] in GOOD for row in rows)
    return f"{text} ({good} of {len(rows)})"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _number(text: str, places: int = 4) -> str:
    return f"{float(text):.{places}f}" if text else "-"


def _signed(text: str, factor: float = 1.0) -> str:
    return f"{factor * float(text):+.{4 if factor == 1 else 2}f}" if text else "-"


def _difference(row: dict[str, str], after: str, before: str, factor: float = 1.0) -> str:
    return _signed(str(float(row[after]) - float(row[before])), factor) if row[after] and row[before] else "-"


def _ratio(row: dict[str, str], name: str) -> str:
    before, after = row[f"{name}_before"], row[f"{name}_after"]
    return f"{100 * float(after) / float(before):.0f} %" if before and after else "-"
