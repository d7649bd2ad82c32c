import random
import threading
import weakref
from functools import partial

import numpy as np
import pytest
import torch

from lrf_lightning.solver.running.lockstep import Run, pause, runs


def test_runs_pause_with_events_and_go_on_with_replies():
    heard = []

    def count(first):
        for number in range(first, first + 3):
            reply = pause(number)
            heard.append(reply)

    with runs([lambda: count(0), lambda: count(10)]) as (one, two):
        one.resume()
        two.resume()
        assert (one.event, two.event) == (0, 10)
        one.resume("a")
        two.resume("b")
        assert (one.event, two.event) == (1, 11)
        assert heard == ["a", "b"]
        assert not one.finished


def test_a_run_ends_and_stays_ended():
    with runs([lambda: pause("only")]) as (run,):
        run.resume()
        run.resume()
        assert run.finished
        assert run.event is None
        run.resume()
        assert run.finished


def test_errors_reach_the_caller_and_no_thread_is_left():
    def fail():
        pause("before")
        raise ValueError("broken batch")

    before = threading.active_count()
    with runs([fail, lambda: pause("waits")]) as (one, two):
        two.resume()
        one.resume()
        with pytest.raises(ValueError, match="broken batch"):
            one.resume()
    assert threading.active_count() == before


def test_unfinished_runs_are_unwound_last_first_past_broad_handlers():
    unwound = []

    def hold(name):
        try:
            try:
                pause(name)
            except Exception:  # what a careless step might do
                unwound.append("swallowed")
        finally:
            unwound.append(name)

    with runs([lambda: hold("a"), lambda: hold("b"), lambda: hold("never started")]) as (one, two, _):
        one.resume()
        two.resume()
    assert unwound == ["b", "a"]


def test_the_callers_modes_are_carried_over():
    seen = []

    def look():
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()))

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), runs([look]) as (run,):
        run.resume()
    with torch.inference_mode(), runs([look]) as (run,):
        run.resume()
    with runs([look]) as (run,):
        run.resume()
    assert seen == [(False, True, False), (False, False, True), (True, False, False)]


def test_runs_made_together_draw_the_same_numbers_and_leave_the_callers_state():
    drawn = {}

    def numbers():
        return torch.tensor([random.random(), np.random.rand(), torch.rand(())], dtype=torch.float64)

    def draw(name):
        first = numbers()
        pause(name)
        drawn[name] = torch.cat([first, numbers()])

    torch.manual_seed(5)
    state = torch.get_rng_state()
    with runs([lambda: draw("a"), lambda: draw("b")]) as started:
        for _ in range(2):
            for run in started:
                run.resume()
    torch.testing.assert_close(drawn["a"], drawn["b"], rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_pausing_outside_of_a_run_is_an_error():
    with pytest.raises(RuntimeError, match="outside of a run"):
        pause("lost")


def test_what_is_around_a_run_is_there_while_it_works():
    inside = []

    class Around:
        def __enter__(self):
            inside.append("in")

        def __exit__(self, *_):
            inside.append("out")

    def work():
        try:
            inside.append("works")
            pause("event")
        finally:
            inside.append("ends")

    with runs([Run(work, Around()), Run(work, Around())]) as (run, _):
        run.resume()
        assert inside == ["in", "works", "out"]
    assert inside == ["in", "works", "out", "in", "ends", "out"], "also where a run is unwound"


def test_a_run_that_has_ended_holds_nothing():
    class Batch:
        pass

    batch = Batch()
    reference = weakref.ref(batch)
    with runs([Run(partial(lambda _: pause("event"), batch))]) as (run,):
        del batch
        run.resume()
        assert reference() is not None
        run.resume()
        assert run.finished
        assert reference() is None
