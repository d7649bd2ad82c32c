"""All that a solve found, the compressed model included."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from lrf_lightning.solver.points.point_models import PointModels
from lrf_lightning.solver.result import Certificate, FrontierPoint, LayerResult, Measurement, SampleChange
from lrf_lightning.solver.settings import Settings
from lrf_lightning.solver.speed_result import Speed

__all__ = ["Solution"]


@dataclass(frozen=True)
class Solution:
    """Everything :func:`lrf_lightning.compress` found.

    Attributes:
        model: the compressed model; an unchanged copy if no point qualified.
        ranks: rank of every factorized layer by name, empty if nothing was compressed.
        layers: one record for every layer with a weight matrix, those left alone included.
        frontier: the measured points, from the largest to the smallest.
        dense: quality of the original on the selection split.
        certificate: the verdict on the verification split.
        settings: the settings that led here.
        params_model: parameters of the whole model, before and after.
        params_layers: weight entries of the factorizable layers, before and after.
        flops_layers: multiply-adds per sample of the factorizable layers, before and after.
        latency_layers: seconds per sample of the factorizable layers, before and after, added up from the
            measured layers; None unless ``cost="latency"``.
        speed: speed and size beside the original's, None if nothing was compressed or they were not measured.
        message: one sentence on how the choice was made, or why there was none.
        seconds: wall-clock seconds of every stage by name.
        samples: number of samples in every split by name.
        changes: verification samples whose predicted class or score differs, the largest change of the loss first; up
            to a few hundred, empty where losses are known per batch only.
        point_models: the models of all points of the frontier, with ``objective="frontier"``.
        score_name: what the score is called, empty if that is not known.
        fingerprint: that of the model's weights when it was judged, empty if it cannot be told.
    """

    model: nn.Module
    ranks: dict[str, int]
    layers: list[LayerResult]
    frontier: list[FrontierPoint]
    dense: Measurement
    certificate: Certificate
    settings: Settings
    params_model: tuple[int, int]
    params_layers: tuple[int, int]
    flops_layers: tuple[int, int]
    message: str
    seconds: dict[str, float]
    samples: dict[str, int]
    changes: list[SampleChange] = field(default_factory=list)
    latency_layers: tuple[float, float] | None = None
    speed: Speed | None = None
    point_models: PointModels | None = field(default=None, repr=False, compare=False)
    score_name: str = ""
    fingerprint: str = field(default="", repr=False)
