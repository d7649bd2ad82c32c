"""Whether training is as fast with the callback attached as without it, while it waits for the end of the fit.

Pairs of short fits, one with the callback and one without, in alternating order; counted is the processor time between
the first and the last step, so that other work on the machine matters little. ``python -m benchmarks.overhead`` writes
its part of ``RESULTS.md``.
"""

from __future__ import annotations

import logging
import platform
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
        layers = [nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(WIDTH, 10))

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
    without, attached = [], []
    for pair in range(PAIRS):
        for waits in (False, True) if pair % 2 else (True, False):
            (attached if waits else without).append(_seconds(data, attached=waits))
    before, after = (1e6 * torch.tensor(seconds) / (STEPS - WARM_UP) for seconds in (without, attached))
    longer, ratios = after - before, after / before
    low, high = _interval(longer)
    text = (
        f"`python -m benchmarks.overhead`, {date.today()}, {platform.machine()}, one thread, "
        f"torch {torch.__version__}, lightning {pl.__version__}. {PAIRS} pairs of fits of {STEPS} steps with "
        "`LowRankCompression()` attached and without, in alternating order; processor time per step, medians of the "
        "pairs with the 95 % interval of the median by bootstrap.\n\n"
        f"A step of {before.median():.0f} us takes {longer.median():.1f} us longer ({low:.1f} to {high:.1f}), "
        "{:.4f} times as long ({:.4f} to {:.4f}). ".format(ratios.median(), *_interval(ratios))
        + "That is Lightning's own call of six empty hooks, as for any callback. It is within 1 % where a step takes "
        f"{high / 10:.1f} ms or more."
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


def _interval(values: Tensor) -> tuple[float, float]:
    """The 2.5 % and the 97.5 % quantile of the median of resampled values."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    medians = values[picks].median(1).values
    return float(medians.quantile(0.025)), float(medians.quantile(0.975))


if __name__ == "__main__":
    main()
