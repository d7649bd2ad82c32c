"""What is predicted for one layer at every rank, and what was measured to correct it: the records.

:mod:`lrf_lightning.solver.predictions.calibration` fills them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Curve", "Prediction", "Probe", "shrink"]


@dataclass(frozen=True)
class Prediction:
    """Predictions for the ranks 1 to r of one layer, float64 on the CPU, each of shape (r,)."""

    first_order: Tensor
    standard_error: Tensor
    curvature: Tensor
    perturbation: Tensor

    def change(self, errors: float) -> Tensor:
        """First-order change, believed only beyond ``errors`` standard errors from 0, plus curvature."""
        # a single sample has an infinite standard error: 0 times that is 0 here, the figure is taken at face value
        threshold = self.standard_error * errors if errors > 0 else torch.zeros_like(self.standard_error)
        return shrink(self.first_order, threshold) + self.curvature


@dataclass(frozen=True)
class Probe:
    """One measured truncation of a group of layers.

    Attributes:
        ranks: the ranks that were tried, by layer.
        first_order: predicted first-order change of the loss, shrunk.
        curvature: predicted curvature.
        measured: measured change of the loss.
        standard_error: standard error of the measured paired change.
    """

    ranks: Mapping[str, int]
    first_order: float
    curvature: float
    measured: float
    standard_error: float

    @property
    def predicted(self) -> float:
        """Predicted change of the loss."""
        return self.first_order + self.curvature


@dataclass(frozen=True)
class Curve:
    """Predictions for one layer at the ranks 1 to r, tensors of shape (r,) on the CPU.

    Attributes:
        prediction: first-order change, standard error, curvature and perturbation.
        change: predicted change of the loss that the allocation uses.
        allowed: whether the rank lies inside the perturbation range.
        probes: what was measured, for the layer or the group of layers it was probed with.
        spectrum: singular values of the weight in the metric, the root mean square over the groups.
    """

    prediction: Prediction
    change: Tensor
    allowed: Tensor
    probes: list[Probe]
    spectrum: Tensor


def shrink(value: Tensor, threshold: Tensor) -> Tensor:
    """Soft threshold: move ``value`` towards 0 by ``threshold``, stopping there."""
    return value.sign() * (value.abs() - threshold).clamp_min(0)
