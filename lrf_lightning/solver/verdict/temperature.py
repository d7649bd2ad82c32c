"""The losses of two classifiers at their best temperatures, which tell more confident predictions from better ones."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lrf_lightning.solver.running.evaluation import Outcome

__all__ = ["fit_temperature", "scaled_losses", "temperatures"]


def temperatures(dense: Outcome, compressed: Outcome) -> tuple[float, float] | None:
    """The best temperatures of two models, None unless both gave logits; see :func:`fit_temperature`."""
    found = fit_temperature(dense), fit_temperature(compressed)
    return None if found[0] is None or found[1] is None else (found[0], found[1])


def fit_temperature(outcome: Outcome) -> float | None:
    """The temperature that minimises the cross-entropy of logits / temperature, None without logits.

    The cross-entropy is convex in 1 / temperature and its derivative there is the mean over samples of the expected
    logit minus the target's logit; the root is bisected between temperatures of 1/20 and 20 (Guo et al. 2017, On
    calibration of modern neural networks, for the idea). Beyond them there is none worth the name: 0 stands for a
    cross-entropy that falls with ever more confidence, as where every answer is right, infinity for ever less.
    """
    answers = _answers(outcome)
    if answers is None:
        return None
    logits, target = answers
    wanted = logits.gather(1, target[:, None]).mean()
    if not bool(torch.isfinite(wanted)):  # a right answer that is ruled out, or NaN
        return None

    def is_too_sharp(log_temperature: float) -> bool:
        shares = (logits * math.exp(-log_temperature)).softmax(1)
        expected = (shares * logits.masked_fill(shares == 0, 0.0)).sum(1).mean()  # logits of masked classes are -inf
        return bool(expected > wanted)

    low, high = math.log(1 / 20), math.log(20)
    if not is_too_sharp(low):
        return 0.0
    if is_too_sharp(high):
        return math.inf
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if is_too_sharp(middle) else (low, middle)
    return math.exp((low + high) / 2)


def scaled_losses(dense: Outcome, compressed: Outcome, fitted: tuple[float, float]) -> dict[str, Any]:
    """What a :class:`~lrf_lightning.solver.result.Certificate` says of both losses at temperatures fitted elsewhere.

    Args:
        dense: logits and targets of the original.
        compressed: those of the compressed model.
        fitted: what :func:`temperatures` found.

    Returns:
        Fields of the certificate; none if there are no logits here.
    """
    for whose, temperature in zip(("original", "compressed model"), fitted, strict=True):
        if temperature == 0 or math.isinf(temperature):
            kind = "more" if temperature == 0 else "less"
            reason = f"on the selection split the loss of the {whose} falls with ever {kind} confidence"
            return {"no_temperature": reason}
    before, after = _answers(dense), _answers(compressed)
    if before is None or after is None:
        return {}
    return {
        "temperature": fitted[0],
        "scaled_dense_loss": _cross_entropy(before, fitted[0]),
        "scaled_compressed_loss": _cross_entropy(after, fitted[1]),
    }


def _answers(outcome: Outcome) -> tuple[Tensor, Tensor] | None:
    """Logits in float64 and targets of the rows that have one, None if there are none."""
    if outcome.logits is None or outcome.target is None:
        return None
    known = outcome.target >= 0  # the usual mark of rows without a target, ignore_index, is negative
    return (outcome.logits[known].double(), outcome.target[known]) if known.any() else None


def _cross_entropy(answers: tuple[Tensor, Tensor], temperature: float) -> float:
    logits, target = answers
    return float(nn.functional.cross_entropy(logits / temperature, target))
