"""What a solve costs: stages against plain passes, growth with depth and data, memory, decompositions, and a 7 B plan.

Times are processor time of single-threaded processes, so that other work on the machine matters little; the unit is one
plain forward and backward pass over the same calibration data, as in training. ``python -m benchmarks.cost`` writes its
part of ``RESULTS.md``.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import resource
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.nets import NETS
from benchmarks.results import write_section
from lrf_lightning import StepOutput, compress
from lrf_lightning.solver.factors.factorization import factorize

FOLDER = Path(__file__).parent
WIDTH, SAMPLES, BATCH = 128, 1000, 250
DEPTHS, SAMPLE_COUNTS = (8, 16, 32, 64), (500, 1000, 2000, 4000)
SHAPES = ((128, 1152), (512, 512), (768, 3072), (1024, 1024))
MEMORY_GIB = (4.0, 0.06, 0.015)
Batches = list[tuple[Tensor, Tensor]]


def main() -> None:
    """Measure, then write the section."""
    context = multiprocessing.get_context("spawn")
    # every measurement in a process of its own, so that the peak of its memory is its own too
    with ProcessPoolExecutor(
        1, context, max_tasks_per_child=1, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        parts = [
            pool.submit(part, *arguments).result()
            for part, arguments in (
                (_stages, ()),
                (_growth, ("layers",)),
                (_growth, ("samples",)),
                (_decompositions, ()),
            )
        ]
        parts.append(_memory([pool.submit(_peak, limit).result() for limit in (None, *MEMORY_GIB)]))
    head = (
        f"`python -m benchmarks.cost`, {date.today()}, {platform.machine()}, one thread, torch {torch.__version__}. "
        "Processor time; a plain pass is forward and backward over the calibration data with gradients of the weights."
    )
    write_section(FOLDER / "RESULTS.md", "Cost", "\n\n".join([head, *parts, _seven_billion()]))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> StepOutput:
    """Cross-entropy and accuracy of every sample."""
    logits = model(batch[0])
    return StepOutput(F.cross_entropy(logits, batch[1], reduction="none"), (logits.argmax(1) == batch[1]).float())


class Chain(nn.Module):
    """Residual linear layers of one width and a head."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (batch, tokens, width) to logits (batch, 10)."""
        for layer in self.layers:
            x = x + torch.relu(layer(x)) / len(self.layers)
        return self.head(x.mean(1))


