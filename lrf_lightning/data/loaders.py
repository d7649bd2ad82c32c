"""Which data the callback works on: calibration, selection and verification loaders in a fixed order.

Each of the three splits is taken from the first of

1. an argument: a DataLoader, any iterable of batches, or the name of a method of the datamodule or the module;
2. the datamodule's or the module's ``calibration_dataloader``, ``selection_dataloader``, ``verification_dataloader``;
3. a share of the validation data. Its samples are permuted with a seed and cut into disjoint parts, 40 % calibration,
   30 % selection, 30 % verification; the shares of splits that are given otherwise go to the others. Datasets without
   indices are split by whole batches in the same proportion.

Two models are compared sample by sample, so every pass must see the same samples in the same order. The order of a
DataLoader is drawn once, with the seed, and kept; an iterator that can be run through once is stored.
:mod:`lrf_lightning.data.device_batches` takes care of random numbers within the samples, and moves the batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader

from lrf_lightning.data.batches import FirstBatches, fixed_order, overlaps
from lrf_lightning.data.combined_batches import CombinedBatches
from lrf_lightning.data.disjoint_parts import disjoint_parts
from lrf_lightning.random_state import seeded
from lrf_lightning.solver.running.evaluation import Batches

__all__ = ["ROLES", "Loaders", "check_loaders", "has_loader", "resolve_loaders"]


ROLES = ("calibration", "selection", "verification")
LIGHTNING_LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader")
FEW_BATCHES = 2


@dataclass(frozen=True)
class Loaders:
    """Three loaders that yield the same samples in the same order on every pass, and how they were chosen.

    Attributes:
        calibration: for statistics and compensation.
        selection: for the choice.
        verification: for the verdict.
        notes: one sentence for everything a reader should know about the choice.
    """

    calibration: Batches
    selection: Batches
    verification: Batches
    notes: tuple[str, ...]


def has_loader(trainer: Trainer, module: LightningModule, role: str) -> bool:
    """Whether the datamodule or the module has a loader for a split, such as ``calibration_dataloader``."""
    return _owner(trainer, module, f"{role}_dataloader") is not None


def check_loaders(trainer: Trainer, module: LightningModule, **choices: Batches | str | None) -> None:
    """Find mistakes that can be known before training; the arguments are those of :func:`resolve_loaders`.

    Warns if selection and verification are the same loader. Other overlaps are found later, since samplers are not
    asked for their order before training.

    Raises:
        ValueError: if a name is unknown, a split has no source at all, or a loader of known length is empty.
    """
    for role in ROLES:
        choice = choices.get(role)
        if isinstance(choice, str):
            _method(trainer, module, role, choice)
        elif choice is not None:
            _check_length(role, choice)
        elif not has_loader(trainer, module, role):
            if not _has_validation(trainer):
                raise _missing(role)
            passed = _passed(trainer, "val_dataloader")
            if passed is not None:
                _check_length("the validation data", _first_loader(passed, role, [], collection=True))
    one, other = choices.get("selection"), choices.get("verification")
    # loaders are not compared by value, which lists of tensors do not bear
    if one is not None and (one is other or (isinstance(one, str) and isinstance(other, str) and one == other)):
        shown = repr(one) if isinstance(one, str) else f"a {type(one).__name__}"
        rank_zero_warn(
            f"selection and verification are the same loader ({shown}): the verdict will not be independent of the "
            "choice. Give them disjoint data"
        )


def resolve_loaders(
    trainer: Trainer,
    module: LightningModule,
    calibration: Batches | str | None = None,
    selection: Batches | str | None = None,
    verification: Batches | str | None = None,
    *,
    seed: int = 0,
) -> Loaders:
    """Find the three loaders; see the module's docstring for the order of the sources.

    Overlaps between the splits are warned about, because the verdict is then not independent of the choice. With
    ``fast_dev_run`` every split is cut to a few batches; ``limit_val_batches`` limits the validation data that is
    split, unless it is 0.

    Args:
        trainer: the trainer whose validation data may be split.
        module: its LightningModule.
        calibration: loader, name of a method, or None.
        selection: likewise.
        verification: likewise.
        seed: seed of the split and of the order.

    Raises:
        ValueError: if a name is unknown, or a split is missing or empty.
    """
    choices = dict(zip(ROLES, (calibration, selection, verification), strict=True))
    notes: list[str] = []
    with seeded(seed):
        found: dict[str, Batches] = {}
        for role, choice in choices.items():
            loader = _given(trainer, module, role, choice)
            if loader is not None:
                found[role] = _fixed(_first_loader(loader, role, notes), seed)
        missing = [role for role in ROLES if role not in found]
        if missing:
            found |= _split(trainer, missing, seed, notes)
        fast_dev_run = int(getattr(trainer, "fast_dev_run", 0))
        if fast_dev_run:
            count = max(FEW_BATCHES, fast_dev_run)
            found = {role: FirstBatches(loader, count) for role, loader in found.items()}
        for role in ROLES:
            _check_not_empty(role, found[role])
    warnings = overlaps(found)
    for warning in warnings:
        rank_zero_warn(warning)
    return Loaders(**found, notes=(*notes, *warnings))


def _given(trainer: Trainer, module: LightningModule, role: str, choice: Batches | str | None) -> Any:
    """What the argument or the conventional method yields, None if there is neither."""
    name = choice if isinstance(choice, str) else f"{role}_dataloader"
    if choice is not None and not isinstance(choice, str):
        return choice
    if choice is None and _owner(trainer, module, name) is None:
        return None
    method = _method(trainer, module, role, name)
    try:
        loader = method()
    except Exception as error:
        raise ValueError(
            f"{role}: {name}() raised {type(error).__name__}: {error}. In a fit a datamodule is set up with "
            f"stage='fit' only; prepare there what {name} needs, or pass {role}=a loader"
        ) from error
    if loader is None:
        raise ValueError(f"{role}: {name}() returned None; return a DataLoader, or pass {role}=a loader")
    return loader


def _method(trainer: Trainer, module: LightningModule, role: str, name: str) -> Any:
    owner = _owner(trainer, module, name)
    if owner is not None:
        return getattr(owner, name)
    source = _passed(trainer, name)
    if source is not None:
        return lambda: source
    owners = [type(o).__name__ for o in (getattr(trainer, "datamodule", None), module) if o is not None]
    raise ValueError(
        f"{role}={name!r} is no method of {' or '.join(owners)}; "
        "name a method that returns a DataLoader, such as 'val_dataloader', or pass the loader itself"
    )


def _owner(trainer: Trainer, module: LightningModule, name: str) -> Any:
    """The datamodule or module that defines the method, None if neither does."""
    for owner in (getattr(trainer, "datamodule", None), module):
        if owner is None or not callable(getattr(owner, name, None)):
            continue
        if name not in LIGHTNING_LOADERS or is_overridden(name, owner):
            return owner
    return None


def _passed(trainer: Trainer, name: str) -> Any:
    """Loaders that were passed to ``fit``, by the name of the method that they stand for."""
    loop: Any = {"train_dataloader": trainer.fit_loop, "val_dataloader": trainer.fit_loop.epoch_loop.val_loop}.get(name)
    source = None if loop is None else loop._data_source
    return None if source is None or source.is_module() else source.instance


def _has_validation(trainer: Trainer) -> bool:
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    return source.instance is not None and source.is_defined()


def _missing(role: str) -> ValueError:
    return ValueError(
        f"there is no data for {role}: neither {role}= nor a {role}_dataloader method nor validation data is given. "
        f"Define val_dataloader, define {role}_dataloader in the datamodule, or pass {role}=a DataLoader"
    )


def _first_loader(loaders: Any, role: str, notes: list[str], collection: bool = False) -> Any:
    """The first of several loaders; a plain list without a loader in it is a list of batches."""
    if isinstance(loaders, CombinedLoader) and loaders._mode != "sequential":
        return loaders
    if isinstance(loaders, CombinedLoader):
        loaders, collection = loaders.flattened, True
    items = list(loaders.values()) if isinstance(loaders, Mapping) else loaders
    if not isinstance(items, (list, tuple)):
        return items
    if not collection and not any(isinstance(item, DataLoader) for item in items):
        return items
    if len(items) > 1:
        notes.append(f"{role} uses the first of {len(items)} loaders.")
    if not items:
        raise ValueError(f"{role} is an empty collection of loaders; give at least one loader")
    return _first_loader(items[0], role, notes) if isinstance(items[0], (Mapping, list, tuple)) else items[0]


def _fixed(loader: Any, seed: int) -> Iterable[Any]:
    return CombinedBatches(loader, seed) if isinstance(loader, CombinedLoader) else fixed_order(loader, seed)


def _split(trainer: Trainer, roles: Sequence[str], seed: int, notes: list[str]) -> dict[str, Batches]:
    """Disjoint parts of the validation data for the roles."""
    loaders = trainer.val_dataloaders
    combined = trainer.fit_loop.epoch_loop.val_loop._combined_loader
    if combined is not None and combined._mode != "sequential":
        loaders = combined  # the trainer shows what it combines
    if loaders is None and _has_validation(trainer):
        loaders = trainer.fit_loop.epoch_loop.val_loop._data_source.dataloader()
    if loaders is None:
        raise _missing(roles[0])
    loader = _first_loader(loaders, "the split of the validation data", notes, collection=True)
    loader = _fixed(loader, seed)
    notes.append(f"{', '.join(roles).capitalize()}: disjoint parts of the validation data.")
    count = _limit(trainer, loader)
    if count is not None:
        notes.append(
            f"Of the validation data {count} batches are used (limit_val_batches={trainer.limit_val_batches})."
        )
    return disjoint_parts(loader, roles, seed, count)


def _limit(trainer: Trainer, loader: Any) -> int | None:
    """Number of validation batches that the trainer allows; None for all, also where validation is switched off."""
    limit, length = trainer.limit_val_batches, _length(loader)
    if getattr(trainer, "fast_dev_run", False) or not limit:  # fast_dev_run cuts every split by itself
        return None
    if isinstance(limit, int):
        return limit if length is None or limit < length else None
    return None if length is None or limit == 1.0 else max(int(length * limit), 1)


def _length(loader: Any) -> int | None:
    if isinstance(loader, CombinedLoader):  # knows only while it is run through
        return None
    try:
        return len(loader)
    except TypeError:
        return None


def _check_length(role: str, loader: Iterable[Any]) -> None:
    if not isinstance(loader, Iterable):
        raise ValueError(f"{role} is a {type(loader).__name__}; give a DataLoader or an iterable of batches")
    if _length(loader) == 0:
        raise _empty(role)


def _check_not_empty(role: str, loader: Batches) -> None:
    _check_length(role, loader)
    if _length(loader) is None:
        batches: Iterator[Any] = iter(loader)
        if next(batches, _missing) is _missing:
            raise _empty(role)


def _empty(role: str) -> ValueError:
    return ValueError(
        f"{role} holds no batch; give a loader that yields at least one "
        "(look at drop_last, the batch size and the size of the dataset)"
    )
