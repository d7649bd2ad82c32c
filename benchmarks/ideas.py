"""What each part of the solver, and each idea that was tried beside it, does to the test loss at equal size.

One change at a time on the regularised ResNet of ``benchmarks.quality``; all of it in closed form. ``python -m
benchmarks.ideas`` goes on where an earlier run stopped and writes ``ideas.csv`` and its part of ``RESULTS.md``.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.fashion import batches, splits
from benchmarks.quality import loss
from benchmarks.results import append_row, read_rows, write_section
from benchmarks.training import trained
from lrf_lightning import Settings, restore_dense
from lrf_lightning.modules import LowRankModule
from lrf_lightning.solver.factors import compressed_copies
from lrf_lightning.solver.factors.conv_orders import best_factors, layer_factors
from lrf_lightning.solver.factors.factorization import damped
from lrf_lightning.solver.joint import calibrated
from lrf_lightning.solver.layers.layer_statistics import LayerStatistics
from lrf_lightning.solver.layers.statistics import collect_statistics
from lrf_lightning.solver.points.frontier import Frontier
from lrf_lightning.solver.running.evaluation import Outcome, evaluate
from lrf_lightning.surgery import factorized, replace_module

FOLDER = Path(__file__).parent
CPU = torch.device("cpu")
KEPT, SEEDS = (0.3, 0.15), (0,)
FIELDS = ["idea", "seed", "keep", "loss_change", "accuracy_change"]
Batches = list[tuple[Tensor, Tensor]]


@dataclass
class Trial:
    """A calibrated dense model and one allocation of it.

    Attributes:
        frontier: builds compressed models.
        ranks: the allocation.
        calibration: the calibration batches.
        unlabelled: further images that no method may look at the labels of.
    """

    frontier: Frontier
    ranks: Mapping[str, int]
    calibration: Batches
    unlabelled: Batches

    def build(self) -> nn.Module:
        """A compressed model; what was changed in the workspace takes effect."""
        self.frontier._latest = None
        return self.frontier.build(self.ranks)

    def statistics(
        self, model: nn.Module, data: Batches, step: Callable[..., Any] = loss
    ) -> dict[str, LayerStatistics]:
        """Moments of all factorized layers in a model of the same layers, low-rank or dense."""
        work = self.frontier.work
        candidates = [work.layers[name].candidate for name in self.ranks]
        return collect_statistics(model, candidates, step, data, CPU, sampler=work.sampler)


Idea = Callable[[Trial], nn.Module]


def re_estimated_gradients(trial: Trial) -> nn.Module:
    """The output metric S of every layer measured on the compressed model, then all layers fitted anew."""
    work, kept = trial.frontier.work, dict(trial.frontier.work.layers)
    found = trial.statistics(trial.build(), trial.calibration)
    for name in trial.ranks:
        work.layers[name] = replace(kept[name], gradients=found[name].gradients)
    compressed = trial.build()
    work.layers.update(kept)
    return compressed


def first_order_in_the_target(trial: Trial) -> nn.Module:
    """Weights moved along the natural gradient, -S^(-1) G A^(-1) of the mean gradient G, before the fit.

    The length is that of the lowest loss on the selection split among a few.
    """
    work, kept = trial.frontier.work, dict(trial.frontier.work.layers)
    moments = trial.statistics(work.model, trial.calibration)
    gradients = _weight_gradients(work.model, trial.calibration, loss)
    built = []
    for length in (1e-4, 1e-3, 1e-2):
        for name in trial.ranks:
            candidate = kept[name].candidate
            module = copy.deepcopy(candidate.module)
            shift = _natural(moments[name], _as_matrices(candidate.module, gradients[name]))
            with torch.no_grad():
                weight = module.get_parameter("weight")
                weight.sub_(length * shift.reshape(weight.shape).to(weight.dtype))
            work.layers[name] = replace(kept[name], candidate=replace(candidate, module=module))
        compressed = trial.build()
        built.append((work.evaluate(compressed, "selection").measurement().loss, compressed))
        work.layers.update(kept)
    return min(built, key=lambda item: item[0])[1]


def bias_correction(trial: Trial) -> nn.Module:
    """Every layer gets a bias that restores the mean of its dense output, layer after layer."""
    compressed, dense = trial.build(), trial.frontier.work.model
    for name in trial.ranks:
        module = compressed.get_submodule(name)
        assert isinstance(module, LowRankModule)
        difference = _mean_output(dense, name, trial.calibration) - _mean_output(compressed, name, trial.calibration)
        bias = module._parameters.get("bias")
        module.bias = nn.Parameter(difference if bias is None else bias.detach() + difference)
    return compressed


def batch_norm(trial: Trial) -> nn.Module:
    """Running statistics of batch norms estimated anew on the calibration images."""
    compressed = trial.build()
    norms = [module for module in compressed.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
        norm.train()
    with torch.no_grad():
        for images, _ in trial.calibration:
            compressed(images)
    return compressed.eval()


def augmented(trial: Trial) -> nn.Module:
    """The fit also sees every calibration image flipped."""
    extra = [(images.flip(-1), labels) for images, labels in trial.calibration]
    return _fitted_on(trial, trial.calibration + extra)


def unlabelled(trial: Trial) -> nn.Module:
    """The fit also sees 3,000 further images, without labels."""
    return _fitted_on(trial, trial.calibration + trial.unlabelled)


def gauss_newton(trial: Trial) -> nn.Module:
    """One Kronecker-preconditioned step of the factors towards the original's outputs, its length by line search."""
    compressed, dense = trial.build(), trial.frontier.work.model
    with torch.no_grad():
        data = [(images, dense(images).log_softmax(1)) for images, _ in trial.calibration]
    multiplied = restore_dense(copy.deepcopy(compressed))
    moments = trial.statistics(multiplied, data, divergence)
    gradients = _weight_gradients(multiplied, data, divergence)
    best = (_mean(compressed, data), compressed)
    for length in (0.01, 0.05, 0.25, 1.0):
        corrected = copy.deepcopy(compressed)
        for name, rank in trial.ranks.items():
            layer = moments[name]
            module = multiplied.get_submodule(name)
            weight = _as_matrices(module, module.get_parameter("weight").detach())
            target = weight.double() - length * _natural(layer, _as_matrices(module, gradients[name]))
            order, inputs = layer.candidate, layer.inputs.mean
            factors = layer_factors(order, target, inputs, layer.gradients.mean, damping=1e-2, max_rank=rank)
            best_of_rank = best_factors(order, factors, rank, target, inputs, damping=1e-2)
            replace_module(corrected, name, factorized(module, *best_of_rank, split=order.split))
        best = min(best, (_mean(corrected, data), corrected), key=lambda item: item[0])
    return best[1]


