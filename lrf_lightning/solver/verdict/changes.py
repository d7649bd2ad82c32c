"""The samples on which two models disagree."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lrf_lightning.solver.result import SampleChange
from lrf_lightning.solver.running.evaluation import Outcome

__all__ = ["changed_samples"]

MOST = 256


def changed_samples(before: Outcome, after: Outcome, *, most: int = MOST) -> list[SampleChange]:
    """Samples whose predicted class or score differs, the largest change of the loss first.

    Args:
        before: losses, scores and logits of one model.
        after: those of the other one on the same samples in the same order.
        most: number of samples at most.

    Returns:
        Nothing where a pair of losses is that of a batch, so that it belongs to no sample.
    """
    if not all(torch.equal(one.weights, torch.ones_like(one.weights)) for one in (before, after)):
        return []
    if before.score_weights is not None or after.score_weights is not None:
        before, after = replace(before, scores=None), replace(after, scores=None)
    classes_before, classes_after = _classes(before), _classes(after)
    flipped = torch.zeros(len(before.losses), dtype=torch.bool, device="cpu")
    if before.scores is not None and after.scores is not None:
        flipped |= before.scores != after.scores
    if classes_before is not None and classes_after is not None:
        flipped |= classes_before != classes_after
    order = (after.losses - before.losses).nan_to_num(nan=torch.inf).abs().argsort(descending=True, stable=True)
    return [
        SampleChange(
            sample=index,
            loss_before=float(before.losses[index]),
            loss_after=float(after.losses[index]),
            score_before=None if before.scores is None else float(before.scores[index]),
            score_after=None if after.scores is None else float(after.scores[index]),
            target=None if classes_before is None or before.target is None else int(before.target[index]),
            predicted_before=None if classes_before is None else int(classes_before[index]),
            predicted_after=None if classes_after is None else int(classes_after[index]),
        )
        for index in order[flipped[order]][:most].tolist()
    ]


def _classes(outcome: Outcome) -> Tensor | None:
    """The predicted class of every sample, None where rows of logits are not samples."""
    if outcome.logits is None or len(outcome.logits) != len(outcome.losses):
        return None
    return outcome.logits.argmax(1)
