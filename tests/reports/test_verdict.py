import dataclasses
import math

import pytest
from tiny_result import tiny_result, with_certificate

from lrf_lightning.reports.verdict import decimals, score_name, signed, temperature_sentence, verdict_sentence
from lrf_lightning.solver.result import Interval, Measurement


def example(verdict, **certificate):
    """The sentence's example: 196,906 parameters, 270 verification samples."""
    changes = {
        "verdict": verdict,
        "dense": Measurement(270, 0.25, 0.96),
        "compressed": Measurement(270, 0.2488, 0.96),
        "loss_change": Interval(-0.0012, 0.0026, -0.0055, 0.0031, 270, "student"),
        "score_change": Interval(0.0, 0.0, -0.0031, 0.0031, 270, "tango"),
        "loss_margin": 0.005,
        "score_margin": 0.005,
        "confidence": 0.95,
        "samples_needed": None,
    }
    result = dataclasses.replace(tiny_result(), params_model=(196_906, 112_040), params_layers=(180_000, 88_200))
    return with_certificate(result, **{**changes, **certificate})


def test_not_worse_says_what_was_gained_what_it_cost_and_the_margins():
    assert verdict_sentence(example("not worse")) == (
        "Not worse: the compressed model has 43.1 % fewer parameters (112,040 of 196,906; 51.0 % fewer in the "
        "factorizable layers). On 270 verification samples its loss changed by -0.0012 (95 % bound +0.0031, margin "
        "0.0050) and its score by +0.00 points (bound -0.31, margin 0.50)."
    )


def test_inconclusive_says_how_many_samples_would_decide():
    sentence = verdict_sentence(example("inconclusive", samples_needed=1234))
    assert sentence.startswith("Inconclusive: ")
    assert "270 verification samples are too few to tell" in sentence
    assert sentence.endswith("About 1,234 samples would be expected to decide it.")
    assert "would be expected" not in verdict_sentence(example("inconclusive", samples_needed=None))


def test_worse_shows_the_bound_that_lies_outside_of_the_margin():
    loss = Interval(0.03, 0.005, 0.0215, 0.0385, 270, "student")
    sentence = verdict_sentence(example("worse", loss_change=loss))
    assert sentence.startswith("Worse: ")
    assert "by +0.0300 (95 % bound +0.0215, margin 0.0050)" in sentence
    score = Interval(-0.02, 0.004, -0.027, -0.013, 270, "tango")
    assert "by -2.00 points (bound -1.30, margin 0.50)" in verdict_sentence(example("worse", score_change=score))


def test_pairs_of_the_score_that_differ_from_those_of_the_loss_are_told():
    score = Interval(0.0021, 0.001, 0.0004, 0.0038, 9, "mean")
    sentence = verdict_sentence(example("not worse", score_change=score))
    assert "(bound +0.0004, margin 0.0050; compared in 9 batches)" in sentence
    loss = Interval(-0.0012, 0.0026, -0.0055, 0.0031, 9, "mean")
    sentence = verdict_sentence(example("not worse", loss_change=loss))
    assert "On 270 verification samples (compared in 9 batches) its loss" in sentence
    assert "margin 0.50; compared sample by sample)" in sentence


def test_there_are_digits_enough_to_see_why():
    loss = Interval(-0.0000395, 0.0000044, -0.000052, -0.0000228, 3, "mean")
    assert "by -0.00004 (95 % bound -0.00002, margin 0.00500)" in verdict_sentence(example("better", loss_change=loss))
    loss = Interval(0.0112, 0.0033, 0.005004, 0.0174, 270, "student")
    assert "(95 % bound +0.005004, margin 0.005000)" in verdict_sentence(example("worse", loss_change=loss))
    score = Interval(-0.001, 0.001, -0.00499, 0.003, 270, "tango")
    assert "(bound -0.499, margin 0.500)" in verdict_sentence(example("not worse", score_change=score))
    loss = Interval(math.nan, math.nan, math.nan, math.nan, 270, "student")
    assert "by nan (95 % bound nan, margin 0.0050)" in verdict_sentence(example("worse", loss_change=loss))


