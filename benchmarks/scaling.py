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
from torch import nn

from benchmarks.cost import Chain, loss, moment, tokens
from benchmarks.results import write_section
from lrf_lightning import compress
from lrf_lightning.distributed import assigned
from lrf_lightning.solver.factors.conv_orders import decomposed, order_cost
from lrf_lightning.solver.layers.moments import Moment
from lrf_lightning.surgery import Candidate

FOLDER = Path(__file__).parent
DEPTH, WIDTH, SAMPLES = 24, 384, 2000
SHALLOW, NARROW, GROUP = 12, 128, 3  # for the statistics in memory
WORLDS = (8, 64, 512)
NOTHING = nn.Identity()


def shaped(rows: int, columns: int, kernel: tuple[int, ...] = ()) -> Candidate:
    """A linear layer or a convolution of which only the shape matters; ``columns`` has the kernel in it."""
    return Candidate("", "Conv2d" if kernel else "Linear", NOTHING, 1, rows, columns, kernel=kernel)


LINEAR = ((64, 64), (256, 256), (512, 512), (512, 2048), (768, 768), (768, 3072))
CONVOLUTIONS = ((64, 576), (128, 1152), (256, 2304))
LAYERS = (*(shaped(*sides) for sides in LINEAR), *(shaped(*sides, (3, 3)) for sides in CONVOLUTIONS))
TASKS = tuple(order for layer in LAYERS for order in layer.orders())


def main() -> None:
    """Measure, simulate, and write the section."""
    parts = [_two_processes(), _memory(), *_cost_model()]
    head = f"`python -m benchmarks.scaling`, {date.today()}, {platform.machine()}, torch {torch.__version__}."
    write_section(FOLDER / "RESULTS.md", "Scaling", "\n\n".join([head, *parts]))


def _two_processes() -> str:
    lines = [
        f"**One and two processes** with gloo, one thread each: {DEPTH} linear layers of width {WIDTH}, {SAMPLES:,} "
        "calibration samples of 16 tokens in batches of 250, one budget. Medians of three runs; the peak is that of "
        "the process. Two independent solves, of one process each, show what this machine takes from any two "
        "processes, whose cores share memory and perhaps more; the solver answers for the speed-up over one of these.",
        "",
        "| processes | wall clock, s | processor time of the busiest, s | peak, MiB |",
        "|---|---|---|---|",
    ]
    walls = []
    for world, solves in ((1, 1), (1, 2), (2, 1)):
        runs = [_run(world, solves) for _ in range(3)]
        walls.append(statistics.median(max(seconds for seconds, _, _ in run) for run in runs))
        work = statistics.median(max(seconds for _, seconds, _ in run) for run in runs)
        peak = max(memory for run in runs for _, _, memory in run)
        name = f"{world}" + (" (two solves side by side)" if solves == 2 else "")
        lines.append(f"| {name} | {walls[-1]:.1f} | {work:.1f} | {peak:,.0f} |")
    alone, beside, shared = walls
    over = f"{beside / shared:.2f} over a solve beside another, {alone / shared:.2f} over one alone"
    speed_up = f"Speed-up of two processes by wall clock: {over}."
    return "\n".join([*lines, "", speed_up])


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


