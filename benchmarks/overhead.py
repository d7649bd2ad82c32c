"""Whether training is as fast with the callback attached as without it, while it waits for the end of the fit.

Pairs of short fits, one with the callback and one without, in alternating order; counted is the processor time between
the first and the last step, so that other work on the machine matters little. ``python -m benchmarks.overhead`` writes
its part of ``RESULTS.md``.
"""

from __future__ import annotations

import logging
import platform
import statistics
import time
import warnings
from datetime import date
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.results import write_section
from lrf_lightning import LowRankCompression

FOLDER = Path(__file__).parent
PAIRS, STEPS, WARM_UP, WIDTH, BATCH = 80, 300, 40, 128, 64
RESAMPLES = 10_000


class Task(pl.LightningModule):
    """A small classifier, whose steps are so short that whatever a callback does would show."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(WIDTH, WIDTH), nn.ReLU()]
        self.net = nn.Sequential(*layers, *[nn.Linear(WIDTH, WIDTH), nn.ReLU()], nn.Linear(WIDTH, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy; only there to be found."""
        return self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain stochastic gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Clock(pl.Callback):
    """Processor time from one step to the end of training."""

    def __init__(self) -> None:
        self.started, self.seconds = 0.0, 0.0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Start after a few steps."""
        if trainer.global_step == WARM_UP:
            self.started = time.process_time()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop."""
        self.seconds = time.process_time() - self.started


class Waiting(LowRankCompression):
    """The callback as it is, but for the solve, which is not what is measured here."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do nothing."""


def main() -> None:
    """Measure, then write the section."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    data = TensorDataset(torch.randn(STEPS * BATCH, WIDTH), torch.randint(10, (STEPS * BATCH,)))
    _seconds(data, attached=False)
    _seconds(data, attached=True)
    pairs = []
    for pair in range(PAIRS):
        order = (False, True) if pair % 2 else (True, False)
        found = {attached: _seconds(data, attached=attached) for attached in order}
        pairs.append((found[False], found[True]))
    ratios = torch.tensor([with_it / without for without, with_it in pairs])
    low, high = _interval(ratios)
    per_step = 1e6 * statistics.median(without for without, _ in pairs) / (STEPS - WARM_UP)
    text = (
        f"`python -m benchmarks.overhead`, {date.today()}, {platform.machine()}, one thread, "
        f"torch {torch.__version__}, "
        f"lightning {pl.__version__}. {PAIRS} pairs of fits of {STEPS} steps ({per_step:.0f} us of processor time "
        "each), "
        "with `LowRankCompression()` attached and without, in alternating order.\n\n"
        f"Time per step with the callback over that without, median of the pairs: {ratios.median():.4f} "
        f"(95 % interval of the median {low:.4f} to {high:.4f}, by bootstrap)."
    )
    print(text)
    write_section(FOLDER / "RESULTS.md", "Training with the callback attached", text)


def _seconds(data: TensorDataset, *, attached: bool) -> float:
    torch.manual_seed(0)
    clock = Clock()
    batches = [data[:BATCH]]
    waiting = Waiting(save=False, calibration=batches, selection=batches, verification=batches)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[waiting, clock] if attached else [clock],
    )
    trainer.fit(Task(), DataLoader(data, batch_size=BATCH))
    return clock.seconds


def _interval(ratios: Tensor) -> tuple[float, float]:
    """The 2.5 % and the 97.5 % quantile of the median of resampled ratios."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(ratios), (RESAMPLES, len(ratios)), generator=generator)
    medians = ratios[picks].median(1).values
    return float(medians.quantile(0.025)), float(medians.quantile(0.975))


if __name__ == "__main__":
    main()
