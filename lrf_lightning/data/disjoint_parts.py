"""Disjoint parts of one loader, for splits that have no data of their own."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from lrf_lightning.data.batches import EveryNth, FirstBatches, has_samples, keeps_batches, rebuilt
from lrf_lightning.random_state import seeded
from lrf_lightning.solver.running.batch_contents import tensors
from lrf_lightning.solver.running.evaluation import Batches

__all__ = ["disjoint_parts"]

SHARES = {"calibration": 4, "selection": 3, "verification": 3}  # in tenths


def disjoint_parts(loader: Iterable[Any], roles: Sequence[str], seed: int, count: int | None) -> dict[str, Batches]:
    """Share out the samples of a loader at random, or its batches in turn where samples cannot be asked for.

    Batches that a batch sampler of the user's has put together, by length for instance, stay whole.

    Args:
        loader: yields the same samples in the same order on every pass.
        roles: names of splits.
        seed: of the random shares.
        count: how many batches of the loader are used, None for all.

    Raises:
        ValueError: if there are fewer samples than splits.
    """
    if has_samples(loader):
        return _of_samples(loader, roles, seed, count)
    if not _repeats(loader):
        rank_zero_warn(
            "the validation data is a stream that begins differently on every pass: its batches cannot be told apart, "
            "so that calibration, selection and verification share samples and the verdict is not independent. Let the "
            "dataset yield one order, or pass calibration=, selection= and verification="
        )
    if count is not None:
        loader = FirstBatches(loader, max(count, len(roles)))
    pattern = _pattern(roles)
    return {role: EveryNth(loader, pattern, role) for role in roles}


def _repeats(loader: Iterable[Any]) -> bool:
    """Whether two passes begin with the same samples where the global generators do; batches without tensors do."""
    found = []
    for _ in range(2):
        with seeded(0):
            found.append([tensor.cpu() for tensor in tensors(next(iter(loader), None))])
    first, second = found
    same = (torch.equal(one, other) for one, other in zip(first, second, strict=False))
    return len(first) == len(second) and all(same)


def _of_samples(loader: DataLoader[Any], roles: Sequence[str], seed: int, count: int | None) -> dict[str, Batches]:
    batches = itertools.islice(loader.sampler if loader.batch_sampler is None else loader.batch_sampler, count)
    whole = keeps_batches(loader)
    sampled = batches if whole or loader.batch_sampler is None else itertools.chain.from_iterable(batches)
    samples = list({tuple(index) if isinstance(index, list) else index: index for index in sampled}.values())
    if len(samples) < len(roles):
        what = "batches, which its batch sampler has put together" if whole else "samples"
        raise ValueError(
            f"the validation data has {len(samples)} {what}, too few to be split into {', '.join(roles)}; "
            "give more validation data, or pass loaders for the three splits"
        )
    order = torch.randperm(len(samples), generator=torch.Generator("cpu").manual_seed(seed), device="cpu").tolist()
    total, start = sum(SHARES[role] for role in roles), 0
    parts: dict[str, Batches] = {}
    for position, role in enumerate(roles):
        left = len(samples) - start
        size = left if role == roles[-1] else round(len(samples) * SHARES[role] / total)
        size = min(max(size, 1), left - (len(roles) - position - 1))
        chosen = [samples[i] for i in order[start : start + size]]
        start += size
        parts[role] = rebuilt(loader, chosen if whole or loader.batch_sampler is None else _chunks(chosen, loader))
    return parts


def _chunks(samples: list[Any], loader: DataLoader[Any]) -> list[list[Any]]:
    size = loader.batch_size or max(len(batch) for batch in loader.batch_sampler or [[0]])
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def _pattern(roles: Sequence[str]) -> tuple[str, ...]:
    """Whose turn it is among ten batches, interleaved: c s v c s v c s v c."""
    turns = [[role] * SHARES[role] for role in roles]
    return tuple(role for turn in itertools.zip_longest(*turns) for role in turn if role is not None)
