import pytest

from lrf_lightning.callbacks.clock import Clock


class Time:
    """Seconds that pass only when they are told to."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds

    def work(self, seconds):
        return lambda: setattr(self, "seconds", self.seconds + seconds)


def test_work_is_due_while_it_stays_within_its_share():
    now = Time()
    clock = Clock({"a": 0.1, "b": 0.01}, {"a": 1.0, "b": 1.0}, now=now)
    assert clock.due(["a", "b"]) == []
    now.seconds += 10
    assert clock.due(["a", "b"]) == ["a"]
    clock.run("a", now.work(2))
    assert (clock.spent, clock.elapsed, clock.share) == (2, 10, 0.2)
    now.seconds += 29
    assert clock.due(["a"]) == [], "it takes as long as the last time"
    now.seconds += 1
    assert clock.due(["a"]) == ["a"]


def test_a_grace_is_for_what_is_short():
    clock = Clock({"a": 0.1, "b": 0.1}, {"a": 1.0, "b": 7.0}, now=Time())
    assert clock.due(["a", "b"], grace=5.0) == ["a"]


def test_what_fails_is_a_warning_and_is_not_tried_again():
    clock = Clock({"a": 1.0})
    with pytest.warns(UserWarning, match="could not a .ZeroDivisionError: division by zero.; it will not try again"):
        clock.run("a", lambda: 1 / 0)
    clock.run("a", lambda: pytest.fail("it was tried again"))
    assert clock.due(["a"], grace=100.0) == []
    clock.close("b")
    assert clock.due(["b"]) == []