def divergence(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Kullback-Leibler divergence of every sample from the original's outputs."""
    return F.kl_div(model(batch[0]).log_softmax(1), batch[1], log_target=True, reduction="none").sum(1)


SETTINGS: dict[str, dict[str, Any]] = {
    "as built": {},
    "without the compensation": {"compensation": False},
    "kernel first in all convolutions": {"conv_order": "kernel_first"},
    "pointwise first in all convolutions": {"conv_order": "pointwise_first"},
    "spatial split in all convolutions": {"conv_order": "spatial_split"},
    "new batch-norm statistics where selection falls": {"batch_norm": True},
    "without the perturbation range": {"probes": False},
    "without the first-order term": {"first_order_errors": 1e6},
    "first-order term at face value": {"first_order_errors": 0.0},
    "metric of the inputs only": {"metric": "activation"},
    "damping 0.003 instead of 0.01": {"damping": 3e-3},
    "damping 0.03 instead of 0.01": {"damping": 3e-2},
    "four times the sampled rows": {"rows_per_feature": 128},
}
IDEAS: dict[str, Idea] = {
    "output metric measured on the compressed model": re_estimated_gradients,
    "first-order term inside the target": first_order_in_the_target,
    "bias correction": bias_correction,
    "new batch-norm statistics always": batch_norm,
    "flipped images in the fit": augmented,
    "3,000 unlabelled images in the fit": unlabelled,
    "Gauss-Newton step towards the original's outputs": gauss_newton,
}


def main() -> None:
    """Measure what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--csv", type=Path, default=FOLDER / "ideas.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        for name, keep, compressed, dense, test in _compressed(seed, options.csv):
            after = evaluate(compressed, loss, test, CPU)
            assert after.scores is not None
            assert dense.scores is not None
            changes = float((after.losses - dense.losses).mean()), float((after.scores - dense.scores).mean())
            row = dict(zip(FIELDS, (name, seed, f"{keep:g}", *(f"{change:+.5f}" for change in changes)), strict=True))
            append_row(options.csv, FIELDS, row)
            print(row, flush=True)
    write_section(FOLDER / "RESULTS.md", "Ideas", _report(read_rows(options.csv)))


def _compressed(seed: int, path: Path) -> Iterator[tuple[str, float, nn.Module, Outcome, Batches]]:
    done = {(row["idea"], row["seed"], row["keep"]) for row in read_rows(path)}
    names = [*SETTINGS, *IDEAS]
    missing = [(name, keep) for name in names for keep in KEPT if (name, str(seed), f"{keep:g}") not in done]
    if not missing:
        return
    data = splits(seed)
    model = trained("resnet", seed, data["train"], FOLDER / ".cache")
    parts = {name: batches(data[name]) for name in ("calibration", "selection", "verification")}
    test = batches(data["test"])
    dense = evaluate(model, loss, test, CPU)
    extra = batches(data["train"])[:12]
    for settings, group in itertools.groupby(missing, key=lambda item: item[0] if item[0] in SETTINGS else "as built"):
        work, selection = calibrated(model, loss, parts, settings=Settings(objective="budget", **SETTINGS[settings]))
        # all moments stay, since the ideas build models of their own
        frontier = Frontier(work, selection)
        for name, keep in group:
            trial = Trial(frontier, frontier.at(keep).ranks, list(parts["calibration"]), extra)
            yield name, keep, IDEAS.get(name, Trial.build)(trial), dense, test


def _fitted_on(trial: Trial, data: Batches) -> nn.Module:
    with patch.object(compressed_copies, "compensation_batches", lambda work: data):
        return trial.build()


def _natural(layer: LayerStatistics, gradient: Tensor, damping: float = 1e-2) -> Tensor:
    """S^(-1) G A^(-1) with damped moments and the number of rows, shape (g, m, n)."""
    sides = []
    for moment in (layer.gradients.mean, layer.inputs.mean):
        scale = moment.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
        sides.append(torch.linalg.inv(damped(moment, damping) * scale))
    return sides[0] @ gradient.double() @ sides[1] / layer.rows_per_sample


def _weight_gradients(model: nn.Module, data: Batches, step: Callable[..., Any]) -> dict[str, Tensor]:
    """Gradient of the mean loss with respect to the weight of every layer, by the layer's name."""
    model.zero_grad()
    samples = sum(len(batch[0]) for batch in data)
    for batch in data:
        output = step(model, batch)
        (getattr(output, "loss", output).sum() / samples).backward()
    found = {
        name: module._parameters["weight"].grad.clone()  # type: ignore[union-attr]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }
    model.zero_grad()
    return found


def _as_matrices(module: nn.Module, weight: Tensor) -> Tensor:
    groups = getattr(module, "groups", 1)
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def _mean_output(model: nn.Module, name: str, data: Batches) -> Tensor:
    outputs: list[Tensor] = []

    def observe(_module: nn.Module, _args: Any, output: Tensor) -> None:
        outputs.append(output.transpose(0, 1).flatten(1).mean(1))

    handle = model.get_submodule(name).register_forward_hook(observe)
    with torch.no_grad():
        for batch in data:
            model(batch[0])
    handle.remove()
    return torch.stack(outputs).mean(0)


def _mean(model: nn.Module, data: Batches) -> float:
    with torch.no_grad():
        return float(torch.cat([divergence(model, batch) for batch in data]).mean())


def _report(rows: list[dict[str, str]]) -> str:
    def mean(idea: str, keep: float, name: str) -> float | None:
        found = [float(row[name]) for row in rows if row["idea"] == idea and row["keep"] == f"{keep:g}"]
        return sum(found) / len(found) if found else None

    seeds = ", ".join(sorted({row["seed"] for row in rows}))
    lines = [
        f"`python -m benchmarks.ideas`, {date.today()}, the regularised ResNet of the section Quality, seeds {seeds}. "
        "One change at a time; change of the test loss / of the accuracy in points at the share of parameters kept, "
        "means over the seeds, and the change of the loss relative to the solver as it is built.",
        "",
        f"| | {' | '.join(f'kept {keep:g} | ratio' for keep in KEPT)} |",
        "|---" * (2 * len(KEPT) + 1) + "|",
    ]
    for idea in (*SETTINGS, *IDEAS):
        cells = []
        for keep in KEPT:
            change, base = mean(idea, keep, "loss_change"), mean("as built", keep, "loss_change")
            accuracy = mean(idea, keep, "accuracy_change")
            if change is None or base is None or accuracy is None:
                cells += ["", ""]
            else:
                cells += [f"{change:+.4f} / {100 * accuracy:+.2f}", f"{change / base:.2f}"]
        lines.append(f"| {idea} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
