r"""Factors for given ranks, fitted to the inputs that the layers will really see.

Layers are replaced in execution order. Once layers upstream are replaced, a layer sees inputs y instead of x. The best
matrix of rank k for those inputs,

    min E || S^(1/2) (W x - W_k y) ||^2,

is found in closed form: T = W C B^(-1) with C = E[x y'] and B = E[y y'] is the least-squares answer without the rank
constraint, and W_k its truncation in the metric of S and B. Both moments are damped towards the identity, so that
directions without evidence keep the weight W. No labels, no gradient steps.

Every layer sees the replacements of *all* layers before it, at the price of one forward pass of both models: the passes
of all batches run in lockstep (:mod:`lrf_lightning.solver.running.lockstep`), and when all of them stand before a layer
it is solved and takes its place. A layer that runs several times in a pass would have to be fitted before its later
inputs are known; it gets the factors of its dense inputs. Several compressed models share the passes of the dense one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lrf_lightning.distributed import ALONE, Processes
from lrf_lightning.modules import LowRankModule
from lrf_lightning.solver.factors.conv_orders import best_factors, layer_factors
from lrf_lightning.solver.factors.factorization import divided
from lrf_lightning.solver.layers.layer_statistics import LayerStatistics
from lrf_lightning.solver.layers.moments import Moment
from lrf_lightning.solver.layers.rows import UnreadableRowsError
from lrf_lightning.solver.layers.statistics import RowSampler
from lrf_lightning.solver.running.batch_contents import batch_size, to_device
from lrf_lightning.solver.running.evaluation import Batches, LossFunction, evaluation_mode
from lrf_lightning.solver.running.hooks import first_tensor
from lrf_lightning.solver.running.lockstep import Run, pause, runs, unlocked
from lrf_lightning.solver.running.own_attributes import Attributes, OwnAttributes
from lrf_lightning.surgery import replace_module

__all__ = ["can_be_fitted", "compensated_target", "fit_layers"]


def fit_layers(
    model: nn.Module,
    copies: Sequence[tuple[nn.Module, Mapping[str, int]]],
    layers: Mapping[str, LayerStatistics],
    *,
    metric: str,
    damping: float,
    compensation: bool,
    loss: LossFunction,
    batches: Batches,
    device: torch.device,
    sampler: RowSampler,
    processes: Processes = ALONE,
    owners: Mapping[str, int] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Replace layers in copies of a model by factors of the given ranks.

    Args:
        model: dense model on ``device``; as it was on return.
        copies: copies of it, in which layers upstream may have been replaced already, each with the ranks of its
            layers by name; layers that are missing there stay dense, others than those of ``layers`` are passed over.
        layers: statistics of the layers to replace, by name, in execution order.
        metric: metric of the factorization.
        damping: relative damping of the moments.
        compensation: whether factors are fitted to the inputs of the compressed model.
        loss: the user's loss; only its forward pass is used.
        batches: this process's calibration data; all of it is in use at once.
        device: where batches are moved to.
        sampler: chooses rows.
        processes: who else works on other batches.
        owners: the process that solves each layer, by name; the first one by default.
        advance: called after every layer.
    """

    def factors_of(name: str, rank: int, evidence: _Evidence | None) -> tuple[Tensor, Tensor]:
        layer = layers[name]
        target, inputs = layer.candidate.matrices().double(), layer.inputs.known_mean
        if evidence is not None and evidence.inputs.rows > 0:
            inputs, target = evidence.inputs.mean, evidence.target(target, damping)
        inputs = None if metric == "euclidean" else inputs
        outputs = layer.gradients.mean if metric == "fisher" else None
        factors = layer_factors(layer.candidate, target, inputs, outputs, damping=damping, max_rank=rank)
        return best_factors(layer.candidate, factors, rank, target, inputs, damping=damping)

    def solved(name: str, rank: int, evidence: _Evidence | None) -> LowRankModule:
        candidate, owner = layers[name].candidate, (owners or {}).get(name, 0)
        rows, columns = candidate.sides
        shapes = (candidate.groups, rows, rank), (candidate.groups, rank, columns)
        solution = processes.patiently(
            f"solving {name!r}", lambda: factors_of(name, rank, evidence) if processes.rank == owner else None
        )
        factors = solution or tuple(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes)
        processes.broadcast_(factors, owner)
        advance()
        return candidate.stand_in(*factors)

    wanted = [(copy, {name: ranks[name] for name in layers if name in ranks}) for copy, ranks in copies]
    processes.agree(
        {f"the ranks of {name!r}": str([ranks.get(name) for _, ranks in wanted]) for name in layers},
        "Different processors round differently; use the same kind on all processes, or compress on one process",
    )
    fitted = {name: layer for name, layer in layers.items() if compensation and can_be_fitted(layer)}
    for copy, ranks in wanted:
        for name in ranks:
            if name not in fitted:
                _replace(copy, name, solved(name, ranks[name], None))
    if fitted:
        targets = [_Target(copy, {n: rank for n, rank in ranks.items() if n in fitted}) for copy, ranks in wanted]
        _Fitting(fitted, solved, sampler, processes).run(model, targets, loss, batches, device)
        for target in targets:
            for name, new in target.replacements.items():
                _replace(target.model, name, new)