@pytest.mark.parametrize("verdict", ["better", "not worse", "worse", "inconclusive"])
def test_no_sentence_calls_the_model_lossless(verdict):
    result = example(verdict)
    result = dataclasses.replace(result, settings=dataclasses.replace(result.settings, objective="lossless"))
    sentence = verdict_sentence(result)
    assert "lossless" not in sentence.lower()
    assert sentence.lower().startswith(verdict)


def test_unchanged_says_why():
    result = dataclasses.replace(example("unchanged"), ranks={}, message="No layer can be factorized: too small.")
    expected = "Unchanged: nothing was compressed. No layer can be factorized: too small."
    assert verdict_sentence(result) == expected


def test_a_result_without_certificate_has_no_verdict():
    sentence = verdict_sentence(dataclasses.replace(tiny_result(), certificate=None))
    assert sentence.startswith("No verdict: the compressed model has ")
    assert "not compared" in sentence


def test_a_score_that_is_no_share_of_samples_keeps_its_unit():
    score = Interval(0.0021, 0.001, 0.0004, 0.0038, 270, "student")
    assert "its score by +0.0021 (bound +0.0004, margin 0.0050)" in verdict_sentence(
        example("not worse", score_change=score)
    )


def test_batches_are_named_where_they_are_the_pairs():
    loss = Interval(-0.0012, 0.0026, -0.0055, 0.0031, 9, "student")
    assert "On 270 verification samples (compared in 9 batches) its loss" in verdict_sentence(
        example("not worse", loss_change=loss)
    )


def test_values_that_are_not_finite_are_written_out():
    loss = Interval(math.nan, math.inf, -math.inf, math.inf, 270, "student")
    sentence = verdict_sentence(example("worse", loss_change=loss, score_change=None))
    assert "its loss changed by nan (95 % bound +inf, margin 0.0050)" in sentence


def test_temperature_tells_when_only_the_confidence_changed():
    softer = example(
        "better",
        loss_change=Interval(-0.01, 0.002, -0.014, -0.006, 270, "mean"),
        scaled_dense_loss=0.24,
        temperature=1.5,
        scaled_compressed_loss=0.245,
    ).certificate
    sentence = temperature_sentence(softer)
    assert "the original's loss is 0.2400 (temperature 1.50, fitted on the selection split)" in sentence
    assert sentence.endswith("less confident predictions, not from better ones.")
    sharper = temperature_sentence(dataclasses.replace(softer, temperature=0.5))
    assert sharper.endswith("more confident predictions, not from better ones.")
    not_lower = dataclasses.replace(softer, loss_change=Interval(-0.001, 0.002, -0.005, 0.003, 270, "mean"))
    assert temperature_sentence(not_lower).endswith("the compressed model's 0.2450.")
    better = dataclasses.replace(softer, scaled_compressed_loss=0.23)
    assert temperature_sentence(better).endswith("the compressed model's 0.2300.")
    assert temperature_sentence(dataclasses.replace(softer, scaled_dense_loss=None)) == ""
    none = dataclasses.replace(softer, scaled_dense_loss=None, no_temperature="it falls with ever more confidence")
    assert temperature_sentence(none).endswith("no best temperature to compare at: it falls with ever more confidence.")


@pytest.mark.parametrize(("scale", "places"), [(0.005, 4), (0.011, 3), (0.5, 2), (24.0, 0), (1e-12, 8), (0.0, 4)])
def test_decimals_show_two_digits_of_the_scale(scale, places):
    assert decimals(scale) == places


def test_signed_has_no_negative_zero():
    assert [signed(value, 2) for value in (-0.001, 0.0, 1.0, -1.0)] == ["+0.00", "+0.00", "+1.00", "-1.00"]


def test_the_score_is_called_accuracy_only_if_the_result_says_so():
    result = example("not worse")
    assert score_name(result) == "score"
    assert score_name(dataclasses.replace(result, score_name="accuracy")) == "accuracy"