def _images(samples: int, seed: int = 0) -> Batches:
    torch.manual_seed(seed)
    return [(torch.randn(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))) for _ in range(samples // BATCH)]


def tokens(samples: int, width: int, seed: int = 0) -> Batches:
    """Random tokens of shape (250, 16, width) and class indices, in batches."""
    torch.manual_seed(seed)
    return [(torch.randn(BATCH, 16, width), torch.randint(10, (BATCH,))) for _ in range(samples // BATCH)]


def _plain_pass(model: nn.Module, batches: Batches, repeats: int = 3) -> float:
    """Median seconds of one forward and backward pass, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        started = time.process_time()
        for batch in batches:
            model.zero_grad()
            loss(model, batch).loss.mean().backward()
        times.append(time.process_time() - started)
    return statistics.median(times[1:])


@dataclass
class _Stages:
    """Processor time and growth of the resident memory of every stage, told by the solver's own progress reports."""

    seconds: dict[str, float] = field(default_factory=dict)
    mebibytes: dict[str, float] = field(default_factory=dict)
    _current: str = ""
    _since: float = 0.0
    _base: float = 0.0

    def report(self, stage: str, done: int, total: int) -> None:
        """The callback for ``progress``."""
        if done == 0:
            self.close()
            self._current, self._since, self._base = stage, time.process_time(), _resident()

    def close(self) -> None:
        """End the stage that is running."""
        if self._current:
            spent = time.process_time() - self._since
            self.seconds[self._current] = self.seconds.get(self._current, 0.0) + spent
        self._current = ""

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Sample the resident memory in a thread of its own."""
        stop = threading.Event()

        def sample() -> None:
            while not stop.wait(0.005):
                stage, grown = self._current, _resident() - self._base
                if stage:
                    self.mebibytes[stage] = max(self.mebibytes.get(stage, 0.0), grown)

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.close()
            stop.set()
            thread.join()


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _solve(model: nn.Module, calibration: Batches, **settings: Any) -> _Stages:
    stages = _Stages()
    settings = {"objective": "budget", "keep": 0.5} | settings
    held_out = [[(torch.randn_like(x), y)] for x, y in calibration[:1] * 2]
    with stages.watched():
        compress(model, loss, calibration, *held_out, progress=stages.report, **settings)
    return stages


def _stages() -> str:
    model, calibration = NETS["resnet"]().eval(), _images(1500)
    plain = _plain_pass(model, calibration)
    base = _resident()
    _plain_pass(model, calibration[:1], 1)
    stages = _solve(model, calibration)
    lines = [
        f"**Stages**, ResNet with 0.69 M parameters, {len(calibration) * BATCH:,} calibration images in batches of "
        f"{BATCH}, one budget. A plain pass takes {plain:.1f} s and {_resident() - base:+.0f} MiB more than before it.",
        "",
        "| stage | plain passes | growth of the memory, MiB |",
        "|---|---|---|",
    ]
    lines += [
        f"| {stage} | {seconds / plain:.2f} | {stages.mebibytes.get(stage, 0.0):.0f} |"
        for stage, seconds in stages.seconds.items()
    ]
    lines.append(f"| whole solve | {sum(stages.seconds.values()) / plain:.2f} | |")
    return "\n".join(lines)


def _growth(what: str) -> str:
    counts = DEPTHS if what == "layers" else SAMPLE_COUNTS
    lines = [
        f"**{what.capitalize()}**, residual linear layers of width {WIDTH}, 16 tokens per sample, "
        + (f"{SAMPLES:,} samples." if what == "layers" else "16 layers."),
        "",
        f"| {what} | plain pass, s | solve, s | solve / plain pass | ms per {what[:-1]} |",
        "|---|---|---|---|---|",
    ]
    for count in counts:
        depth, samples = (count, SAMPLES) if what == "layers" else (16, count)
        model, batches = Chain(depth, WIDTH).eval(), tokens(samples, WIDTH)
        plain = _plain_pass(model, batches)
        solve = sum(_solve(model, batches).seconds.values())
        per = f"{1000 * solve / count:.3g}"
        lines.append(f"| {count:,} | {plain:.2f} | {solve:.2f} | {solve / plain:.1f} | {per} |")
    return "\n".join(lines)


def _multiply_adds(rows: int, columns: int) -> float:
    """Those of one decomposition; the cost model that shares the work out was fitted to times instead."""
    small, large = min(rows, columns), max(rows, columns)
    return 18.0 * small**3 + float(small) * large * (2 * small + large)


def _decompositions() -> str:
    lines = [
        "**Decompositions** in the metric of both moments, float64, against matrix products of as many multiply-adds: "
        "the products with both moments, and two eigendecompositions of the smaller side at 9 n^3 (Golub and Van Loan "
        "2013, section 8.3).",
        "",
        "| weight | factorize, ms | matrix products, ms | ratio |",
        "|---|---|---|---|",
    ]
    for rows, columns in SHAPES:
        torch.manual_seed(0)
        weight = torch.randn(1, rows, columns, dtype=torch.float64)
        moments = [moment(size) for size in (columns, rows)]
        ours = _median(lambda weight=weight, moments=moments: factorize(weight, *moments, damping=1e-2))  # type: ignore[misc]
        square = torch.randn(1024, 1024, dtype=torch.float64)
        product = _median(lambda square=square: square @ square)  # type: ignore[misc]
        products = product * _multiply_adds(rows, columns) / 1024**3
        lines.append(f"| {rows} x {columns} | {1000 * ours:.0f} | {1000 * products:.0f} | {ours / products:.1f} |")
    return "\n".join(lines)


def moment(size: int) -> Tensor:
    """A second moment of full rank, shape (1, size, size)."""
    x = torch.randn(2 * size, size, dtype=torch.float64)
    return (x.T @ x / len(x))[None]


def _median(function: Callable[[], object], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats + 1):
        started = time.process_time()
        function()
        times.append(time.process_time() - started)
    return statistics.median(times[1:])


def _peak(memory_gib: float | None) -> tuple[float | None, float, float]:
    """The setting, peak resident memory in MiB and processor seconds of a solve; without one, of plain passes."""
    model, batches = Chain(24, 768).eval(), tokens(500, 768)
    started = time.process_time()
    if memory_gib is None:
        _plain_pass(model, batches, 1)
    else:
        _solve(model, batches, memory_gib=memory_gib)
    return memory_gib, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, time.process_time() - started


def _memory(found: list[tuple[float | None, float, float]]) -> str:
    size = 8 * 2 * 768**2 / 2**30
    lines = [
        f"**Memory**, 24 linear layers of width 768 (moments of one: {size:.4f} GiB, of all: {24 * size:.2f} GiB), 500 "
        "samples of 16 tokens.",
        "",
        "| `memory_gib` | peak of the process, MiB | solve, s |",
        "|---|---|---|",
    ]
    for setting, peak, seconds in found:
        name = "plain forward and backward" if setting is None else f"{setting:g}"
        lines.append(f"| {name} | {peak:,.0f} | {'' if setting is None else f'{seconds:.0f}'} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class _Transformer:
    """A decoder of 7 billion parameters (Touvron et al. 2023, Llama 2) and the machine it would be compressed on."""

    width: int = 4096
    hidden: int = 11008
    blocks: int = 32
    vocabulary: int = 32000
    sequences: int = 256
    tokens: int = 2048
    gpus: int = 8
    # an H100's published peaks are 989e12 (bfloat16) and 67e12 (float64, matrix units); shares that are met in practice
    bfloat16: float = 0.4 * 989e12
    float64: float = 0.5 * 67e12
    eigen: float = 0.03 * 67e12
    memory_gib: float = 20.0

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Outputs and inputs of a block's linear layers."""
        return [(self.width, self.width)] * 4 + [(self.hidden, self.width)] * 2 + [(self.width, self.hidden)]

    @property
    def params(self) -> int:
        """Weights of the blocks and both tables."""
        return self.blocks * sum(m * n for m, n in self.shapes) + 2 * self.vocabulary * self.width


def _seven_billion() -> str:
    """Bytes, operations and hours per stage, from the algorithm's own counts."""
    plan = _Transformer()
    tokens = plan.sequences * plan.tokens
    moments = plan.blocks * sum(8 * (m * m + n * n) for m, n in plan.shapes)
    groups = -(-moments // int(plan.memory_gib * 2**30))
    forward = 2.0 * plan.params * tokens
    rows = 32  # sampled rows per feature, the default
    products = plan.blocks * sum(2.0 * rows * (max(m, n)) * (m * m + n * n) for m, n in plan.shapes)
    decompositions = plan.blocks * sum(2 * _multiply_adds(m, n) for m, n in plan.shapes)
    solves = plan.blocks * sum(2.0 * (n**3 / 3 + n * n * m) for m, n in plan.shapes)
    curves = plan.blocks * sum(2.0 * tokens * (m * n // (m + n)) * (m + n) for m, n in plan.shapes)
    activations = 6 * plan.tokens * plan.hidden * 2 * plan.sequences / plan.gpus
    stages = [
        (f"statistics, {groups} groups", groups * 2 * forward, plan.bfloat16, moments / groups),
        ("products of the moments", products, plan.bfloat16 / 16, moments / groups),
        ("decompositions for the curves", decompositions, plan.eigen, moments / groups),
        (f"curves, {groups} groups", groups * 2 * forward + curves, plan.bfloat16, moments / groups),
        ("perturbation range, 24 probes of 256 sequences", 24 * forward, plan.bfloat16, 0),
        (
            f"statistics again for the compensation, {groups} groups",
            groups * 2 * forward,
            plan.bfloat16,
            moments / groups,
        ),
        (f"compensation, {groups} groups", groups * 2 * forward, plan.bfloat16, activations),
        ("its least squares", solves, plan.float64, 0),
        ("its decompositions", decompositions, plan.eigen, 0),
        ("one evaluation of 1,000 sequences", 1000 / plan.sequences * forward, plan.bfloat16, 0),
    ]
    lines = [
        f"**A model of 7 billion parameters, on paper** (nothing here was run): {plan.blocks} blocks of width "
        f"{plan.width}, {plan.hidden} hidden, {plan.params / 1e9:.2f} G parameters ({2 * plan.params / 2**30:.1f} GiB "
        f"in bfloat16, twice for the dense and the compressed copy), {plan.sequences} calibration sequences of "
        f"{plan.tokens:,} tokens dealt out to {plan.gpus} GPUs. All moments together would take "
        f"{moments / 2**30:.0f} GiB; with `memory_gib={plan.memory_gib:g}` they are taken in {groups} groups. Assumed "
        "per GPU: 40 % of 989 Tflop/s for passes of the model in bfloat16, a sixteenth of that for moments in float32, "
        "half of 67 Tflop/s in float64 for products, 3 % of that for eigenvalues.",
        "",
        "| stage | operations | hours on eight GPUs | GiB per GPU besides the models |",
        "|---|---|---|---|",
    ]
    total = 0.0
    for name, operations, rate, size in stages:
        hours = operations / rate / plan.gpus / 3600
        total += hours
        lines.append(f"| {name} | {operations:.1e} | {hours:.2f} | {f'{size / 2**30:.0f}' if size else ''} |")
    lines.append(f"| one budget, one measured point | | {total:.1f} | |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
