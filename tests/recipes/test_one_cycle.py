from types import SimpleNamespace

import pytest
from torch import nn

from recipes.one_cycle import one_cycle


def scheduler(steps):
    module = nn.Linear(2, 2)
    module.trainer = SimpleNamespace(estimated_stepping_batches=steps)
    return one_cycle(module, module.parameters(), 0.1, 0.0)["lr_scheduler"]["scheduler"]


def test_a_training_goes_on_where_it_was_but_is_not_prolonged():
    state = scheduler(10).state_dict()
    for steps in (10, 5):
        other = scheduler(steps)
        other.load_state_dict(state)
        assert other.total_steps == 10
    with pytest.raises(ValueError, match=r"a training of 10 steps.* cannot be prolonged to 20.*max_epochs.*anew"):
        scheduler(20).load_state_dict(state)
