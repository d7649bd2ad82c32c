"""The solver's settings: one frozen record whose fields are checked when it is built."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal, get_args

from torch import nn

from lrf_lightning.surgery import ConvOrder

__all__ = [
    "BUDGETS",
    "ConvOrder",
    "Cost",
    "GammaKind",
    "Metric",
    "Objective",
    "PaperVariant",
    "Prediction",
    "Settings",
    "SpeedRuntime",
    "check_flag",
    "checked_patterns",
    "default_loss_margin",
]

Objective = Literal["lossless", "compact", "budget", "frontier", "paper"]
Metric = Literal["euclidean", "activation", "fisher"]
Cost = Literal["params", "flops", "latency"]
Prediction = Literal["loss", "energy"]
PaperVariant = Literal["lossless", "compact"]
GammaKind = Literal["relative", "mean_square"]
SpeedRuntime = Literal["none", "eager", "compile"]

BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides the outcome besides the model and the data.

    Attributes:
        objective: ``lossless`` (a model whose loss ties with the lowest that was measured), ``compact`` (smallest
            model whose loss and score are as good as the original's), ``budget`` (best model with ``keep`` of the
            cost), ``frontier`` (all ``budgets`` from one calibration, with the smallest one chosen that ``compact``
            accepts) or ``paper`` (the published greedy algorithm).
        metric: metric of the factorization, ``euclidean`` (plain SVD), ``activation`` (whitened inputs) or ``fisher``
            (whitened inputs and output gradients).
        keep: share of the factorizable layers' cost that ``budget`` keeps, in (0, 1].
        budgets: shares of the factorizable layers' cost that ``frontier`` measures, each in (0, 1]; kept in falling
            order. Shares that no rank can reach are left out, and the message says so.
        cost: what is counted, ``params``, ``flops`` (multiply-adds of the factorizable layers) or ``latency`` (their
            time, measured on the device at hand for every shape of layer and kept in the user's cache folder; a layer
            gets only ranks that were measured to be faster than the dense layer).
        tolerance: increase of the selection loss that ``lossless`` and ``compact`` accept beyond its noise, absolute.
        score_tolerance: fall of the selection score that they accept beyond its noise, absolute.
        ties: noise of the selection split: differences within this many paired standard errors, and within half the
            margin of the verdict, count as ties, and the smallest model of a tie wins. For ``compact`` and ``frontier``
            so do differences whose confidence bound is inside half the margin. 0 takes figures at face value.
        loss_margin: increase of the loss that counts as not worse in the verdict, absolute; None stands for the
            larger of 2 % of the original's loss and 0.005.
        score_margin: fall of the score that counts as not worse in the verdict, absolute.
        confidence: one-sided confidence of the verdict's bounds, in (0.5, 1).
        points: number of shares of the cost that ``compact`` and ``lossless`` measure, at least 2. Where memory cannot
            hold all of them at a time, the smallest are left out once the loss of larger ones is hopeless.
        refinements: bisection steps that ``compact`` and ``lossless`` add between frontier points, or between the
            original and the first of them if none is accepted.
        speed: how both models are timed for the report, at the size of a verification batch and at one sample, each for
            a second or two: ``eager``, ``compile`` (with ``torch.compile`` as well, which takes its time) or ``none``.
            All points of ``frontier`` are timed, those that are not chosen with ``eager`` only.
        prediction: what the allocation trusts, ``loss`` (first-order change and curvature of the model's loss) or
            ``energy`` (the share of the weight's squared norm that is lost, as plain and whitened SVD do).
        probes: whether the perturbation range is found by measuring a few truncations, with ``prediction="loss"``.
        compensation: whether factors are fitted to the inputs that they will really see, layer after layer.
        conv_order: order of the factors of a convolution: ``kernel_first`` (few output channels are computed with the
            kernel, then mixed), ``pointwise_first`` (input channels are mixed to a few, then the kernel is applied),
            ``spatial_split`` (a column of the kernel, then a row), or ``best``, whichever leaves the smallest error in
            the metric at equal ``cost``, for every layer.
        batch_norm: whether running statistics of batch norms are estimated anew on the calibration data, where that
            lowers the loss on the selection split; needs splits of a thousand samples or more.
        damping: relative damping of the second moments of inputs and gradients, at least 0.
        first_order_errors: standard errors by which a first-order term is shrunk towards 0 before it is believed. Where
            gains are left that make a difference, ranks with and without them are both measured on the selection split.
        range_factor: a rank is inside the perturbation range while measured and predicted change differ by no more
            than this factor, at least 1; outside, the prediction counts as many times.
        rows_per_feature: sampled input rows per input dimension of a layer that the second moments are taken over.
        rank_multiple: ranks are rounded to a multiple of this where the layer is large enough; None is 8 on CUDA and
            with ``cost="latency"``, and 1 elsewhere.
        memory_gib: GiB that the statistics of layers may take on every process, the half-finished passes of the
            compensation again, and the copies that it fits together again: in all some three times as much, and a few
            copies of the model. Layers are processed in groups that fit, and a single layer may exceed it.
        include: shell patterns on module names; empty means all.
        exclude: shell patterns on module names that are left alone.
        types: shell patterns on class names of layers (``"Conv2d"``); empty means all that are supported. The
            projections of attention go by ``Linear`` and by ``MultiheadAttention``.
        exclude_types: shell patterns on class names of layers that are left alone.
        predicate: ``predicate(name, module)``; layers for which it is false are left alone. None accepts all.
        frozen: whether layers whose weight does not require a gradient are factorized too; their factors do not
            require one either.
        min_params: layers with fewer weight entries are left alone.
        variant: which of the published algorithms ``paper`` runs, ``lossless`` or ``compact``.
        gamma: largest error of a layer's weight in ``paper``, above 0, and at most 1 if relative.
        gamma_kind: what ``gamma`` bounds, ``relative`` (the squared error over the weight's squared norm) or
            ``mean_square`` (the mean squared elementwise error, where the published value is 1e-4).
        seed: seed of everything that is sampled.
    """

    objective: Objective = "lossless"
    metric: Metric = "fisher"
    keep: float = 0.5
    budgets: tuple[float, ...] = BUDGETS
    cost: Cost = "params"
    tolerance: float = 0.0
    score_tolerance: float = 0.0
    ties: float = 1.0
    loss_margin: float | None = None
    score_margin: float = 0.005
    confidence: float = 0.95
    points: int = 8
    refinements: int = 3
    speed: SpeedRuntime = "eager"
    prediction: Prediction = "loss"
    probes: bool = True
    compensation: bool = True
    conv_order: ConvOrder = "best"
    batch_norm: bool = False
    damping: float = 1e-2
    first_order_errors: float = 2.0
    range_factor: float = 3.0
    rows_per_feature: int = 32
    rank_multiple: int | None = None
    memory_gib: float = 4.0
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    exclude_types: tuple[str, ...] = ()
    predicate: Callable[[str, nn.Module], bool] | None = None
    frozen: bool = False
    min_params: int = 0
    variant: PaperVariant = "lossless"
    gamma: float = 0.1
    gamma_kind: GammaKind = "relative"
    seed: int = 0

    def __post_init__(self) -> None:
        _check_choice("objective", self.objective, get_args(Objective))
        _check_choice("metric", self.metric, get_args(Metric))
        _check_choice("cost", self.cost, get_args(Cost))
        _check_choice("speed", self.speed, get_args(SpeedRuntime))
        _check_choice("variant", self.variant, get_args(PaperVariant))
        _check_number("keep", self.keep, above=0, most=1)
        object.__setattr__(self, "budgets", _shares("budgets", self.budgets))
        _check_number("confidence", self.confidence, above=0.5, below=1)
        _check_choice("gamma_kind", self.gamma_kind, get_args(GammaKind))
        _check_number("gamma", self.gamma, above=0, most=1 if self.gamma_kind == "relative" else None)
        _check_number("range_factor", self.range_factor, least=1)
        if self.loss_margin is not None:
            _check_number("loss_margin", self.loss_margin, least=0)
        for name in ("tolerance", "score_tolerance", "ties", "score_margin", "damping", "first_order_errors"):
            _check_number(name, getattr(self, name), least=0)
        for name, least in (("points", 2), ("rows_per_feature", 1)):
            _check_whole(name, getattr(self, name), least)
        if self.rank_multiple is not None:
            _check_whole("rank_multiple", self.rank_multiple, 1)
        _check_number("memory_gib", self.memory_gib, above=0)
        _check_choice("conv_order", self.conv_order, get_args(ConvOrder))
        _check_choice("prediction", self.prediction, get_args(Prediction))
        for name in ("refinements", "min_params", "seed"):
            _check_whole(name, getattr(self, name), 0)
        for name in ("include", "exclude", "types", "exclude_types"):
            object.__setattr__(self, name, checked_patterns(name, getattr(self, name)))
        if self.predicate is not None and not callable(self.predicate):
            raise ValueError(f"predicate={self.predicate!r} is no callable; give predicate(name, module) or None")
        for name in ("probes", "compensation", "batch_norm", "frozen"):
            check_flag(name, getattr(self, name))

    @property
    def without_effect(self) -> list[str]:
        """Settings that were changed from their defaults although the objective does not look at them."""
        defaults = {field.name: field.default for field in fields(self)}
        return [
            f"{name}={getattr(self, name)!r} has no effect with objective={self.objective!r}, only with {objective!r}"
            for name, objective in OF_OBJECTIVE.items()
            if self.objective != objective and getattr(self, name) != defaults[name]
        ]

    def loss_margin_of(self, dense_loss: float) -> float:
        """The margin of the loss, which by default depends on the original's; see :func:`default_loss_margin`."""
        return default_loss_margin(dense_loss) if self.loss_margin is None else self.loss_margin

    @property
    def layer_choice(self) -> dict[str, Any]:
        """The settings that say which layers are looked at, as arguments of ``surgery.find_layers``."""
        names = ("include", "exclude", "types", "exclude_types", "predicate", "frozen", "min_params", "conv_order")
        return {name: getattr(self, name) for name in names}


