import dataclasses
import io
import math
import re

import pytest
from rich.console import Console
from tiny_result import budgets_result, frontier_result, tiny_result, with_certificate, with_layers

from lrf_lightning.reports.report import print_report
from lrf_lightning.reports.verdict import verdict_sentence


def report(result, width=120, encoding="utf-8"):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    print_report(result, console=Console(file=stream, width=width))
    stream.flush()
    return raw.getvalue().decode(encoding)


def joined(text):
    """Without line breaks and repeated spaces."""
    return " ".join(text.split())


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("result", [frontier_result, lambda: with_layers(frontier_result(), 60)])
def test_lines_fit_and_nothing_is_cut(result, width):
    result = result()
    text = report(result, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "\x1b" not in text
    assert verdict_sentence(result) in joined(text)
    lines = text.splitlines()
    width_of_names = next(line.index("kind") for line in lines if line.strip().startswith("layer "))
    first_column = "".join(line[:width_of_names].strip() for line in lines)  # long names are folded
    assert all(layer.name in first_column for layer in result.layers if layer.curve is not None)


@pytest.mark.parametrize("result", [frontier_result, budgets_result])
def test_tables_are_not_cut_on_a_narrow_terminal(result):
    narrow, usual = report(result(), 50), report(result(), 78)
    assert "\u2026" not in narrow.split("\n", 2)[2], "but in the heading"
    rows = [line.split() for line in usual.splitlines() if re.match(r" *>K? +[0-9]", line)]
    assert rows
    assert all(row in [line.split() for line in narrow.splitlines()] for row in rows)


def test_the_layers_table_holds_the_figures_of_every_layer():
    result = tiny_result()
    lines = report(result).splitlines()
    for layer in result.layers:
        if layer.curve is None:
            continue
        line = next(line for line in lines if line.strip().startswith(f"{layer.name} "))
        order = (layer.order or "").replace("_", " ")
        assert order in line
        cells = line.replace(order, "").split()
        rank = "dense" if layer.rank is None else str(layer.rank)
        assert cells[1:4] == [layer.kind, "x".join(map(str, layer.shape)), f"{rank}/{layer.full_rank}"]
        assert cells[4:6] == [f"{layer.params_before:,}", f"{layer.params_after:,}"]
        if layer.rank is not None:
            assert float(cells[6]) == pytest.approx(layer.predicted_change, abs=1e-5)
            assert float(cells[7]) == pytest.approx(layer.predicted_error, abs=1e-5)
        else:
            assert len(cells) == 6


def test_a_wide_report_names_the_order_of_the_factors_of_convolutions():
    result = tiny_result()
    assert {layer.order for layer in result.layers} == {"spatial_split", None}
    assert report(result).count("spatial split") == 1
    assert "spatial" not in report(result, 80)
    linear = [dataclasses.replace(layer, order=None) for layer in result.layers]
    assert " order " in report(result)
    assert " order " not in report(dataclasses.replace(result, layers=linear))


def test_parameters_are_given_for_the_model_and_for_the_factorized_layers():
    result = tiny_result()
    text = joined(report(result))
    before, after = result.params_model
    assert f"whole model {before:,} {after:,} {100 * (after / before - 1):+.1f} %" in text
    chosen = [layer for layer in result.layers if layer.rank is not None]
    dense, low = sum(layer.params_before for layer in chosen), sum(layer.params_after for layer in chosen)
    assert f"factorized ({len(chosen)}) {dense:,} {low:,} {100 * (low / dense - 1):+.1f} %" in text


def test_the_frontier_marks_the_chosen_point_and_those_outside_the_range():
    text = report(frontier_result())
    marked = [line for line in text.splitlines() if line.startswith(" > ")]
    assert len(marked) == 1
    assert marked[0].split()[2] == "50.0"
    starred = [line.split()[1] for line in text.splitlines() if "*" in line.strip()[1:]]
    assert starred == ["20.0", "10.0"]
    assert "* some rank lies outside" in text


def test_layers_left_alone_are_summed_up_by_reason():
    result = tiny_result()
    (alone,) = [layer for layer in result.layers if layer.reason]
    many = [dataclasses.replace(alone, name=f"stem{i}", reason="a reason") for i in range(10)]
    other = dataclasses.replace(alone, reason="another one")
    text = report(dataclasses.replace(result, layers=[*result.layers[:-1], *many, other]))
    assert "Left alone (720 parameters): stem0, stem1, stem2, stem3 and 6 more: a reason" in text
    assert "Left alone (72 parameters): stem: another one" in text


def test_very_many_layers_are_cut_to_those_that_save_most():
    result = with_layers(tiny_result(), 300)
    saved = [layer.params_before - layer.params_after for layer in result.layers]
    best = result.layers[saved.index(max(saved))].name
    text = report(result, 200)
    assert f" {best} " in text
    assert "... and 220 more" in text
    assert sum(line.strip().startswith("backbone.") for line in text.splitlines()) == 80


def test_an_unchanged_model_is_said_to_be_unchanged():
    result = dataclasses.replace(
        with_certificate(tiny_result(), verdict="unchanged"), ranks={}, layers=[], frontier=[], message="No layer."
    )
    text = report(result)
    assert "Unchanged: nothing was compressed. No layer." in text
    assert "Choice" not in text
    assert "params" not in text


@pytest.mark.parametrize("name", ["[red]net[/red]", "a[0].b", ":smile:"])
def test_names_are_no_markup(name):
    result = tiny_result()
    layers = [dataclasses.replace(result.layers[0], name=name), *result.layers[1:]]
    assert name in report(dataclasses.replace(result, layers=layers))


def test_values_that_are_not_finite_are_printed():
    result = frontier_result()
    layers = [dataclasses.replace(result.layers[0], predicted_change=math.nan, predicted_error=math.inf)]
    points = [dataclasses.replace(result.frontier[0], loss=math.inf, loss_change=math.inf, loss_change_error=math.nan)]
    result = dataclasses.replace(result, layers=[*layers, *result.layers[1:]], frontier=points)
    text = joined(report(result))
    assert "nan inf" in text
    assert "inf +inf nan" in text


def test_a_missing_certificate_is_no_obstacle():
    assert "No verdict" in report(dataclasses.replace(tiny_result(), certificate=None))


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_the_report_can_be_piped_into_old_encodings(encoding):
    text = report(frontier_result(), 80, encoding)
    assert "whole model" in text


def test_the_report_goes_to_standard_output(capsys):
    print_report(tiny_result())
    captured = capsys.readouterr()
    assert "whole model" in captured.out
    assert captured.err == ""


@pytest.mark.parametrize("width", [80, 120])
def test_budgets_have_one_table_with_marks_and_verdicts(width):
    result = budgets_result()
    text = report(result, width)
    assert max(map(len, text.splitlines())) <= width
    assert "Layers:" not in text
    assert "Frontier:" not in text
    rows = [line.split() for line in text.splitlines()]
    assert [row[0] for row in rows if row[1:2] == ["60.0"]] == [">"]
    assert [row[0] for row in rows if row[1:2] == ["20.0"]] == ["K"]
    assert [row[0] for row in rows if row[1:2] == ["40.0"]] == ["-"]
    verdicts = [row[-1] for row in rows if row[-1:] in (["better"], ["worse"], ["inconclusive"], ["original"])]
    assert verdicts == ["original", "better", "worse", "inconclusive", "worse", "worse"]
    assert "verdicts from the top down to 50.0 % of the parameters hold together with 95 % confidence" in joined(text)
    assert "its accuracy by" in joined(text)


def test_without_favourable_verdicts_at_the_top_none_hold_together():
    result = budgets_result()
    assert "Each verdict holds by itself" in joined(report(dataclasses.replace(result, frontier=result.frontier[2:])))