def _replace(model: nn.Module, name: str, new: LowRankModule) -> None:
    # factors are made while the dense model is in evaluation mode
    replace_module(model, name, new.train(model.get_submodule(name).training))


def can_be_fitted(layer: LayerStatistics) -> bool:
    """Whether a layer is replaced before it runs again, so that its inputs are known when it is solved.

    Nor is there anything to fit where only a diagonal of the inputs is known: the indices that an embedding looks up do
    not depend on other layers.
    """
    return not layer.repeated and not layer.candidate.twins and not layer.inputs.diagonal


def compensated_target(
    weight: Tensor,  # (g, m, n)
    cross_moment: Tensor,  # (g, n, n), E[x y']
    input_moment: Tensor,  # (g, n, n), E[y y']
    damping: float,
) -> Tensor:
    """The damped least-squares weight W (C + e I)(B + e I)^(-1) for the inputs y, in float64, shape (g, m, n)."""
    size = input_moment.shape[-1]
    mean = input_moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(size, dtype=torch.float64, device=weight.device)
    if damping == 0:  # null directions need a pseudo-inverse
        inverse = torch.linalg.pinv(input_moment, hermitian=True)
        correction: Tensor = cross_moment @ inverse + eye - input_moment @ inverse
        return weight.double() @ correction
    ridge = damping * torch.where(mean > 0, mean, 1.0) * eye  # a zero moment carries no evidence: the weight stays
    # the weight comes first, since it has far fewer rows than the moments
    weighted = weight.double() @ (cross_moment + ridge)
    return divided(weighted, input_moment + ridge)


@dataclass
class _Evidence:
    """Moments E[x y'] and E[y y'] of one layer, and whether the rows of both models match; else only y counts."""

    cross: Moment = field(default_factory=Moment)
    inputs: Moment = field(default_factory=Moment)
    matches: bool = True

    def target(self, weight: Tensor, damping: float) -> Tensor:
        """What is approximated for the inputs y."""
        if not self.matches:
            return weight
        return compensated_target(weight, self.cross.mean, self.inputs.mean, damping)


@dataclass
class _Target:
    """A compressed copy in the making, the ranks of the layers to be fitted, and the factors found so far."""

    model: nn.Module
    ranks: Mapping[str, int]
    replacements: dict[str, LowRankModule] = field(default_factory=dict)


@dataclass(frozen=True)
class _Passes:
    """One batch: its place among this process's batches, its size, and one run per model."""

    position: int
    size: int
    dense: Run
    compressed: list[Run]


