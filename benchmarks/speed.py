"""How much faster factorized networks are, and which factorization of a convolution is the fastest.

``python -m benchmarks.speed`` times networks with the layer shapes of ResNet-50, ResNeXt-50, ViT-B/16 and BERT-base,
with random weights, dense and with 0.5 and 0.3 of the parameters of their factorizable layers, in onnxruntime or in
PyTorch. All variants run in turn, in a new order in every round; figures are medians of the paired ratios. It writes
its section of ``RESULTS.md``; options choose networks, runtimes, rounds and threads.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.results import write_section
from benchmarks.speed_nets import NETS, Network
from lrf_lightning.solver.layers.latency import device_name
from lrf_lightning.solver.speed.comparison import median_interval
from lrf_lightning.surgery import Candidate, ConvOrder, find_layers, replace_module
from lrf_lightning.surgery.kinds import low_rank_type

FOLDER = Path(__file__).parent
KEEPS = (0.5, 0.3)
TARGETS = {True: (1.15, 1.4), False: (1.3, 1.7)}  # by whether convolutions dominate
RUNTIMES = ("onnxruntime", "eager", "channels_last", "compile")
ORDERS: dict[str, ConvOrder] = {
    "k x k, 1 x 1": "kernel_first",
    "1 x 1, k x k": "pointwise_first",
    "k x 1, 1 x k": "spatial_split",
}
CONVOLUTIONS = ((64, 56), (128, 28), (256, 14), (512, 7))  # channels, size of the image
Call = Callable[[], object]


def main() -> None:
    """Measure what the command line asks for, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime"], choices=RUNTIMES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="print only")
    options = parser.parse_args()
    started = time.perf_counter()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        lines = _networks(options.nets, options.runtimes, options.rounds, options.threads)
        orders = _orders(options.rounds, options.threads)
    minutes = (time.perf_counter() - started) / 60
    load = os.getloadavg()[1] if hasattr(os, "getloadavg") else 0.0
    head = (
        f"`python -m benchmarks.speed`, {date.today()}, {device_name(torch.device('cpu'))}, {minutes:.0f} minutes, "
        f"{options.rounds} rounds; {load:.1f} processes wanted the machine's {os.cpu_count()} cores meanwhile, so "
        "that single timings vary, and ratios are paired."
    )
    text = "\n\n".join([head, "\n".join(lines), "\n".join(orders)])
    print(text)
    if not options.dry:
        write_section(FOLDER / "RESULTS.md", "Speed", text)


