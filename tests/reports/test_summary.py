import dataclasses
import math
import re

import pytest
from tiny_result import budgets_result, tiny_result, with_certificate

from lrf_lightning.reports import summary as module
from lrf_lightning.reports.summary import summary
from lrf_lightning.solver.result import Interval


def test_figures_are_those_of_the_result():
    result, figures = tiny_result(), summary(tiny_result())
    assert all(type(value) is float for value in figures.values())
    assert all(name.startswith("compress/") for name in figures)
    assert figures["compress/params_model_kept"] == result.params_model[1] / result.params_model[0]
    chosen = [layer for layer in result.layers if layer.rank is not None]
    kept = sum(layer.params_after for layer in chosen) / sum(layer.params_before for layer in chosen)
    assert figures["compress/params_factorized_kept"] == kept
    assert figures["compress/layers_factorized"] == 2
    assert figures["compress/layers_dense"] == 1
    assert figures["compress/layers_left_alone"] == 1
    assert figures["compress/loss_change_upper"] == result.certificate.loss_change.upper
    assert figures["compress/score_margin"] == result.certificate.score_margin
    assert figures["compress/samples_verification"] == result.certificate.dense.samples
    assert figures["compress/solve_seconds"] == result.seconds["total"]
    assert figures["compress/seconds/perturbation_range"] == result.seconds["perturbation range"]


def test_every_name_is_documented():
    """The table names a figure in full, or by the stem of the figure above it."""
    text = module.__doc__
    stems = set(re.findall(r"``(?:compress/)?([a-z_]+)``", text))
    suffixes = tuple(stem for stem in stems if stem.startswith("_"))
    for name in summary(budgets_result()):
        short = name.removeprefix("compress/")
        known = short in stems or any(short == stem.rsplit(suffix, 1)[0] for stem in stems for suffix in suffixes)
        by_suffix = any(short.endswith(s) and any(t.startswith(short[: -len(s)]) for t in stems) for s in suffixes)
        family = short.split("/")[0]
        assert known or by_suffix or ("/" in short and f"{family}/<" in text), name


@pytest.mark.parametrize(
    ("verdict", "holds", "unchanged"),
    [("better", 1, 0), ("not worse", 1, 0), ("worse", 0, 0), ("inconclusive", 0, 0), ("unchanged", 0, 1)],
)
def test_the_verdict_becomes_two_numbers(verdict, holds, unchanged):
    figures = summary(with_certificate(tiny_result(), verdict=verdict))
    assert (figures["compress/not_worse"], figures["compress/unchanged"]) == (holds, unchanged)


def test_the_samples_that_would_decide_are_there_only_where_that_is_open():
    figures = summary(with_certificate(tiny_result(), verdict="inconclusive", samples_needed=1234))
    assert figures["compress/samples_needed"] == 1234
    assert "compress/samples_needed" not in summary(with_certificate(tiny_result(), samples_needed=None))


def test_what_is_unknown_is_missing_and_what_is_infinite_stays():
    result = with_certificate(
        tiny_result(), score_change=None, loss_change=Interval(math.nan, math.inf, -math.inf, math.inf, 1, "student")
    )
    figures = summary(dataclasses.replace(result, flops_layers=(0, 0)))
    assert not any(name.startswith(("compress/score_change", "compress/flops_layers")) for name in figures)
    assert math.isnan(figures["compress/loss_change"])
    assert figures["compress/loss_change_upper"] == math.inf
    assert "compress/loss_dense" not in summary(dataclasses.replace(result, certificate=None))


def test_a_frontier_adds_its_knee_and_how_far_down_the_verdicts_hold():
    result = budgets_result()
    figures = summary(result)
    assert figures["compress/knee_params_model_kept"] == pytest.approx(0.2, abs=1e-3)
    assert figures["compress/holds_params_model_kept"] == pytest.approx(0.5, abs=1e-3)
    assert figures["compress/selection_loss"] == result.frontier[1].loss
    assert figures["compress/selection_score"] == result.frontier[1].score


def test_an_unchanged_model_has_the_selection_figures_of_the_original():
    result = tiny_result()
    figures = summary(dataclasses.replace(result, ranks={}, frontier=[]))
    assert figures["compress/selection_loss"] == result.dense.loss
    assert not [name for name in figures if "knee" in name or "holds" in name]
