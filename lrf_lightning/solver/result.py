"""What the solver hands back: plain, frozen records of Python numbers that are complete when built."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lrf_lightning.solver.speed_result import Speed

__all__ = [
    "Certificate",
    "FrontierPoint",
    "Interval",
    "LayerCurve",
    "LayerResult",
    "Measurement",
    "SampleChange",
    "Verdict",
]

Verdict = Literal["better", "not worse", "worse", "inconclusive", "unchanged"]


@dataclass(frozen=True)
class Measurement:
    """Quality of one model on one split.

    Attributes:
        samples: number of samples.
        loss: mean loss per sample.
        score: mean score per sample (accuracy for classifiers), None if no score is known.
    """

    samples: int
    loss: float
    score: float | None = None


@dataclass(frozen=True)
class Interval:
    """A paired difference, compressed minus dense, with its one-sided bounds.

    Attributes:
        mean: mean difference.
        standard_error: standard error of the mean.
        lower: one-sided lower confidence bound.
        upper: one-sided upper confidence bound.
        pairs: number of paired differences, samples or batches.
        method: how the bounds were found, ``"mean"`` (any differences) or ``"tango"`` (paired proportions).
    """

    mean: float
    standard_error: float
    lower: float
    upper: float
    pairs: int
    method: str


@dataclass(frozen=True)
class LayerCurve:
    """Predictions for one layer at every rank it may take; all lists run over ``ranks``.

    Attributes:
        ranks: the ranks 1, 2, ..., the largest that saves parameters.
        first_order: mean first-order change of the loss.
        standard_error: standard error of ``first_order``.
        curvature: half the mean squared directional derivative.
        predicted: the change of the loss that the allocation uses.
        perturbation: norm of the perturbation over norm of the weight, both in the metric.
        allowed: whether the rank lies inside the perturbation range.
        singular_values: of the weight in the metric, largest first, per group averaged in square.
        probes: measured truncations ``(rank, predicted change, measured change, its standard error)``.
        probed_with: names of the other layers that were truncated together with this one, whose changes the probes
            then hold as well; empty if it was truncated alone.
    """

    ranks: list[int]
    first_order: list[float]
    standard_error: list[float]
    curvature: list[float]
    predicted: list[float]
    perturbation: list[float]
    allowed: list[bool]
    singular_values: list[float]
    probes: list[tuple[int, float, float, float]] = field(default_factory=list)
    probed_with: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LayerResult:
    """What became of one layer with a weight matrix.

    Attributes:
        name: qualified name of the module.
        kind: class name of the dense module.
        shape: shape of the dense weight.
        full_rank: smaller side of one group's matrix, 0 for layers left alone by kind.
        rank: the rank given to it, None if it stays dense.
        params_before: entries of the dense weight.
        params_after: entries of both factors, or of the weight if it stays dense.
        flops_before: multiply-adds per sample of the dense layer, 0 where unknown.
        flops_after: multiply-adds per sample afterwards.
        latency_before: seconds per sample of the dense layer, None unless they were measured.
        latency_after: seconds per sample afterwards.
        predicted_change: change of the loss predicted for this layer alone, None if it stays dense.
        predicted_error: standard error of the first-order part of the prediction.
        reason: why the layer was left alone; empty for layers that the allocation could choose.
        curve: the predictions at every rank, None for layers left alone.
        order: order of the factors of a convolution, ``kernel_first``, ``pointwise_first`` or ``spatial_split``, None
            for other layers and those left alone; see :mod:`lrf_lightning.modules.conv`.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    full_rank: int
    rank: int | None
    params_before: int
    params_after: int
    flops_before: int = 0
    flops_after: int = 0
    latency_before: float | None = None
    latency_after: float | None = None
    predicted_change: float | None = None
    predicted_error: float | None = None
    reason: str = ""
    curve: LayerCurve | None = None
    order: str | None = None


@dataclass(frozen=True)
class FrontierPoint:
    """One allocation, with compensation, measured on the selection split.

    Attributes:
        keep: share of the factorizable layers' cost (parameters, FLOPs or latency) that is kept.
        ranks: rank of every factorized layer by name; layers that are missing stay dense.
        params_model: parameters of the whole model.
        params_layers: weight entries of the factorizable layers.
        flops_layers: multiply-adds per sample of the factorizable layers.
        predicted: predicted change of the loss (sum over layers).
        predicted_error: standard error of the prediction's first-order part.
        loss: measured loss on the selection split.
        loss_change: loss minus the dense model's loss on the same samples.
        loss_change_error: standard error of the paired difference.
        score: measured score, None if no score is known.
        score_change: score minus the dense model's score.
        score_change_error: standard error of the paired difference.
        within_range: whether every rank lies inside its layer's perturbation range.
        chosen: whether this is the point that the objective chose.
        budget: the share of the cost that was asked for, None if no share was.
        pareto: whether no other model, the original included, is at least as good in cost, loss and score, and better
            in one of them.
        knee: whether this is where the front bends most; see :func:`lrf_lightning.solver.points.pareto.knee`.
        certificate: the verdict on the verification split, None unless all points were tested there.
        speed: speed and size beside the original's, None unless all points were timed.
    """

    keep: float
    ranks: dict[str, int]
    params_model: int
    params_layers: int
    flops_layers: int
    predicted: float
    predicted_error: float
    loss: float
    loss_change: float
    loss_change_error: float
    score: float | None = None
    score_change: float | None = None
    score_change_error: float | None = None
    within_range: bool = True
    chosen: bool = False
    budget: float | None = None
    pareto: bool = False
    knee: bool = False
    certificate: Certificate | None = None
    speed: Speed | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Certificate:
    """The verdict on the verification split, which took no part in the choice.

    Attributes:
        verdict: ``better``, ``not worse``, ``worse``, ``inconclusive``, or ``unchanged`` if nothing was compressed.
        dense: quality of the original.
        compressed: quality of the compressed model.
        loss_change: paired difference of the loss.
        score_change: paired difference of the score (positive is better), None if no score is known.
        loss_margin: largest increase of the loss that counts as not worse.
        score_margin: largest fall of the score that counts as not worse.
        confidence: one-sided confidence of the bounds, such as 0.95.
        samples_needed: samples that would be expected to decide an inconclusive verdict, None otherwise.
        scaled_dense_loss: loss of the original with its best temperature, None if it is no classifier. The
            temperature is fitted on the selection split.
        temperature: that temperature.
        scaled_compressed_loss: loss of the compressed model with its own best temperature.
        no_temperature: why a classifier has no best temperature, empty if it has one.
    """

    verdict: Verdict
    dense: Measurement
    compressed: Measurement
    loss_change: Interval
    score_change: Interval | None
    loss_margin: float
    score_margin: float
    confidence: float
    samples_needed: int | None = None
    scaled_dense_loss: float | None = None
    temperature: float | None = None
    scaled_compressed_loss: float | None = None
    no_temperature: str = ""


@dataclass(frozen=True)
class SampleChange:
    """One sample of the verification split on which the two models disagree.

    Attributes:
        sample: its number in the order of the split.
        loss_before: loss of the original.
        loss_after: loss of the compressed model.
        score_before: score of the original, None if no score is known.
        score_after: score of the compressed model.
        target: the class that is right, None for models that are no classifiers of whole samples.
        predicted_before: the class that the original predicts.
        predicted_after: the class that the compressed model predicts.
    """

    sample: int
    loss_before: float
    loss_after: float
    score_before: float | None = None
    score_after: float | None = None
    target: int | None = None
    predicted_before: int | None = None
    predicted_after: int | None = None
