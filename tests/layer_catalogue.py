"""Every kind of layer that can be factorized, with the options that change how it reads its weight."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BATCH = 2


class Conv1D(nn.Module):
    """What ``transformers.pytorch_utils.Conv1D`` is: a linear layer with a weight of shape (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        size_out = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


Conv1D.__module__ = "transformers.pytorch_utils"


@dataclass(frozen=True)
class Case:
    """A dense layer and an input of ``BATCH`` samples for it."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    indices: int = 0  # size of the table if the inputs are indices

    def dense(self) -> nn.Module:
        """The layer, with weights that are far from zero and a bias that matters."""
        layer = self.make()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_()
        return layer

    def inputs(self, dtype: torch.dtype = torch.float32) -> Tensor:
        if self.indices:
            return torch.randint(self.indices, self.shape)
        return torch.randn(self.shape, dtype=dtype)


def _conv(dims: int, **options) -> Case:
    kinds = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    options = {"kernel_size": (3, 2, 3)[:dims], **options}
    return Case(lambda: kinds[dims](4, 6, **options), (BATCH, 4, *(7, 6, 5)[:dims]))


def _transposed(dims: int, **options) -> Case:
    kinds = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
    options = {"kernel_size": (3, 2, 3)[:dims], **options}
    return Case(lambda: kinds[dims](4, 6, **options), (BATCH, 4, *(5, 4, 3)[:dims]))


CONV_OPTIONS = {
    "plain": {},
    "strided": {"stride": 2},
    "dilated": {"dilation": 2, "padding": 2},
    "same": {"padding": "same"},
    "same_even_dilated": {"padding": "same", "kernel_size": 2, "dilation": 3},
    "valid": {"padding": "valid"},
    "grouped": {"groups": 2, "padding": 1, "stride": 2},
    "unbiased": {"bias": False, "padding": 1},
    "pointwise": {"kernel_size": 1},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 2, "padding_mode": "replicate", "stride": 2},
    "circular": {"padding": 1, "padding_mode": "circular", "groups": 2},
    "circular_same": {"padding": "same", "padding_mode": "circular"},
}
TRANSPOSED_OPTIONS = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1, "output_padding": 1},
    "dilated": {"dilation": 2, "padding": 1},
    "output_padding_beyond_stride": {"dilation": 3, "output_padding": 2},
    "grouped": {"groups": 2, "stride": 3},
    "unbiased": {"bias": False},
}
LINEAR = {
    "plain": Case(lambda: nn.Linear(5, 7), (BATCH, 5)),
    "tokens": Case(lambda: nn.Linear(7, 5), (BATCH, 3, 7)),
    "grid": Case(lambda: nn.Linear(5, 7, bias=False), (BATCH, 3, 4, 5)),
}
TRANSPOSED_LINEAR = {
    "plain": Case(lambda: Conv1D(7, 5), (BATCH, 5)),
    "tokens": Case(lambda: Conv1D(5, 7), (BATCH, 3, 7)),
}
EMBEDDING = {
    "plain": Case(lambda: nn.Embedding(9, 4), (BATCH, 5), indices=9),
    "single": Case(lambda: nn.Embedding(9, 4), (BATCH,), indices=9),
    "wide": Case(lambda: nn.Embedding(4, 9), (BATCH, 2, 3), indices=4),
}
CONVOLUTIONS = {dims: {name: _conv(dims, **options) for name, options in CONV_OPTIONS.items()} for dims in (1, 2, 3)}
TRANSPOSED = {
    dims: {name: _transposed(dims, **options) for name, options in TRANSPOSED_OPTIONS.items()} for dims in (1, 2, 3)
}
CONVOLUTIONS[2]["asymmetric"] = _conv(2, stride=(1, 2), padding=(0, 2), dilation=(2, 1))
TRANSPOSED[2]["asymmetric"] = _transposed(2, stride=(1, 2), padding=(0, 1), dilation=(2, 1), output_padding=(0, 1))

KINDS: dict[str, dict[str, Case]] = {
    "Linear": LINEAR,
    "Conv1D": TRANSPOSED_LINEAR,
    "Embedding": EMBEDDING,
    **{f"Conv{dims}d": cases for dims, cases in CONVOLUTIONS.items()},
    **{f"ConvTranspose{dims}d": cases for dims, cases in TRANSPOSED.items()},
}
EVERY_CASE = {f"{kind}-{name}": case for kind, cases in KINDS.items() for name, case in cases.items()}