def _run(world: int, solves: int) -> list[tuple[float, float, float]]:
    """Wall-clock seconds, processor seconds and peak memory in MiB of every process of some independent solves."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_process, (world, folder), nprocs=world * solves, start_method="spawn")
        return [torch.load(path) for path in sorted(Path(folder).glob("*.pt"))]


def _process(number: int, world: int, folder: str) -> None:
    rank = number % world
    _join(rank, world, folder)
    model = Chain(DEPTH, WIDTH).eval()
    data = [tokens(count, WIDTH, seed)[rank::world] for seed, count in ((0, SAMPLES), (1, 500), (2, 500))]
    started, busy = time.perf_counter(), time.process_time()
    compress(model, loss, *data, objective="budget", keep=0.5)
    found = time.perf_counter() - started, time.process_time() - busy
    torch.save((*found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024), f"{folder}/{number}.pt")
    _leave(world)


def _cost_model() -> list[str]:
    torch.set_num_threads(1)
    return cost_parts({task: _seconds(task) for task in TASKS})


def cost_parts(measured: Mapping[Candidate, float]) -> list[str]:
    """Measured seconds against estimates, and the simulation that follows from them."""
    rate = statistics.median(seconds / order_cost(task) for task, seconds in measured.items())
    lines = [
        "**The cost model of the decompositions** (`order_cost`), which decides who decomposes what, against measured "
        "times; every order of a convolution's factors is a task of its own. One multiply-add is taken for "
        f"{1e9 * rate:.3f} ns, the median.",
        "",
        "| layer | weight | measured, ms | estimated, ms | measured / estimated |",
        "|---|---|---|---|---|",
    ]
    for task, seconds in measured.items():
        estimate = rate * order_cost(task)
        shown = " ".join([task.kind, " x ".join(map(str, task.kernel)), (task.order or "").replace("_", " ")])
        cells = [f"{1000 * seconds:.1f}", f"{1000 * estimate:.1f}", f"{seconds / estimate:.2f}"]
        lines.append(f"| {shown.strip()} | {task.rows} x {task.columns} | {' | '.join(cells)} |")
    return [
        "\n".join(lines),
        _simulation(rate, measured),
    ]


def _seconds(task: Candidate) -> float:
    torch.manual_seed(0)
    weight, moments = torch.randn(1, task.rows, task.columns), [moment(size) for size in (task.columns, task.rows)]
    times = []
    for _ in range(6):
        started = time.process_time()
        decomposed(task, weight, *moments, damping=1e-2)
        times.append(time.process_time() - started)
    return statistics.median(times[1:])


def _simulation(rate: float, measured: Mapping[Candidate, float]) -> str:
    """The longest process under the assignment by estimates, with measured times where the shape was measured."""
    errors = [seconds / (rate * order_cost(task)) for task, seconds in measured.items()]
    known = {_shape(task): seconds for task, seconds in measured.items()}
    lines = [
        "**Simulated**: decompositions for the curves dealt out by longest processing time first as estimated, a "
        "convolution once for every order of its factors. A task takes the time that was measured for its shape; those "
        "of other shapes, which are all of those with a side above 3072, take their estimate times one of the factors "
        "measured above, drawn at random. Efficiency is the mean load over the largest; the critical path is the "
        "largest single decomposition, below which no number of processes can go. One core of this machine per "
        "process. Not in it: the compensation, whose layers follow each other and are solved one at a time whatever "
        "the number of processes.",
        "",
        "| model | layers | tasks | all, s | critical path, s | "
        + " | ".join(f"{world} processes, s (efficiency)" for world in WORLDS)
        + " |",
        "|---" * (5 + len(WORLDS)) + "|",
    ]
    generator = torch.Generator().manual_seed(0)
    for name, layers in models().items():
        tasks = [order for layer in layers for order in layer.orders()]
        estimates = [rate * order_cost(task) for task in tasks]
        picks = torch.randint(len(errors), (len(tasks),), generator=generator).tolist()
        true = [
            known.get(_shape(task), estimate * errors[pick])
            for task, estimate, pick in zip(tasks, estimates, picks, strict=True)
        ]
        cells = []
        for world in WORLDS:
            loads = [0.0] * world
            for seconds, owner in zip(true, assigned(estimates, world), strict=True):
                loads[owner] += seconds
            cells.append(f"{max(loads):.1f} ({100 * sum(loads) / world / max(loads):.0f} %)")
        lines.append(
            f"| {name} | {len(layers)} | {len(tasks)} | {sum(true):.1f} | {max(true):.1f} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def _shape(task: Candidate) -> tuple[object, ...]:
    """What the time of a decomposition depends on; that of a matrix without a kernel is that of its transpose."""
    sides = task.rows, task.columns
    return (*sides, task.kernel, task.split) if task.kernel else tuple(sorted(sides))


def models() -> dict[str, list[Candidate]]:
    """The factorizable layers of known models, from the papers that introduced them."""
    width, wide = shaped(768, 768), (shaped(3072, 768), shaped(768, 3072))
    return {
        "ResNet-50": _resnet50(),
        "ViT-B/16": [shaped(768, 768, (16, 16))] + 12 * [*4 * [width], *wide] + [shaped(1000, 768)],
        "BERT-base": [shaped(768, 30522)] + 12 * [*4 * [width], *wide],
        "7 billion parameters": 32 * [*4 * [shaped(4096, 4096)], *2 * [shaped(11008, 4096)], shaped(4096, 11008)]
        + [shaped(4096, 32000), shaped(32000, 4096)],
    }


def _resnet50() -> list[Candidate]:
    layers = [shaped(64, 3 * 49, (7, 7))]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            layers += [shaped(width, inputs), shaped(width, 9 * width, (3, 3)), shaped(4 * width, width)]
            layers += [shaped(4 * width, inputs)] if block == 0 else []
            inputs = 4 * width
    return [*layers, shaped(1000, 2048)]


if __name__ == "__main__":
    main()