# settings that a single objective looks at
OF_OBJECTIVE: dict[str, Objective] = {
    "keep": "budget",
    "budgets": "frontier",
    "variant": "paper",
    "gamma": "paper",
    "gamma_kind": "paper",
}


def default_loss_margin(dense_loss: float) -> float:
    """The larger of 2 % of the original's loss and 0.005."""
    return max(0.02 * abs(dense_loss), 0.005)


def check_flag(name: str, value: object) -> None:
    """Ask for True or False.

    Args:
        name: of the argument, for the message.
        value: what was given. A word would count as true, whatever it says.

    Raises:
        ValueError: if it is neither.
    """
    if not isinstance(value, bool):
        raise ValueError(
            f"{name}={value!r} is neither True nor False; give one of them, and no words such as yes, no, on and off, "
            "which Hydra hands on as text"
        )


def checked_patterns(name: str, value: object) -> tuple[str, ...]:
    """Patterns as a tuple; a single one may be given as a string.

    Args:
        name: of the argument, for the message.
        value: what was given.

    Raises:
        ValueError: if it is something else.
    """
    if isinstance(value, str):
        return (value,)
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise ValueError(f"{name}={value!r} is not a list of patterns such as ['head', 'blocks.*']")


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if isinstance(value, str) and value in allowed:
        return
    near = get_close_matches(str(value).lower(), allowed, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name}={value!r} is unknown, allowed are {', '.join(map(repr, allowed))}{hint}")


def _check_number(
    name: str,
    value: object,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if ok:
        number = float(value)  # type: ignore[arg-type]
        ok = (
            (least is None or number >= least)
            and (above is None or number > above)
            and (most is None or number <= most)
            and (below is None or number < below)
        )
    if not ok:
        low = f"[{least}" if least is not None else f"({above if above is not None else '-inf'}"
        high = f"{most}]" if most is not None else f"{below if below is not None else 'inf'})"
        raise ValueError(f"{name}={value!r} is not a number in {low}, {high}")


def _check_whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} is not a whole number of at least {least}")


def _shares(name: str, value: object) -> tuple[float, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"{name}={value!r} is not a list of shares such as [0.5, 0.3, 0.2]")
    for share in value:
        _check_number(f"{name}: {share!r}", share, above=0, most=1)
    return tuple(sorted({float(share) for share in value}, reverse=True))
