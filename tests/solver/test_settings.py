"""Every setting is checked when the record is built, with a message that says what is allowed."""

import dataclasses
import math

import pytest

from lrf_lightning.solver.settings import Settings


def test_defaults_are_those_of_the_documentation():
    settings = Settings()
    assert (settings.objective, settings.metric, settings.cost) == ("lossless", "fisher", "params")
    assert settings.loss_margin is None
    assert settings.score_margin == 0.005
    assert settings.confidence == 0.95


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("objective", "losless", "objective='losless' is unknown, allowed are .*; did you mean 'lossless'"),
        ("objective", "compress", "objective='compress' is unknown, allowed are 'lossless', 'compact', 'budget'"),
        ("metric", "Fisher", "metric='Fisher' is unknown.*; did you mean 'fisher'"),
        ("metric", None, "metric=None is unknown"),
        (
            "cost",
            "latncy",
            "cost='latncy' is unknown, allowed are 'params', 'flops', 'latency'; did you mean 'latency'",
        ),
        ("variant", "small", "variant='small' is unknown, allowed are 'lossless', 'compact'"),
        ("gamma_kind", "relativ", "gamma_kind='relativ' is unknown.*; did you mean 'relative'"),
    ],
)
def test_choices_name_the_nearest_valid_one(name, value, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{name: value})


@pytest.mark.parametrize(
    ("name", "bad", "allowed", "good"),
    [
        ("keep", [0, 1.01, -0.5], r"\(0, 1\]", [1e-3, 1]),
        ("confidence", [0.5, 1, 95], r"\(0.5, 1\)", [0.51, 0.999]),
        ("gamma", [0, 1.5], r"\(0, 1\]", [1e-6, 1]),
        ("range_factor", [0.99], r"\[1, inf\)", [1, 50]),
        ("loss_margin", [-1e-3], r"\[0, inf\)", [0, 0.1, None]),
        ("tolerance", [-1e-3], r"\[0, inf\)", [0, 1]),
        ("score_tolerance", [-1e-3], r"\[0, inf\)", [0, 1]),
        ("ties", [-1], r"\[0, inf\)", [0, 2]),
        ("score_margin", [-0.1], r"\[0, inf\)", [0, 0.1]),
        ("damping", [-1e-9], r"\[0, inf\)", [0, 1]),
        ("first_order_errors", [-1], r"\[0, inf\)", [0, 3]),
    ],
)
def test_numbers_stay_in_their_range(name, bad, allowed, good):
    for value in [*bad, math.nan, math.inf, "0.5", True]:
        with pytest.raises(ValueError, match=f"{name}={value!r} is not a number in {allowed}"):
            Settings(**{name: value})
    for value in good:
        assert getattr(Settings(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("points", 2),
        ("rows_per_feature", 1),
        ("rank_multiple", 1),
        ("refinements", 0),
        ("min_params", 0),
        ("seed", 0),
    ],
)
def test_counts_are_whole(name, least):
    for value in (least - 1, 2.5, "3", True, *([] if name == "rank_multiple" else [None])):
        with pytest.raises(ValueError, match=f"{name}={value!r} is not a whole number of at least {least}"):
            Settings(**{name: value})
    assert getattr(Settings(**{name: least}), name) == least


def test_a_mean_square_has_no_natural_upper_limit():
    assert Settings(gamma=5.0, gamma_kind="mean_square").gamma == 5.0
    with pytest.raises(ValueError, match=r"gamma=0 is not a number in \(0, inf\)"):
        Settings(gamma=0, gamma_kind="mean_square")


@pytest.mark.parametrize("name", ["include", "exclude", "types", "exclude_types"])
def test_patterns_become_tuples(name):
    assert getattr(Settings(**{name: "head"}), name) == ("head",)
    assert getattr(Settings(**{name: ["a.*", "b"]}), name) == ("a.*", "b")
    for value in (3, ["a", 1], None):
        with pytest.raises(ValueError, match=f"{name}=.* is not a list of patterns such as"):
            Settings(**{name: value})


@pytest.mark.parametrize("name", ["compensation", "frozen"])
def test_switches_are_booleans(name):
    with pytest.raises(ValueError, match=f"{name}=1 is neither True nor False"):
        Settings(**{name: 1})
    assert getattr(Settings(**{name: False}), name) is False


def test_a_predicate_is_callable():
    with pytest.raises(ValueError, match="predicate='head' is no callable"):
        Settings(predicate="head")
    assert Settings(predicate=bool).predicate is bool


def test_settings_are_frozen_and_by_keyword():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().keep = 0.3
    with pytest.raises(TypeError, match="positional"):
        Settings("lossless")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"keep": 0.3}, "keep=0.3 has no effect with objective='lossless', only with 'budget'"),
        ({"keep": 0.3, "objective": "budget"}, None),
        ({"budgets": (0.4,), "objective": "budget"}, "budgets=(0.4,) has no effect"),
        ({"budgets": (0.4,), "objective": "frontier"}, None),
        ({"gamma": 0.2, "objective": "compact"}, "gamma=0.2 has no effect"),
        ({"keep": 0.5, "gamma": 0.1}, None),
    ],
)
def test_settings_that_the_objective_does_not_look_at_are_told(given, told):
    found = Settings(**given).without_effect
    assert len(found) == (told is not None)
    assert all(sentence.startswith(told) for sentence in found)
