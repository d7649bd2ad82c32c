"""The layers of a model that can be factorized, and those that are left alone with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.utils import parametrize

from lrf_lightning.modules import LowRankModule, SplitAttention
from lrf_lightning.surgery.candidates import Candidate, ConvOrder
from lrf_lightning.surgery.kinds import (
    CONVOLUTIONS,
    Owner,
    attention_objection,
    is_matrix,
    is_quantized,
    kind_objection,
    low_rank_type,
    reads_transposed,
    same_geometry,
    weight_owners,
)

__all__ = ["Predicate", "Skipped", "find_layers"]

Predicate = Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Skipped:
    """A layer with a weight matrix that is left alone, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class _Site:
    """A place in the model where there is, or could be, a layer with a weight matrix."""

    name: str
    module: nn.Module
    attention: str = ""  # name of the attention module whose projection this is

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, self.attention) if self.attention else (self.name,)

    @property
    def types(self) -> tuple[str, ...]:
        kind = type(self.module).__name__
        return (kind, nn.MultiheadAttention.__name__) if self.attention else (kind,)


@dataclass(frozen=True)
class _Choice:
    """What the user wants: see :func:`find_layers`."""

    include: tuple[str, ...]
    exclude: tuple[str, ...]
    types: tuple[str, ...]
    exclude_types: tuple[str, ...]
    predicate: Predicate | None
    frozen: bool

    def check(self, model: nn.Module, sites: Iterable[_Site]) -> None:
        """Raise for a pattern that matches nothing."""
        modules = dict(model.named_modules())
        names = [*modules, *(site.name for site in sites if site.attention)]
        types = sorted({type(module).__name__ for module in modules.values()} | {t for s in sites for t in s.types})
        for argument, what, known in (
            ("include", "module; the modules are named like", names),
            ("exclude", "module; the modules are named like", names),
            ("types", "type of module; the model has", types),
            ("exclude_types", "type of module; the model has", types),
        ):
            for pattern in getattr(self, argument):
                if not _matches(known, (pattern,)):
                    shown = known[1:6] if known is names else known
                    raise ValueError(f"{argument}={pattern!r} matches no {what} {shown}")

    def objection(self, site: _Site) -> str | None:
        """Why the user does not want the layer, None if it is wanted."""
        weight = site.module._parameters.get("weight")
        if self.include and not _matches(site.names, self.include):
            return "not matched by include"
        if _matches(site.names, self.exclude):
            return "matched by exclude"
        if self.types and not _matches(site.types, self.types):
            return "its type is not matched by types"
        if _matches(site.types, self.exclude_types):
            return "its type is matched by exclude_types"
        if not self.frozen and weight is not None and not weight.requires_grad:
            return "is frozen (frozen=True factorizes it)"
        if self.predicate is not None and not self.predicate(site.name, site.module):
            return "refused by predicate"
        return None


