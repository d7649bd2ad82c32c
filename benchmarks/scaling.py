"""How a solve spreads over processes: one and two of them here, and a simulation of large models on many.

``python -m benchmarks.scaling`` runs the solver on a chain of linear layers with one and two gloo processes of one
thread each, checks the cost model of the decompositions against measured times, and simulates the longest process for
real models at 8, 64 and 512 processes from those costs. It writes its part of ``RESULTS.md``.
"""

from __future__ import annotations

import gc
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Mapping
from datetime import date
from pathlib import Path

import torch
from torch import distributed as dist
from torch import multiprocessing as mp

from benchmarks.cost import Chain, loss, moment, tokens
from benchmarks.results import write_section
from lrf_lightning import compress
from lrf_lightning.distributed import assigned
from lrf_lightning.solver.factorization import decomposition_cost, factorize
from lrf_lightning.solver.statistics import Moment

FOLDER = Path(__file__).parent
DEPTH, WIDTH, SAMPLES = 24, 384, 2000
SHALLOW, NARROW, GROUP = 12, 128, 3  # for the statistics in memory
SIDES = ((64, 64), (64, 576), (128, 1152), (256, 256), (256, 2304), (512, 512), (512, 2048), (768, 768), (768, 3072))
SHAPES = tuple((1, *sides) for sides in SIDES)
WORLDS = (8, 64, 512)
Shape = tuple[int, int, int]  # groups, output side, input side


def main() -> None:
    """Measure, simulate, and write the section."""
    parts = [_two_processes(), _memory(), *_cost_model()]
    head = f"`python -m benchmarks.scaling`, {date.today()}, {platform.machine()}, torch {torch.__version__}."
    write_section(FOLDER / "RESULTS.md", "Scaling", "\n\n".join([head, *parts]))


def _two_processes() -> str:
    lines = [
        f"**One and two processes** with gloo, one thread each: {DEPTH} linear layers of width {WIDTH}, {SAMPLES:,} "
        "calibration samples of 16 tokens in batches of 250, one budget. Medians of three runs; the peak is that of "
        "the process. The processor time of a process is what it would take on a core of its own.",
        "",
        "| processes | wall clock, s | processor time of the busiest, s | speed-up by processor time | peak, MiB |",
        "|---|---|---|---|---|",
    ]
    base = 0.0
    for world in (1, 2):
        runs = [_run(world) for _ in range(3)]
        wall = statistics.median(max(seconds for seconds, _, _ in run) for run in runs)
        work = statistics.median(max(seconds for _, seconds, _ in run) for run in runs)
        peak = max(memory for run in runs for _, _, memory in run)
        base = base or work
        lines.append(f"| {world} | {wall:.1f} | {work:.1f} | {base / work:.2f} | {peak:,.0f} |")
    return "\n".join(lines)


def _memory() -> str:
    """Statistics in the memory of every process, counted whenever the solver reports progress."""
    layer = 8 * 2 * NARROW**2
    lines = [
        f"**Statistics in memory**: {SHALLOW} linear layers of width {NARROW} and `memory_gib` set to the moments of "
        f"{GROUP} of them ({GROUP * layer / 2**20:.1f} MiB; all layers take {SHALLOW * layer / 2**20:.1f} MiB). The "
        "peak is counted over all stages whenever the solver reports its progress.",
        "",
        "| processes | largest peak of a process, MiB | in layers |",
        "|---|---|---|",
    ]
    for world in (1, 2, 3):
        with tempfile.TemporaryDirectory() as folder:
            mp.start_processes(_counting_process, (world, folder), nprocs=world, start_method="spawn")
            peak = max(torch.load(Path(folder) / f"{rank}.pt") for rank in range(world))
        lines.append(f"| {world} | {peak / 2**20:.1f} | {peak / layer:.1f} |")
    return "\n".join(lines)


def _counting_process(rank: int, world: int, folder: str) -> None:
    _join(rank, world, folder)
    model = Chain(SHALLOW, NARROW).eval()
    data = [tokens(count, NARROW, seed)[rank::world] for seed, count in enumerate((1000, 750, 750))]
    peak = 0

    def count(*_: object) -> None:
        nonlocal peak
        moments = [found for found in gc.get_objects() if type(found) is Moment]
        peak = max(peak, sum(moment.total.nbytes for moment in moments if moment.total is not None))

    limit = GROUP * 8 * 2 * NARROW**2 / 2**30
    compress(model, loss, *data, objective="budget", keep=0.5, speed="none", memory_gib=limit, progress=count)
    torch.save(peak, f"{folder}/{rank}.pt")
    _leave(world)


def _join(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world)
    torch.manual_seed(0)


