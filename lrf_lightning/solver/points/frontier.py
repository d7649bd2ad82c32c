"""Measured points between the dense model and a tiny one.

Every point is an allocation for a share of the cost, built with compensation and measured on the selection split.
:mod:`lrf_lightning.solver.points.acceptance` chooses among them.

A predicted gain of the loss may be real, or the sum of what chance and an ill-scaled output promise in many layers. So
where it makes a difference two allocations are measured for a share: one that believes no gain, and one that believes
all of them, which is taken only if the selection split proves it better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from lrf_lightning.solver.factors.compressed_copies import compressed_copies, copies_at_once
from lrf_lightning.solver.model_size import parameter_count
from lrf_lightning.solver.points.batch_norm import renormalized
from lrf_lightning.solver.ranks.allocation import RanksKey, allocate, cheapest, ranks_key
from lrf_lightning.solver.ranks.rank_options import rank_options
from lrf_lightning.solver.result import FrontierPoint
from lrf_lightning.solver.running.evaluation import Outcome, loss_differences, score_differences
from lrf_lightning.solver.settings import default_loss_margin
from lrf_lightning.solver.verdict.intervals import paired_change, paired_error
from lrf_lightning.solver.workspace import Workspace

__all__ = ["Frontier"]

LARGEST_SHARE, SMALLEST_SHARE = 0.9, 0.1
# paired standard errors by which a believed gain must show: every share is another chance to be fooled, by the same few
# selection samples. With 1.6 of them MiniLM on 300 texts took gains that were losses on 3,000 others
PROOF = 3.0
FEWEST_PAIRS = 10  # fewer have errors that say little
# margins by which the loss exceeds the original's, surely, where smaller models are not measured any more
HOPELESS = 10.0


@dataclass(frozen=True)
class _Measured:
    point: FrontierPoint
    outcome: Outcome


class Frontier:
    """Measures allocations on request and remembers them.

    Args:
        work: the workspace, with curves.
        dense: losses of the dense model on the selection split.
    """

    def __init__(self, work: Workspace, dense: Outcome) -> None:
        self.work, self.dense = work, dense
        self.measured: dict[RanksKey, _Measured] = {}
        self._best: set[RanksKey] = set()
        self._renormalized: set[RanksKey] = set()
        self._latest: tuple[RanksKey, nn.Module] | None = None
        self._options = rank_options(work, gains=False)
        self._options_with_gains = rank_options(work, gains=True)

    @property
    def points(self) -> list[FrontierPoint]:
        """All measured points, each the best at its share, from the largest to the smallest."""
        return sorted((self.measured[key].point for key in self._best), key=lambda point: -point.keep)

    def outcome(self, point: FrontierPoint) -> Outcome:
        """Losses of a measured point on the selection split."""
        return self.measured[ranks_key(point.ranks)].outcome

    def note(self, point: FrontierPoint) -> str:
        """A sentence, after a space, on what was done to a measured point besides the factorization; else empty."""
        if ranks_key(point.ranks) not in self._renormalized:
            return ""
        return " Its batch norms have new running statistics, which lower the loss on the selection split."

    @property
    def lowest(self) -> float:
        """The smallest share of the dense cost that any allocation keeps."""
        return cheapest(self._options) / self.work.dense_cost

    def at(self, keep: float) -> FrontierPoint:
        """The better measured point of the :meth:`rivals` for a share of the dense cost."""
        return self._best_of([self.rivals(keep)])[0]

    def rivals(self, keep: float) -> list[dict[str, int]]:
        """The ranks that are predicted to be best for a share of the dense cost, without and with gains of the loss.

        The second ones are left out if they are the same.

        Raises:
            ValueError: if even the cheapest ranks cost more.
        """
        budget = keep * self.work.dense_cost
        if self.work.settings.cost != "latency" and math.isclose(budget, round(budget), rel_tol=1e-12):
            budget = round(budget)  # costs are whole numbers, and ranks that meet one exactly must not miss it
        if cheapest(self._options) > budget:
            raise ValueError(
                f"keep={keep:g} cannot be reached: the cheapest ranks of all layers keep {self.lowest:.4f} of the "
                f"{self.work.settings.cost} of the {len(self.work.layers)} factorizable layers; "
                f"use keep >= {math.ceil(self.lowest * 1e4) / 1e4:g}"
            )
        found = [allocate(options, budget).ranks for options in (self._options, self._options_with_gains)]
        return found if found[0] != found[1] else found[:1]

    def with_ranks(self, ranks: Mapping[str, int]) -> FrontierPoint:
        """The measured point with the given ranks."""
        return self._best_of([[ranks]])[0]

    def _best_of(
        self,
        shares: Sequence[Sequence[Mapping[str, int]]],
        then: Callable[[FrontierPoint, nn.Module], None] = lambda *_: None,
        advance: Callable[[], None] = lambda: None,
    ) -> list[FrontierPoint]:
        """The best measured point of each group of rivals; those that are new are built together.

        Args:
            shares: ranks by name, one or several for each share; the first is taken unless another is proved better.
            then: called with every best point that is new, and its model.
            advance: called after every measurement.
        """
        groups = [[ranks_key(ranks) for ranks in rivals] for rivals in shares]
        new = {ranks_key(ranks): ranks for rivals in shares for ranks in rivals}
        new = {key: ranks for key, ranks in new.items() if key not in self.measured}
        models: dict[RanksKey, nn.Module] = {}
        undecided = dict(enumerate(groups))
        best: dict[int, RanksKey] = {}

        def decide() -> None:
            for i in [i for i, keys in undecided.items() if all(key in self.measured for key in keys)]:
                key = best[i] = self._winner(undecided.pop(i))
                self._best.add(key)
                if key in models:
                    self._latest = key, models.pop(key)
                    then(self.measured[key].point, self._latest[1])
            for key in set(models) - {key for keys in undecided.values() for key in keys}:
                del models[key]

        decide()
        for (key, ranks), compressed in zip(new.items(), compressed_copies(self.work, list(new.values())), strict=True):
            models[key], outcome = self._better_norms(key, compressed)
            self.measured[key] = _Measured(self._point(ranks, models[key], outcome), outcome)
            advance()
            decide()
        return [self.measured[best[i]].point for i in range(len(groups))]

    def _winner(self, rivals: Sequence[RanksKey]) -> RanksKey:
        best = rivals[0]
        for rival in rivals[1:]:
            if self._is_better(self.measured[rival].outcome, self.measured[best].outcome):
                best = rival
        return best

    def _is_better(self, outcome: Outcome, other: Outcome) -> bool:
        """Whether a loss on the selection split is surely lower than another, and the score no lower than a tie."""
        if not torch.isfinite(other.losses).all() or len(outcome.losses) < FEWEST_PAIRS:
            return bool(torch.isfinite(outcome.losses).all() and not torch.isfinite(other.losses).all())
        change, error = paired_change(*loss_differences(outcome, other))
        if not change + PROOF * error < 0:
            return False
        scores = score_differences(outcome, other)
        if scores is None:
            return True
        change, error = paired_change(*scores)
        settings = self.work.settings
        room = settings.ties * error if math.isfinite(error) else settings.score_margin / 2 * (settings.ties > 0)
        return change >= -room - 1e-12

    def build(self, ranks: Mapping[str, int]) -> nn.Module:
        """A compensated copy of the dense model with the given ranks; the latest one is not made anew."""
        if self._latest is not None and self._latest[0] == ranks_key(ranks):
            return self._latest[1]
        compressed = next(compressed_copies(self.work, [ranks]))
        return (self._with_norms(compressed) or compressed) if ranks_key(ranks) in self._renormalized else compressed

    def _better_norms(self, key: RanksKey, compressed: nn.Module) -> tuple[nn.Module, Outcome]:
        """The model with new statistics of its batch norms if its selection loss is lower so, and its losses there."""
        outcome = self.work.evaluate(compressed, "selection", keep_logits=True)
        changed = self._with_norms(compressed) if self.work.settings.batch_norm and key else None
        if changed is None:
            return compressed, outcome
        other = self.work.evaluate(changed, "selection", keep_logits=True)
        if not other.measurement().loss < outcome.measurement().loss:
            return compressed, outcome
        self._renormalized.add(key)
        return changed, other

    def _with_norms(self, compressed: nn.Module) -> nn.Module | None:
        work = self.work
        with work.stage("batch norms", 0):
            return renormalized(compressed, work.loss, work.calibration, work.device, work.processes, work.shared)

    def walk(self) -> list[FrontierPoint]:
        """Measure ``settings.points`` shares from 0.9 to 0.1 of the cost, equally spaced on a logarithmic scale.

        As many are measured together as one process would. The walk ends with those among which the loss is hopeless.
        """
        lowest, count = min(self.lowest * 1.01, 1.0), self.work.settings.points
        first = max(LARGEST_SHARE, (1 + lowest) / 2)
        last = max(SMALLEST_SHARE, lowest)
        shares = [first * (last / first) ** (i / (count - 1)) for i in range(count)]
        together = copies_at_once(self.work, self.work.layers, alone=True)
        rivals = [self.rivals(share) for share in shares]
        with self._measuring(rivals) as advance:
            while rivals and not any(self._is_hopeless(point) for point in self.points):
                now, rivals = rivals[:together], rivals[together:]
                self._best_of(now, advance=advance)
        return self.points

    def _is_hopeless(self, point: FrontierPoint) -> bool:
        settings, dense_loss = self.work.settings, self.dense.measurement().loss
        margin = max(settings.loss_margin_of(dense_loss), default_loss_margin(dense_loss))
        limit = settings.tolerance + HOPELESS * margin
        return math.isfinite(point.loss_change) and point.loss_change - PROOF * point.loss_change_error > limit

    def measure_shares(
        self, shares: Iterable[float], then: Callable[[FrontierPoint, nn.Module], None] = lambda *_: None
    ) -> list[FrontierPoint]:
        """The points of several shares of the cost, measured together, with the progress shown.

        Args:
            shares: shares of the dense cost.
            then: called with every point that is new, and its model.
        """
        rivals = [self.rivals(share) for share in shares]
        with self._measuring(rivals) as advance:
            return self._best_of(rivals, then, advance)

    def _measuring(self, rivals: Sequence[Sequence[Mapping[str, int]]]) -> AbstractContextManager[Callable[[], None]]:
        return self.work.stage("frontier", len({ranks_key(ranks) for group in rivals for ranks in group}))

    def refine(self, chosen: FrontierPoint | None, accept: Callable[[FrontierPoint], bool]) -> FrontierPoint | None:
        """Bisect between a point, None for the dense model, and the next smaller one for one that is accepted."""
        high = 1.0 if chosen is None else chosen.keep
        low = max((point.keep for point in self.points if point.keep < high), default=None)
        for _ in range(self.work.settings.refinements if low is not None else 0):
            assert low is not None
            trial = self.at(math.sqrt(low * high))
            if not low < trial.keep < high:
                break
            if accept(trial):
                chosen, high = trial, trial.keep
            else:
                low = trial.keep
        return chosen

    def _point(self, ranks: Mapping[str, int], compressed: nn.Module, outcome: Outcome) -> FrontierPoint:
        work = self.work
        layers = work.layers.items()
        measured, dense = outcome.measurement(), self.dense.measurement()
        loss_error = paired_error(*loss_differences(outcome, self.dense))
        scores = score_differences(outcome, self.dense)
        score_change, score_error = (None, None) if scores is None else paired_change(*scores)
        predictions = [(work.curves[name], rank - 1) for name, rank in ranks.items()]
        return FrontierPoint(
            keep=sum(work.cost(layer, ranks.get(name)) for name, layer in layers) / work.dense_cost,
            ranks=dict(ranks),
            params_model=parameter_count(compressed),
            params_layers=sum(
                layer.candidate.low_rank_params(ranks[name]) if name in ranks else layer.candidate.dense_params
                for name, layer in layers
            ),
            flops_layers=sum(layer.flops(ranks.get(name)) for name, layer in layers),
            predicted=sum(float(curve.change[i]) for curve, i in predictions),
            predicted_error=math.sqrt(sum(float(curve.prediction.standard_error[i]) ** 2 for curve, i in predictions)),
            loss=measured.loss,
            loss_change=measured.loss - dense.loss,
            loss_change_error=loss_error,
            score=measured.score,
            score_change=score_change,
            score_change_error=score_error,
            within_range=all(bool(curve.allowed[i]) for curve, i in predictions),
        )
