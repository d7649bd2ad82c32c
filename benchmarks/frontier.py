"""Ten budgets from one calibration against separate solves, in processor time, on Fashion-MNIST.

``python -m benchmarks.frontier`` writes its part of ``RESULTS.md``. Processor time is what other work on the machine
disturbs least.
"""

from __future__ import annotations

import argparse
import platform
import time
from datetime import date
from pathlib import Path

import torch

from benchmarks.fashion import batches, splits
from benchmarks.quality import loss
from benchmarks.results import write_section
from benchmarks.training import SCHEDULES, trained
from lrf_lightning import compress

FOLDER = Path(__file__).parent
BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1)
SEPARATE = (0.7, 0.4, 0.2)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--net", default="resnet", choices=list(SCHEDULES))
    parser.add_argument("--cache", type=Path, default=FOLDER / ".cache", help="folder of trained networks")
    options = parser.parse_args()
    data = splits(0)
    model = trained(options.net, 0, data["train"], options.cache)
    parts = [batches(data[name]) for name in ("calibration", "selection", "verification")]
    compress(model, loss, *([part[0]] for part in parts), objective="budget")  # warms up

    started = time.process_time()
    frontier = compress(model, loss, *parts, objective="frontier", budgets=BUDGETS)
    together = time.process_time() - started
    alone, equal = {}, True
    for keep in SEPARATE:
        started = time.process_time()
        result = compress(model, loss, *parts, objective="budget", keep=keep)
        alone[keep] = time.process_time() - started
        equal = equal and result.certificate == frontier.at(keep).certificate
    text = (
        f"`python -m benchmarks.frontier`, {date.today()}, {platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}; {options.net}, 1,500 calibration, 2,500 selection and 2,500 verification images. "
        "Processor seconds.\n\n"
        f'- {len(frontier.frontier)} budgets with `objective="frontier"`, each measured and tested: {together:.1f} s\n'
        f'- separate solves with `objective="budget"`: {sum(alone.values()):.1f} s for three ('
        + ", ".join(f"{seconds:.1f} s at {keep:g}" for keep, seconds in alone.items())
        + f")\n- verdicts of the frontier at these budgets equal to those of the solves of their own: {equal}\n"
    )
    print(text)
    write_section(FOLDER / "RESULTS.md", "Many budgets", text)


if __name__ == "__main__":
    main()