def _leave(world: int) -> None:
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def _run(world: int) -> list[tuple[float, float, float]]:
    """Wall-clock seconds, processor seconds and peak memory in MiB of every process."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_process, (world, folder), nprocs=world, start_method="spawn")
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world)]


def _process(rank: int, world: int, folder: str) -> None:
    _join(rank, world, folder)
    model = Chain(DEPTH, WIDTH).eval()
    data = [tokens(count, WIDTH, seed)[rank::world] for seed, count in ((0, SAMPLES), (1, 500), (2, 500))]
    started, busy = time.perf_counter(), time.process_time()
    compress(model, loss, *data, objective="budget", keep=0.5)
    found = time.perf_counter() - started, time.process_time() - busy
    torch.save((*found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024), f"{folder}/{rank}.pt")
    _leave(world)


def _cost_model() -> list[str]:
    torch.set_num_threads(1)
    return cost_parts({shape: _factorize_seconds(shape) for shape in SHAPES})


def cost_parts(measured: Mapping[Shape, float]) -> list[str]:
    """Measured seconds against estimates, and the simulation that follows from them."""
    rates = {shape: seconds / decomposition_cost(*shape) for shape, seconds in measured.items()}
    rate = statistics.median(rates.values())
    lines = [
        "**The cost model of a decomposition** (`decomposition_cost`), which decides who decomposes what, against "
        f"measured times; one multiply-add is taken for {1e9 * rate:.3f} ns, the median.",
        "",
        "| weight | measured, ms | estimated, ms | measured / estimated |",
        "|---|---|---|---|",
    ]
    for shape, seconds in measured.items():
        estimate = rate * decomposition_cost(*shape)
        lines.append(
            f"| {shape[1]} x {shape[2]} | {1000 * seconds:.1f} | {1000 * estimate:.1f} | {seconds / estimate:.2f} |"
        )
    return [
        "\n".join(lines),
        _simulation(rate, measured),
    ]


def _factorize_seconds(shape: Shape) -> float:
    torch.manual_seed(0)
    weight, moments = torch.randn(shape), [moment(size) for size in (shape[2], shape[1])]
    times = []
    for _ in range(6):
        started = time.process_time()
        factorize(weight, *moments, damping=1e-2)
        times.append(time.process_time() - started)
    return statistics.median(times[1:])


def _simulation(rate: float, measured: Mapping[Shape, float]) -> str:
    """The longest process under the assignment by estimates, with measured times where the shape was measured."""
    errors = [seconds / (rate * decomposition_cost(*shape)) for shape, seconds in measured.items()]
    known = {tuple(sorted(shape[1:])): seconds for shape, seconds in measured.items()}
    lines = [
        "**Simulated**: decompositions for the curves dealt out by longest processing time first as estimated. A layer "
        "takes the time that was measured for its shape; layers of other shapes, which are all of those with a side "
        "above 3072, take their estimate times one of the factors measured above, drawn at random. Efficiency is the "
        "mean load over the largest; the critical path is the largest single decomposition, below which no number of "
        "processes can go. One core of this machine per process. Not in it: the second order of convolutions, and the "
        "compensation, whose layers follow each other and are solved one at a time whatever the number of processes.",
        "",
        "| model | layers | all, s | critical path, s | "
        + " | ".join(f"{world} processes, s (efficiency)" for world in WORLDS)
        + " |",
        "|---" * (4 + len(WORLDS)) + "|",
    ]
    generator = torch.Generator().manual_seed(0)
    for name, shapes in models().items():
        estimates = [rate * decomposition_cost(*shape) for shape in shapes]
        picks = torch.randint(len(errors), (len(shapes),), generator=generator).tolist()
        true = [
            known.get(tuple(sorted(shape[1:])), estimate * errors[pick])
            for shape, estimate, pick in zip(shapes, estimates, picks, strict=True)
        ]
        cells = []
        for world in WORLDS:
            loads = [0.0] * world
            for seconds, owner in zip(true, assigned(estimates, world), strict=True):
                loads[owner] += seconds
            cells.append(f"{max(loads):.1f} ({100 * sum(loads) / world / max(loads):.0f} %)")
        lines.append(f"| {name} | {len(shapes)} | {sum(true):.1f} | {max(true):.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def models() -> dict[str, list[Shape]]:
    """Shapes of the factorizable layers of known models, from the papers that introduced them."""
    return {
        "ResNet-50": _resnet50(),
        "ViT-B/16": [(1, 768, 768)] + 12 * [*4 * [(1, 768, 768)], (1, 3072, 768), (1, 768, 3072)] + [(1, 1000, 768)],
        "BERT-base": [(1, 768, 30522)] + 12 * [*4 * [(1, 768, 768)], (1, 3072, 768), (1, 768, 3072)],
        "7 billion parameters": 32 * [*4 * [(1, 4096, 4096)], *2 * [(1, 11008, 4096)], (1, 4096, 11008)]
        + [(1, 4096, 32000), (1, 32000, 4096)],
    }


def _resnet50() -> list[Shape]:
    shapes: list[Shape] = [(1, 64, 3 * 49)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(1, width, inputs), (1, width, 9 * width), (1, 4 * width, width)]
            shapes += [(1, 4 * width, inputs)] if block == 0 else []
            inputs = 4 * width
    return [*shapes, (1, 1000, 2048)]


if __name__ == "__main__":
    main()
