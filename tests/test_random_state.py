import random

import numpy as np
import pytest
import torch

from lrf_lightning.random_state import preserved, seed_all, seeded


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


@pytest.mark.parametrize("context", [preserved, lambda: seeded(3)], ids=["preserved", "seeded"])
def test_generators_go_on_as_if_nothing_had_been_drawn(context):
    seed_all(7)
    draw()
    expected = draw()
    seed_all(7)
    draw()
    with pytest.raises(RuntimeError, match="stop"), context():  # noqa: PT012
        draw()
        raise RuntimeError("stop")
    assert draw() == expected


def test_same_seed_same_numbers():
    with seeded(5):
        first = draw()
    with seeded(5):
        second = draw()
    with seeded(6):
        third = draw()
    assert first == second
    assert all(a != b for a, b in zip(first, third, strict=True))


def test_large_and_negative_seeds():
    for seed in (2**40, -1):
        seed_all(seed)
        assert 0 <= np.random.rand() < 1
