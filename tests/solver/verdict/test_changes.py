from dataclasses import replace

import torch

from lrf_lightning.solver.running.evaluation import Outcome
from lrf_lightning.solver.verdict.changes import changed_samples


def outcome(losses, predicted=None, scores=None, weights=None, target=None):
    losses = torch.tensor(losses, dtype=torch.float64)
    logits = None if predicted is None else torch.nn.functional.one_hot(torch.tensor(predicted), 4).float()
    return Outcome(
        losses,
        torch.ones(len(losses), dtype=torch.float64) if weights is None else torch.tensor(weights),
        None if scores is None else torch.tensor(scores, dtype=torch.float64),
        logits,
        None if target is None else torch.tensor(target),
    )


def test_flipped_samples_are_found_the_largest_change_first():
    before = outcome([0.1, 0.2, 0.3, 0.4], [0, 1, 2, 3], [1.0, 1.0, 0.0, 1.0], target=[0, 1, 1, 3])
    after = outcome([0.2, 0.9, 0.1, 9.0], [0, 2, 1, 3], [1.0, 0.0, 1.0, 1.0], target=[0, 1, 1, 3])
    first, second = changed_samples(before, after)
    assert (first.sample, first.target, first.predicted_before, first.predicted_after) == (1, 1, 1, 2)
    assert (first.score_before, first.score_after) == (1.0, 0.0)
    assert (second.sample, second.loss_before, second.loss_after) == (2, 0.3, 0.1)


def test_two_wrong_answers_that_differ_are_a_change():
    (change,) = changed_samples(outcome([1.0], [0], [0.0], target=[3]), outcome([1.0], [1], [0.0], target=[3]))
    assert (change.predicted_before, change.predicted_after, change.target) == (0, 1, 3)


def test_scores_alone_show_a_change():
    (change,) = changed_samples(outcome([1.0, 1.0], scores=[0.5, 1.0]), outcome([1.0, 1.0], scores=[0.25, 1.0]))
    assert (change.sample, change.score_after, change.target, change.predicted_after) == (0, 0.25, None, None)


def test_rows_that_are_no_samples_and_batches_give_no_classes_and_no_samples():
    tokens = outcome([1.0], [0, 1], target=[0, 1])
    assert changed_samples(tokens, outcome([2.0], [3, 3], target=[0, 1])) == []
    assert changed_samples(outcome([1.0], scores=[1.0], weights=[8.0]), outcome([1.0], scores=[0.0])) == []


def test_only_the_largest_changes_are_kept_and_nan_counts_as_large():
    before, after = outcome([0.0] * 5, scores=[1.0] * 5), outcome([1.0, 5.0, 2.0, float("nan"), 3.0], scores=[0.0] * 5)
    assert [change.sample for change in changed_samples(before, after, most=3)] == [3, 1, 4]


def test_scores_of_batches_belong_to_no_sample():
    weights = torch.tensor([3.0], dtype=torch.float64)
    before, after = (
        replace(
            outcome([1.0] * 3, [0, 1, answer], target=[0, 1, 2]), scores=torch.tensor([score]), score_weights=weights
        )
        for answer, score in ((2, 1.0), (1, 0.5))
    )
    (change,) = changed_samples(before, after)
    assert (change.sample, change.score_before, change.predicted_after) == (2, None, 1)