def _networks(names: Sequence[str], runtimes: Sequence[str], rounds: int, threads: int) -> list[str]:
    lines = [
        "Times as fast as the dense network, with the 95 % interval of the median. Every layer keeps the same share, "
        "but for grouped convolutions, which stay dense: their factors have too few components per group. Embeddings "
        "are left alone. Convolutions are factorized in one of the orders that the package chooses from, by the error "
        "that they leave in a trained network; here, with random weights, the same in all layers.",
        "",
        "| network | order | batch | runtime | dense, samples/s | 0.5 kept | 0.3 kept | wanted |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        net = NETS[name]
        dense = net.build().eval()
        orders = ORDERS if net.convolutional else {"-": ORDERS["k x k, 1 x 1"]}
        models = {"dense": dense}
        models |= {f"{order} {keep}": shrunk(dense, keep, orders[order]) for order in orders for keep in KEEPS}
        for runtime in runtimes:
            times = in_turn(_calls(models, net, runtime, threads), rounds)
            rate = net.batch / statistics.median(times["dense"])
            wanted = " / ".join(f"{target:g}" for target in TARGETS[net.convolutional])
            for order in orders:
                cells = [_ratio(times["dense"], times[f"{order} {keep}"]) for keep in KEEPS]
                start = f"| {name} | {order} | {net.batch} | {runtime} | {rate:.1f} |"
                lines.append(f"{start} {' | '.join(cells)} | {wanted} |")
                print(lines[-1], flush=True)
    return lines


def shrunk(dense: nn.Module, keep: float, order: ConvOrder = "kernel_first") -> nn.Module:
    """A copy with random factors that hold a share of the factorizable layers' parameters."""
    model = copy.deepcopy(dense)
    excluded = ("Embedding",) if _has_embedding(model) else ()
    candidates, _ = find_layers(model, exclude_types=excluded, conv_order=order)
    grouped = sum(c.dense_params for c in candidates if c.groups > 1)
    total = sum(c.dense_params for c in candidates)
    share = (keep * total - grouped) / (total - grouped)
    for candidate in candidates:
        rank = _rank(candidate, share)
        if candidate.groups == 1 and rank <= candidate.max_rank:
            replace_module(model, candidate.name, with_random_factors(candidate, rank))
    return model


def _has_embedding(model: nn.Module) -> bool:
    return any(isinstance(module, nn.Embedding) for module in model.modules())


def _rank(candidate: Candidate, share: float) -> int:
    """The rank that keeps a share, a multiple of 8 where it is large."""
    rank = max(1, int(share * candidate.rows * candidate.columns / sum(candidate.sides)))
    return rank // 8 * 8 if rank >= 32 else rank


def with_random_factors(candidate: Candidate, rank: int) -> nn.Module:
    """A low-rank layer like a dense one, in the order of the candidate."""
    kind = low_rank_type(candidate.module)
    assert kind is not None
    new = kind.like(candidate.module, rank, split=candidate.split)
    for parameter in new.parameters():
        nn.init.normal_(parameter, 0, 0.02)
    return new.eval()


def _calls(models: Mapping[str, nn.Module], net: Network, runtime: str, threads: int) -> dict[str, Call]:
    x = net.sample(net.batch)
    if runtime == "onnxruntime":
        return {name: _session(model, x, threads) for name, model in models.items()}
    if runtime == "channels_last":
        models = {name: copy.deepcopy(m).to(memory_format=torch.channels_last) for name, m in models.items()}
        x = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
    if runtime == "compile":
        models = {name: torch.compile(model) for name, model in models.items()}
    return {name: (lambda model=model: model(x)) for name, model in models.items()}


def _session(model: nn.Module, x: Tensor, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    # threads that wait busily keep the others from work where there are more processes than cores
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        torch.onnx.export(model, (x,), path, input_names=["x"], dynamo=False, opset_version=17)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = {"x": x.numpy()}
    return lambda: session.run(None, given)


def in_turn(calls: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call in every round, in a new order each time, after one call to warm up."""
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            started = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def _ratio(dense: Sequence[float], other: Sequence[float]) -> str:
    """Median of the paired ratios with its interval."""
    ratios = sorted(a / b for a, b in zip(dense, other, strict=True))
    low, high = median_interval(len(ratios))
    return f"{statistics.median(ratios):.2f} ({ratios[low]:.2f} to {ratios[high]:.2f})"


def _orders(rounds: int, threads: int) -> list[str]:
    """Factorizations of a 3 x 3 convolution at equal parameters."""
    lines = [
        "A 3 x 3 convolution of a ResNet by itself, batch 8, at 0.5 and 0.3 of its parameters in three orders: the "
        "kernel first, channels first, and a spatial split. Times as fast as dense.",
        "",
        f"| channels | size | kept | runtime | {' | '.join(ORDERS)} |",
        "|---|---|---|---|---|---|---|",
    ]
    medians: dict[float, list[list[float]]] = {keep: [] for keep in KEEPS}
    for channels, size in CONVOLUTIONS:
        dense = nn.Conv2d(channels, channels, 3, padding=1, bias=False).eval()
        net = Network(lambda: dense, lambda batch: torch.randn(batch, channels, size, size), 8, convolutional=True)  # noqa: B023 (used at once)
        for keep in KEEPS:
            models = {"dense": dense} | {order: _ordered(dense, keep, order) for order in ORDERS}
            for runtime in ("onnxruntime", "eager"):
                times = in_turn(_calls(models, net, runtime, threads), 2 * rounds)
                cells = [_ratio(times["dense"], times[order]) for order in ORDERS]
                lines.append(f"| {channels} | {size} | {keep} | {runtime} | {' | '.join(cells)} |")
                print(lines[-1], flush=True)
                if runtime == "onnxruntime":
                    medians[keep].append([float(cell.split()[0]) for cell in cells])
    for keep, rows in medians.items():
        means = [statistics.geometric_mean(column) for column in zip(*rows, strict=True)]
        shown = ", ".join(f"{order}: {mean:.2f}" for order, mean in zip(ORDERS, means, strict=True))
        lines += ["", f"Geometric means in onnxruntime at {keep} kept: {shown}."]
    return lines


def _ordered(dense: nn.Conv2d, keep: float, order: str) -> nn.Module:
    """Two convolutions with a share of the parameters of a square one."""
    (candidate,), _ = find_layers(nn.ModuleDict({"conv": dense}), conv_order=ORDERS[order])
    return with_random_factors(candidate, int(keep * candidate.dense_params / candidate.low_rank_params(1)))


if __name__ == "__main__":
    main()
