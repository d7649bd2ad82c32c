"""Front, knee and joint verdicts against hand-made points."""

import pytest

from lrf_lightning.solver.points.pareto import holding, knee, marked, original_on_front, pareto_front
from lrf_lightning.solver.result import Certificate, FrontierPoint, Interval, Measurement

DENSE = Measurement(100, 1.0, 0.9)


def point(keep, loss, score=0.9, verdict=None):
    certificate = None
    if verdict is not None:
        change = Interval(0.0, 0.0, 0.0, 0.0, 10, "mean")
        certificate = Certificate(verdict, DENSE, DENSE, change, None, 0.1, 0.1, 0.95)
    return FrontierPoint(
        keep, {"a": 1}, round(1000 * keep), 0, 0, 0.0, 0.0, loss, loss - 1.0, 0.0, score, score - 0.9, 0.0,
        certificate=certificate,
    )  # fmt: skip


def test_a_point_is_on_the_front_unless_another_is_as_good_in_all_and_better_in_one():
    best, beaten, smaller = point(0.5, 0.9), point(0.8, 0.95), point(0.3, 1.2)
    assert pareto_front([beaten, best, smaller], DENSE, 1000) == [best, smaller]
    # a better score keeps it there, equal figures do not beat each other
    scored, twin = point(0.8, 0.95, score=0.95), point(0.5, 0.9)
    assert pareto_front([scored, best, twin], DENSE, 1000) == [scored, best, twin]


def test_the_original_beats_a_point_only_in_what_it_keeps_itself():
    assert pareto_front([point(1.0, 1.1), point(0.9, 1.1)], DENSE, 1000) == [point(0.9, 1.1)]
    assert original_on_front([point(0.9, 1.1)], DENSE, 1000)
    assert not original_on_front([point(0.9, 1.0)], DENSE, 1000)


def test_infinite_losses_and_models_that_grew_are_never_on_the_front():
    assert pareto_front([point(0.5, float("inf")), point(0.4, float("nan"))], DENSE, 1000) == []
    assert pareto_front([point(0.9, 0.5)], DENSE, 899) == []
    assert original_on_front([point(0.9, 0.5)], DENSE, 899)


def test_the_knee_is_where_the_chord_is_farthest():
    # flat down to 0.4, steep below: loss rises by 0.1 over six tenths and by 0.9 over three
    points = [point(0.9, 1.01), point(0.6, 1.05), point(0.4, 1.1), point(0.2, 1.6), point(0.1, 2.0)]
    assert knee(points) is points[2]
    assert knee(list(reversed(points))) is points[2]


@pytest.mark.parametrize(
    "points",
    [[], [point(0.5, 1.1)], [point(0.8, 0.95), point(0.5, 0.9)], [point(0.9, 1.6), point(0.5, 2.0)]],
)
def test_no_knee(points):
    """Too few points, the smallest is the best, or the front bends the other way."""
    assert knee(points) is None


def test_marks():
    points = [point(0.9, 1.01), point(0.7, 1.3), point(0.4, 1.1), point(0.1, 2.0)]
    found = marked(points, DENSE, 1000, points[0])
    assert [p.chosen for p in found] == [True, False, False, False]
    assert [p.pareto for p in found] == [True, False, True, True]
    assert [p.knee for p in found] == [False, False, True, False]


def test_verdicts_hold_together_down_to_the_first_that_is_not_favourable():
    verdicts = ["better", "not worse", "inconclusive", "better", "worse"]
    points = [point(0.9 - 0.1 * i, 1.0, verdict=verdict) for i, verdict in enumerate(verdicts)]
    assert holding(list(reversed(points))) == points[:2]
    assert holding([point(0.9, 1.0)]) == []
