"""Train the networks of the benchmarks, or load them if they were trained before."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.fashion import Split
from benchmarks.nets import NETS

__all__ = ["SCHEDULES", "Schedule", "trained"]


@dataclass(frozen=True)
class Schedule:
    """How a network is trained.

    Attributes:
        net: name in :data:`benchmarks.nets.NETS`.
        samples: training images that are used.
        epochs: passes over them.
        rate: peak learning rate of a one-cycle schedule.
        decay: weight decay.
        augment: whether images are shifted by up to two pixels and flipped.
        adam: AdamW instead of SGD with Nesterov momentum.
    """

    net: str
    samples: int
    epochs: int
    rate: float
    decay: float
    augment: bool
    adam: bool = False


SCHEDULES = {
    "resnet": Schedule("resnet", 50_000, 3, 0.15, 5e-4, True),
    "resnet-overfitted": Schedule("resnet", 10_000, 9, 2e-3, 0.0, False, adam=True),
    "resnext": Schedule("resnext", 50_000, 2, 0.15, 5e-4, True),
    "vit": Schedule("vit", 30_000, 7, 1.5e-3, 0.05, False, adam=True),
}


def trained(name: str, seed: int, data: Split, folder: Path, batch: int = 125) -> nn.Module:
    """The network of a schedule, in evaluation mode; its weights are kept in ``folder``."""
    schedule = SCHEDULES[name]
    torch.manual_seed(seed)
    model = NETS[schedule.net]()
    path = folder / f"{name}-{seed}.pt"
    if path.is_file():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    _fit(model.train(), schedule, data, torch.Generator().manual_seed(seed), batch)
    model.to(memory_format=torch.contiguous_format)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model.eval()


def _fit(model: nn.Module, schedule: Schedule, data: Split, generator: torch.Generator, batch: int) -> None:
    optimizer: torch.optim.Optimizer
    model.to(memory_format=torch.channels_last)  # a quarter faster for grouped convolutions on a CPU
    if schedule.adam:
        optimizer = torch.optim.AdamW(model.parameters(), schedule.rate, weight_decay=schedule.decay)
    else:
        optimizer = torch.optim.SGD(
            model.parameters(), schedule.rate, momentum=0.9, nesterov=True, weight_decay=schedule.decay
        )
    samples = min(schedule.samples, len(data))
    steps = schedule.epochs * (samples // batch)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, schedule.rate, steps, pct_start=0.2)
    for _ in range(schedule.epochs):
        order = torch.randperm(samples, generator=generator)[: samples // batch * batch]
        for indices in order.split(batch):
            images = data.images[indices]
            images = _augmented(images, generator) if schedule.augment else images
            loss = F.cross_entropy(model(images), data.labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()


def _augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift a whole batch by up to two pixels and flip half of it."""
    down, right = torch.randint(0, 5, (2,), generator=generator).tolist()
    padded = F.pad(images, (2, 2, 2, 2), value=float(images.min()))
    shifted = padded[:, :, down : down + 28, right : right + 28]
    flip = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(flip[:, None, None, None], shifted.flip(-1), shifted)
