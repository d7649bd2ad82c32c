"""Find the layers of a model that can be factorized, and replace modules by name.

A layer *can* be factorized if its exact type is supported, its weight is a plain dense floating-point parameter that
belongs to it alone, and some rank saves parameters. Everything else with a weight matrix is left alone, with a reason
that ends up in the report: nothing is skipped silently.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from lrf_lightning.modules import LowRankConv2d, LowRankLinear, LowRankModule

__all__ = [
    "Candidate",
    "Skipped",
    "factorized",
    "find_layers",
    "replace_module",
    "restore_dense_structure",
    "set_structure",
]

LOW_RANK_OF: dict[type[nn.Module], type[LowRankModule]] = {nn.Linear: LowRankLinear, nn.Conv2d: LowRankConv2d}


@dataclass(frozen=True)
class Candidate:
    """A layer that can be factorized.

    Attributes:
        name: qualified name of the module, the first one if it hangs in the tree several times.
        kind: class name of the module.
        module: the dense module itself.
        groups: number of matrices in the weight.
        rows: output side of one group's matrix.
        columns: input side of one group's matrix, kernel included.
    """

    name: str
    kind: str
    module: nn.Module
    groups: int
    rows: int
    columns: int

    @property
    def full_rank(self) -> int:
        """The smaller side of one group's matrix."""
        return min(self.rows, self.columns)

    @property
    def dense_params(self) -> int:
        """Entries of the dense weight, without the bias."""
        return self.groups * self.rows * self.columns

    def low_rank_params(self, rank: int) -> int:
        """Entries of both factors at a rank, without the bias."""
        return self.groups * rank * (self.rows + self.columns)

    @property
    def max_rank(self) -> int:
        """The largest rank at which the factors hold fewer entries than the dense weight, 0 if there is none."""
        return min((self.rows * self.columns - 1) // (self.rows + self.columns), self.full_rank)


@dataclass(frozen=True)
class Skipped:
    """A layer with a weight matrix that is left alone, and why."""

    name: str
    kind: str
    reason: str


def find_layers(
    model: nn.Module,
    *,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    min_params: int = 0,
) -> tuple[list[Candidate], list[Skipped]]:
    """List the layers that can be factorized and those that cannot.

    Args:
        model: any module.
        include: shell patterns on qualified names (``"backbone.*"``); empty means all layers.
        exclude: shell patterns on qualified names that are left alone.
        min_params: layers with fewer weight entries are left alone.

    Returns:
        The candidates and the layers left alone, in the order of ``model.named_modules()``.

    Raises:
        ValueError: if a pattern matches no module at all.
    """
    names = [name for name, _ in model.named_modules()]
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"{argument}={pattern!r} matches no module; the modules are named like {names[1:6]}")
    owners = _weight_owners(model)
    candidates: list[Candidate] = []
    skipped: list[Skipped] = []
    for name, module in model.named_modules():
        if not _has_weight_matrix(module):
            continue
        reason = (
            _reason_by_choice(name, include, exclude)
            or _reason_by_kind(model, name, module)
            or _reason_tied(module, owners)
        )
        candidate = None if reason else _candidate(name, module)
        if candidate is not None:
            reason = _reason_by_size(candidate, min_params)
        if reason or candidate is None:
            skipped.append(Skipped(name, type(module).__name__, reason or "unsupported"))
        else:
            candidates.append(candidate)
    return candidates, skipped