def find_layers(
    model: nn.Module,
    *,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    types: tuple[str, ...] = (),
    exclude_types: tuple[str, ...] = (),
    predicate: Predicate | None = None,
    frozen: bool = False,
    min_params: int = 0,
    conv_order: ConvOrder = "best",
) -> tuple[list[Candidate], list[Skipped]]:
    """List the layers that can be factorized and those that cannot; the model is not changed.

    A projection of an ``nn.MultiheadAttention`` is matched by its own name and by that of the attention module, by the
    type ``Linear`` and by ``MultiheadAttention``. Before :func:`~lrf_lightning.surgery.prepare` its module is only a
    view.

    Args:
        model: any module.
        include: shell patterns on qualified names (``"backbone.*"``); empty means all layers.
        exclude: shell patterns on qualified names that are left alone.
        types: shell patterns on class names (``"Conv2d"``); empty means all supported types.
        exclude_types: shell patterns on class names that are left alone.
        predicate: ``predicate(name, module)``; layers for which it is false are left alone.
        frozen: whether layers whose weight does not require a gradient are factorized too.
        min_params: layers with fewer weight entries are left alone.
        conv_order: orders of the factors that come into question for a convolution; a candidate has the first of them
            that saves parameters at some rank.

    Returns:
        The candidates and the layers left alone, in the order of ``model.named_modules()``.

    Raises:
        ValueError: if a pattern matches no module at all, or a module is scripted, so that it cannot be observed.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"{f'the module {name!r}' if name else 'the model'} is scripted by torch.jit, which does not let its "
                "layers be observed; give the Python modules, and trace what comes back, or script restore_dense(model)"
            )
    owners = weight_owners(model)
    sites = list(_sites(model, owners))
    choice = _Choice(include, exclude, types, exclude_types, predicate, frozen)
    choice.check(model, sites)
    objections = {site.name: choice.objection(site) or _objection(model, site, owners) for site in sites}
    candidates: dict[str, Candidate] = {}
    skipped: list[Skipped] = []
    for site in sites:
        twins = _twins(site, owners)
        reason = objections[site.name] or _tie_objection(site, twins, objections)
        first = twins[0][0] if twins else site.name
        if reason is None and first != site.name:
            reason = f"shares the weight of {first!r} and is factorized with it" if first in candidates else ""
            reason = reason or f"shares the weight of {first!r}, which is left alone"
        if reason is None:
            candidate = _with_twins(_candidate(site), twins[1:])
            orders = candidate.orders(conv_order)
            reason = _size_objection(candidate, orders, min_params)
            if reason is None:
                candidates[site.name] = orders[0]
                continue
        skipped.append(Skipped(site.name, type(site.module).__name__, reason))
    return list(candidates.values()), skipped


def _sites(model: nn.Module, owners: dict[int, list[Owner]]) -> Iterator[_Site]:
    inner: set[nn.Module] = set()  # modules that are covered by the attention module they belong to
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            inner.add(module.out_proj)
            if name and attention_objection(module, owners) is None:
                split = SplitAttention.from_packed(module, copy=False)
                yield from (_Site(f"{name}.{part}", getattr(split, part), name) for part in split.PROJECTIONS)
                continue
        if isinstance(module, SplitAttention):
            projections = [getattr(module, part) for part in module.PROJECTIONS]
            inner.update(projections)
            yield from (_Site(f"{name}.{p}", m, name) for p, m in zip(module.PROJECTIONS, projections, strict=True))
        elif module not in inner and _has_weight_matrix(module):
            yield _Site(name, module)


def _has_weight_matrix(module: nn.Module) -> bool:
    if isinstance(module, LowRankModule) or low_rank_type(module) is not None or is_quantized(module):
        return True
    if parametrize.is_parametrized(module, "weight"):
        return True
    if isinstance(module, parametrize.ParametrizationList):  # part of the layer that it belongs to
        return False
    return any(is_matrix(parameter) for parameter in module._parameters.values())


def _matches(values: Iterable[str], patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(value, pattern) for value in values for pattern in patterns)


def _objection(model: nn.Module, site: _Site, owners: dict[int, list[Owner]]) -> str | None:
    """Why a layer cannot be factorized, apart from what it shares and how large it is."""
    if isinstance(site.module, nn.MultiheadAttention):
        return attention_objection(site.module, owners) or "is the model itself; wrap it in a module"
    if reason := kind_objection(site.module):
        return reason
    if site.name == "":
        return "is the model itself; wrap it in a module"
    for parent in [] if site.attention else _ancestors(model, site.name):
        if isinstance(parent, nn.TransformerEncoderLayer) and not _is_split(parent.self_attn, owners):
            return "its weight is read directly by TransformerEncoderLayer"
    return None


def _is_split(attention: nn.Module, owners: dict[int, list[Owner]]) -> bool:
    """Whether an attention module keeps its encoder layer off the fused path, now or once it is prepared."""
    if isinstance(attention, SplitAttention):
        return True
    return isinstance(attention, nn.MultiheadAttention) and attention_objection(attention, owners) is None


def _ancestors(model: nn.Module, name: str) -> Iterator[nn.Module]:
    module = model
    yield module
    for part in name.split(".")[:-1]:
        module = getattr(module, part)
        yield module


def _twins(site: _Site, owners: dict[int, list[Owner]]) -> list[Owner]:
    """All owners of the layer's weight, itself included, if there are several."""
    weight = site.module._parameters.get("weight")
    found = [] if weight is None else owners.get(id(weight), [])
    return found if len(found) > 1 else []


def _tie_objection(site: _Site, twins: list[Owner], objections: dict[str, str | None]) -> str | None:
    """Why layers that share a weight cannot be factorized together."""
    for name, key, module in twins:
        shared = f"its weight is shared with {name!r}"
        if key != "weight" or name not in objections:
            return f"{shared}, which is not supported"
        if objections[name] is not None:
            return f"{shared}, which is left alone: {objections[name]}"
        if not same_geometry(site.module, module) and not reads_transposed(site.module, module):
            return f"{shared}, a {type(module).__name__} that uses it differently"
    return None


def _with_twins(candidate: Candidate, twins: list[Owner]) -> Candidate:
    transposed = tuple(name for name, _, module in twins if reads_transposed(candidate.module, module))
    return replace(candidate, twins=tuple(name for name, _, _ in twins), transposed=transposed)


def _size_objection(candidate: Candidate, orders: list[Candidate], min_params: int) -> str | None:
    if not orders:
        sizes = f"{candidate.groups} x {candidate.rows} x {candidate.columns}"
        depthwise = candidate.groups > 1 and candidate.full_rank == 1
        return (
            f"is depthwise, no rank saves parameters ({sizes})" if depthwise else f"no rank saves parameters ({sizes})"
        )
    if candidate.dense_params < min_params:
        return f"has {candidate.dense_params} weights, fewer than min_params={min_params}"
    return None


def _candidate(site: _Site) -> Candidate:
    kind = low_rank_type(site.module)
    assert kind is not None
    groups, rows, columns = kind.matrices(site.module).shape
    kernel = tuple(site.module.kernel_size) if isinstance(site.module, CONVOLUTIONS) else ()
    return Candidate(site.name, type(site.module).__name__, site.module, groups, rows, columns, kernel=kernel)