@dataclass
class _Fitting:
    """Solves layers one after the other while the passes of all batches stand before them."""

    layers: Mapping[str, LayerStatistics]
    solved: Callable[[str, int, _Evidence | None], LowRankModule]
    sampler: RowSampler
    processes: Processes = ALONE
    done: set[str] = field(default_factory=set)

    def run(
        self, model: nn.Module, targets: list[_Target], loss: LossFunction, batches: Batches, device: torch.device
    ) -> None:
        """Find the factors of every layer of every target; the targets still hold the dense layers on return."""
        sizes: list[int] = []

        def passes() -> Iterator[Run]:
            models = [(each, Attributes(each)) for each in (model, *(target.model for target in targets))]
            for batch in batches:
                sizes.append(batch_size(batch))
                for each, attributes in models:
                    # a batch for every model, since one that has been changed halfway would reach the others
                    own = to_device(batch, device)
                    yield Run(partial(loss, each, own), OwnAttributes(attributes))

        with ExitStack() as stack:
            stack.enter_context(unlocked([model, *(target.model for target in targets)]))
            stack.enter_context(evaluation_mode(model))
            stack.enter_context(self._gates(model, self.layers, None))
            for target in targets:
                stack.enter_context(evaluation_mode(target.model))
                stack.enter_context(self._gates(target.model, target.ranks, target))
            stack.enter_context(torch.no_grad())
            with self.processes.together("reading the calibration data"):
                started = stack.enter_context(runs(passes()))
            count = 1 + len(targets)
            self._solve(
                [
                    _Passes(i, size, started[i * count], started[i * count + 1 : (i + 1) * count])
                    for i, size in enumerate(sizes)
                ],
                targets,
                device,
            )
        if device.type == "cuda" and hasattr(torch._C, "_cuda_clearCublasWorkspaces"):
            torch._C._cuda_clearCublasWorkspaces()  # those of the threads, which have ended

    def _solve(self, passes: list[_Passes], targets: list[_Target], device: torch.device) -> None:
        here = [passes] * len(targets)  # the batches that stand before the layer that was solved last
        for name, layer in self.layers.items():
            wanted = [index for index, target in enumerate(targets) if name in target.ranks]
            evidence = {index: _Evidence() for index in wanted}
            with self.processes.together(f"running to {name!r}"):
                for index in wanted:
                    for batch in here[index]:
                        batch.compressed[index].resume()
                    here[index] = [batch for batch in passes if _stands_before(batch.compressed[index], name)]
                for batch in passes:
                    there = [index for index in wanted if _stands_before(batch.compressed[index], name)]
                    self._observe(layer, batch, {index: evidence[index] for index in there})
            for index in wanted:
                found, rank = evidence.pop(index), targets[index].ranks[name]
                if self.processes.size > 1:
                    found.cross.merge(self.processes, device)
                    found.inputs.merge(self.processes, device)
                found.matches = all(self.processes.gather(found.matches))
                targets[index].replacements[name] = self.solved(name, rank, found)
            self.done.add(name)

    def _observe(self, layer: LayerStatistics, batch: _Passes, evidence: Mapping[int, _Evidence]) -> None:
        """Add one batch to the moments of the compressed models that stand before the layer."""
        name = layer.candidate.name
        if not evidence:
            return
        _advance_to(batch.dense, name)
        if not _stands_before(batch.dense, name):
            return
        number = self.processes.index(batch.position)
        before = batch.dense.event[1]
        x = self._rows(layer, before, batch.size, number)
        for index, moments in evidence.items():
            after = batch.compressed[index].event[1]
            if after.shape != before.shape:
                # other tokens are sent to this expert than before; where as many are, it may be by chance
                moments.matches = False
                with suppress(UnreadableRowsError):
                    y = self._rows(layer, after, batch.size, number)
                    moments.inputs.add(y, y)
                continue
            y = self._rows(layer, after, batch.size, number)
            moments.cross.add(x, y)
            moments.inputs.add(y, y)

    def _rows(self, layer: LayerStatistics, x: Tensor, size: int, index: int) -> Tensor:
        available = layer.reader.rows_per_sample(x, size)
        return layer.reader.inputs(x, self.sampler.positions(layer.candidate, available, index, x.device), size)

    @contextmanager
    def _gates(self, model: nn.Module, names: Iterable[str], target: _Target | None) -> Iterator[None]:
        """Let layers pause before they run, and those of a target run their replacement.

        The tree of modules stays as it is, since a step may be in the middle of it.
        """
        modules = dict(model.named_modules(remove_duplicate=False))
        gated = {name: modules[name] for name in names}
        before = {name: vars(module).get("forward") for name, module in gated.items()}
        for name, module in gated.items():
            module.forward = self._gate(name, module.forward, target)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for name, module in gated.items():
                module.__dict__.pop("forward", None)
                if before[name] is not None:
                    module.__dict__["forward"] = before[name]

    def _gate(self, name: str, forward: Callable[..., Any], target: _Target | None) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if name not in (self.done if target is None else target.replacements):
                pause((name, first_tensor(name, args, kwargs)))
            return (forward if target is None else target.replacements[name])(*args, **kwargs)

        return run


def _stands_before(run: Run, name: str) -> bool:
    return not run.finished and run.event is not None and run.event[0] == name


def _advance_to(run: Run, name: str) -> None:
    """Let a dense pass go on until it stands before a layer, or ends without having met it."""
    while not run.finished and not _stands_before(run, name):
        run.resume()