def factorized(
    dense: nn.Module,
    left: Tensor,  # (groups, out / groups, rank)
    right: Tensor,  # (groups, rank, in / groups * prod(kernel))
) -> LowRankModule:
    """A low-rank layer with these factors and the bias, dtype, device, mode and ``requires_grad`` of ``dense``."""
    new = LOW_RANK_OF[type(dense)].like(dense, left.shape[-1])
    new.set_factors(left, right)
    weight, bias = dense._parameters["weight"], dense._parameters.get("bias")
    new.set_bias(None if bias is None else bias.detach())
    new.left_factor.requires_grad_(weight is None or weight.requires_grad)
    new.right_factor.requires_grad_(weight is None or weight.requires_grad)
    if new.bias is not None and bias is not None:
        new.bias.requires_grad_(bias.requires_grad)
    return new.train(dense.training)


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` wherever the module called ``name`` hangs in the tree (a shared module hangs in several places).

    Raises:
        ValueError: if ``name`` is empty or names no module.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if not name or name not in modules:
        raise ValueError(f"the model has no replaceable module named {name!r}")
    old = modules[name]
    for parent in model.modules():
        for child_name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[child_name] = new


def set_structure(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Give the named layers uninitialised factors of the given ranks, and make all other low-rank layers dense.

    Layers that already have the wanted rank are kept as they are. Meant to be followed by ``load_state_dict``.

    Raises:
        ValueError: if a name is missing from the model, its layer is of an unsupported type, or a rank does not fit.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, rank in ranks.items():
        module = modules.get(name)
        if module is None:
            raise ValueError(f"the model has no module named {name!r}, which the rank map gives rank {rank}")
        if isinstance(module, LowRankModule):
            if module.rank == rank:
                continue
            module = module.to_dense()
        kind = LOW_RANK_OF.get(type(module))
        if kind is None:
            raise ValueError(
                f"module {name!r} is a {type(module).__name__}; a rank can be given to "
                f"{', '.join(t.__name__ for t in LOW_RANK_OF)} only"
            )
        try:
            new = kind.like(module, rank).train(module.training)
        except ValueError as error:
            raise ValueError(f"module {name!r}: {error}") from error
        replace_module(model, name, new)
    restore_dense_structure(model, keep=ranks)


def restore_dense_structure(model: nn.Module, keep: Mapping[str, int] | None = None) -> None:
    """Replace low-rank layers by dense ones that compute the same function, except those named in ``keep``."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LowRankModule) and (keep is None or name not in keep):
            replace_module(model, name, module.to_dense())


def _has_weight_matrix(module: nn.Module) -> bool:
    if isinstance(module, LowRankModule):
        return True
    weight = module._parameters.get("weight")
    if parametrize.is_parametrized(module, "weight"):
        return isinstance(module, tuple(LOW_RANK_OF))
    if isinstance(module, tuple(LOW_RANK_OF)) or isinstance(weight, UninitializedParameter):
        return True
    return weight is not None and weight.dim() >= 2


def _reason_by_choice(name: str, include: tuple[str, ...], exclude: tuple[str, ...]) -> str | None:
    if include and not any(fnmatchcase(name, pattern) for pattern in include):
        return "not matched by include"
    if any(fnmatchcase(name, pattern) for pattern in exclude):
        return "matched by exclude"
    return None


def _reason_by_kind(model: nn.Module, name: str, module: nn.Module) -> str | None:
    reason = None
    if isinstance(module, LowRankModule):
        reason = "is low-rank already"
    elif parametrize.is_parametrized(module):
        reason = "is parametrized"
    elif type(module) not in LOW_RANK_OF:
        reason = f"{type(module).__name__} is not supported"
    elif name == "":
        reason = "is the model itself; wrap it in a module"
    elif any(isinstance(parent, nn.TransformerEncoderLayer) for parent in _ancestors(model, name)):
        reason = "its weight is read directly by TransformerEncoderLayer"
    else:
        reason = _reason_by_weight(module._parameters.get("weight"))
    return reason


def _reason_by_weight(weight: nn.Parameter | None) -> str | None:
    if weight is None or isinstance(weight, UninitializedParameter):
        return "its weight is not initialised"
    if type(weight) is not nn.Parameter and type(weight.data) is not torch.Tensor:
        return f"its weight is a {type(weight).__name__}"
    if weight.is_meta or weight.layout != torch.strided or not weight.is_floating_point():
        return f"its weight is not a dense floating-point tensor ({weight.layout}, {weight.dtype}, {weight.device})"
    return None


def _reason_tied(module: nn.Module, owners: dict[int, int]) -> str | None:
    weight = module._parameters.get("weight")
    if weight is not None and owners.get(id(weight), 0) > 1:
        return "its weight is shared with another module"
    return None


def _reason_by_size(candidate: Candidate, min_params: int) -> str | None:
    if candidate.max_rank < 1:
        return f"no rank saves parameters ({candidate.groups} x {candidate.rows} x {candidate.columns})"
    if candidate.dense_params < min_params:
        return f"has {candidate.dense_params} weights, fewer than min_params={min_params}"
    return None


def _candidate(name: str, module: nn.Module) -> Candidate:
    groups = getattr(module, "groups", 1)
    weight = module._parameters["weight"]
    assert weight is not None
    return Candidate(
        name=name,
        kind=type(module).__name__,
        module=module,
        groups=groups,
        rows=weight.shape[0] // groups,
        columns=weight[0].numel(),
    )


def _weight_owners(model: nn.Module) -> dict[int, int]:
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return owners


def _ancestors(model: nn.Module, name: str) -> Iterator[nn.Module]:
    module = model
    for part in name.split(".")[:-1]:
        module = getattr(module, part)
        yield module
