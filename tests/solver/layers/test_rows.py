"""Rows of every layer kind against per-sample gradients from autograd, in float64."""

import copy
from dataclasses import replace

import pytest
import torch
from layer_catalogue import BATCH, CONVOLUTIONS, EVERY_CASE, LINEAR, TRANSPOSED
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

from lrf_lightning.solver.layers.row_readers import row_reader
from lrf_lightning.solver.layers.rows import UnreadableRowsError
from lrf_lightning.surgery import Candidate, low_rank_type


class Read:
    """A layer with an input, an output gradient, and the gradient of its weight for every sample."""

    def __init__(self, layer: nn.Module, x: Tensor, samples: int = BATCH):
        self.layer, self.x, self.samples = layer, x, samples
        matrices = low_rank_type(layer).matrices(layer)
        self.candidate = Candidate("layer", type(layer).__name__, layer, *matrices.shape)
        self.reader = row_reader(self.candidate)
        self.output = layer(x).detach()
        self.grad = torch.randn_like(self.output)
        left, values, right = torch.linalg.svd(matrices, full_matrices=False)
        self.left, self.right = left * values[:, None], right

    def gradient(self, rows) -> Tensor:
        """Gradient of the matrices for part of the output, shape (g, m, n)."""
        weight = self.layer.weight.detach().requires_grad_()
        output = functional_call(self.layer, {"weight": weight}, self.x)
        (gradient,) = torch.autograd.grad((output * self.grad)[rows].sum(), weight)
        twin = copy.deepcopy(self.layer)
        twin.weight.data = gradient
        return low_rank_type(twin).matrices(twin)

    def gradients(self) -> Tensor:
        size = len(self.output) // self.samples
        return torch.stack([self.gradient(slice(n * size, (n + 1) * size)) for n in range(self.samples)])


@pytest.mark.parametrize(("dims", "split"), [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)])
@pytest.mark.parametrize("name", CONVOLUTIONS[2])
def test_components_in_other_orders_are_the_derivatives_along_them(dims, split, name):
    if name not in CONVOLUTIONS[dims]:
        pytest.skip("a case of two dimensions")
    case = CONVOLUTIONS[dims][name]
    read = Read(case.dense().double(), case.inputs(torch.float64))
    candidate = replace(read.candidate, kernel=read.layer.kernel_size, split=split)
    reader, kernel, (rows, columns) = row_reader(candidate), candidate.left_kernel, candidate.sides
    left = torch.randn(candidate.groups, rows, 3, dtype=torch.float64)
    right = torch.randn(candidate.groups, 3, columns, dtype=torch.float64)
    got = reader.components(reader.project(read.x, right, BATCH), read.grad, left, BATCH)
    gradients = read.gradients().reshape(BATCH, candidate.groups, -1, columns, kernel)  # (B, g, m, d, l)
    by_entry = left.reshape(candidate.groups, -1, kernel, 3)
    assert_close(got, torch.einsum("bgmca,gmar,grc->br", gradients, by_entry, right))


@pytest.fixture(params=EVERY_CASE.values(), ids=EVERY_CASE)
def read(request) -> Read:
    case = request.param
    return Read(case.dense().double(), case.inputs(torch.float64))


def test_components_are_the_derivatives_along_the_components(read):
    projected = read.reader.project(read.x.to(read.right.dtype), read.right, BATCH)
    got = read.reader.components(projected, read.grad, read.left, BATCH)
    assert_close(got, torch.einsum("bgmn,gmk,gkn->bk", read.gradients(), read.left, read.right))


def test_inner_is_the_derivative_along_the_weight(read):
    bias = read.layer._parameters.get("bias")
    got = read.reader.inner(read.grad, read.output, None if bias is None else bias.detach(), BATCH)
    assert_close(got, torch.einsum("bgmn,gmn->b", read.gradients(), read.candidate.matrices()))


def test_rows_reproduce_the_gradient_of_the_weight(read):
    available = read.reader.rows_per_sample(read.x, BATCH)
    inputs, gradients = read.reader.inputs(read.x, None, BATCH), read.reader.gradients(read.grad, None, BATCH)
    groups, rows, columns = read.candidate.groups, read.candidate.rows, read.candidate.columns
    assert inputs.shape == (groups, BATCH * available, columns)
    assert gradients.shape == (groups, BATCH * available, rows)
    shape = (groups, BATCH, available)
    per_sample = torch.einsum(
        "gbrm,gbrn->bgmn", gradients.reshape(*shape, rows), inputs.reshape(*shape, columns).to(gradients.dtype)
    )
    assert_close(per_sample, read.gradients())


def test_positions_take_the_same_rows_of_both_sides(read):
    available = read.reader.rows_per_sample(read.x, BATCH)
    positions = torch.arange(available)[::2]
    for rows, tensor in ((read.reader.inputs, read.x), (read.reader.gradients, read.grad)):
        everything = rows(tensor, None, BATCH)
        expected = everything.reshape(everything.shape[0], BATCH, available, -1)[:, :, positions]
        assert_close(rows(tensor, positions, BATCH), expected.flatten(1, 2))


@pytest.mark.parametrize("case", [CONVOLUTIONS[2]["strided"], TRANSPOSED[2]["strided"]], ids=["conv", "transposed"])
def test_a_sample_may_have_several_images(case):
    layer, x = case.dense().double(), torch.randn(6, *case.shape[1:], dtype=torch.float64)
    read = Read(layer, x, samples=3)
    assert read.reader.rows_per_sample(x, 3) == 2 * read.reader.rows_per_sample(x, 6)
    got = read.reader.components(read.reader.project(x, read.right, 3), read.grad, read.left, 3)
    assert_close(got, torch.einsum("bgmn,gmk,gkn->bk", read.gradients(), read.left, read.right))
    positions = torch.tensor([0, 2])
    assert len(read.reader.inputs(x, positions, 3)[0]) == len(read.reader.gradients(read.grad, positions, 3)[0])


@pytest.mark.parametrize(("length", "batch"), [(4, 3), (6, 3), (6, 2)])
def test_time_major_tokens_belong_to_their_samples(length, batch):
    """A length that is a multiple of the batch looks like windows otherwise."""
    layer = LINEAR["tokens"].dense().double()
    read = Read(layer, torch.randn(length, batch, 7, dtype=torch.float64))
    got = read.reader.components(read.reader.project(read.x, read.right, batch), read.grad, read.left, batch)
    gradients = torch.stack([read.gradient((slice(None), n)) for n in range(batch)])
    assert_close(got, torch.einsum("bgmn,gmk,gkn->bk", gradients, read.left, read.right))


def test_windows_belong_to_their_samples():
    layer = LINEAR["tokens"].dense().double()
    read = Read(layer, torch.randn(6, 4, 7, dtype=torch.float64), samples=3)
    got = read.reader.components(read.reader.project(read.x, read.right, 3), read.grad, read.left, 3)
    assert_close(got, torch.einsum("bgmn,gmk,gkn->bk", read.gradients(), read.left, read.right))
    assert read.reader.rows_per_sample(read.x, 3) == 8


@pytest.mark.parametrize(("rows", "batch"), [(11, 4), (5, 4), (8, 3), (3, 4), (1, 4), (0, 4)])
def test_rows_that_do_not_go_up_are_cut_into_runs(rows, batch):
    """Nodes of graphs, tokens of experts: sums over the batch are exact, and a run holds consecutive rows."""
    layer = nn.Linear(7, 5).double()
    read = Read(layer, torch.randn(rows, 7, dtype=torch.float64), samples=batch)
    each = read.reader.rows_per_sample(read.x, batch)
    assert each == -(-rows // batch)
    got = read.reader.components(read.reader.project(read.x, read.right, batch), read.grad, read.left, batch)
    along = torch.einsum("om,gmk,gkn,on->ok", read.grad, read.left, read.right, read.x)
    filled = nn.functional.pad(along, (0, 0, 0, each * batch - rows))
    assert_close(got, filled.reshape(batch, each, along.shape[1]).sum(1))
    inputs, gradients = read.reader.inputs(read.x, None, batch), read.reader.gradients(read.grad, None, batch)
    assert_close((gradients.transpose(1, 2) @ inputs)[0], read.grad.T @ read.x)
    assert_close((inputs.transpose(1, 2) @ inputs)[0], read.x.T @ read.x)
    output = layer(read.x).detach()
    inner = read.reader.inner(read.grad, output, layer.bias.detach(), batch)
    assert_close(inner.sum(), (read.grad * (output - layer.bias.detach())).sum())


def test_output_size_of_a_transposed_convolution_is_read_from_the_gradient():
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1).double()
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    output = layer(x, [10, 6])
    grad = torch.randn_like(output)
    (expected,) = torch.autograd.grad((output * grad).sum(), layer.weight)
    reader = Read(layer, x).reader
    product = reader.gradients(grad, None, 2).transpose(1, 2) @ reader.inputs(x, None, 2)
    assert_close(product[0], expected.reshape(4, -1).T)


@pytest.mark.parametrize(
    ("layer", "shape", "batch"),
    [
        (nn.Linear(7, 5), (5, 3, 7), 2),
        (nn.Linear(7, 5), (7,), 1),
        (nn.Conv2d(4, 6, 3), (3, 4, 7, 7), 2),
        (nn.Conv2d(4, 6, 3), (4, 7, 7), 1),
        (nn.ConvTranspose1d(4, 6, 3), (3, 4, 7), 2),
    ],
)
def test_rows_without_samples_are_refused(layer, shape, batch):
    with pytest.raises(UnreadableRowsError, match="cannot be assigned to samples"):
        Read(layer, torch.randn(shape)).reader.rows_per_sample(torch.randn(shape), batch)


@pytest.mark.parametrize("shape", [(8,), (1, 8), (1, 4)])
def test_places_that_all_samples_share_are_refused(shape):
    layer = nn.Embedding(10, 6)
    places = torch.arange(shape[-1]).reshape(shape)
    read = Read(layer, places, samples=1)
    with pytest.raises(UnreadableRowsError, match=r"looks up the entries 0 to \d once for all 4 samples"):
        read.reader.rows_per_sample(places, 4)
    assert read.reader.rows_per_sample(places, 1) == shape[-1], "a single sample has them for itself"
    with pytest.raises(UnreadableRowsError, match="cannot be assigned to samples"):
        read.reader.rows_per_sample(torch.randint(10, (7,)), 4)
    tokens = torch.randint(10, (4, 8))
    assert read.reader.rows_per_sample(tokens, 4) == read.reader.rows_per_sample(tokens.flatten(), 4) == 8


def test_lookups_are_counted_instead_of_squared():
    x = torch.tensor([[0, 2, 2], [4, 0, 2]])
    reader = Read(nn.Embedding(6, 4), x).reader
    for positions in (None, torch.tensor([0, 2])):
        total, rows = reader.squared_inputs(x, positions, 2)
        one_hot = reader.inputs(x, positions, 2)
        assert_close(total, one_hot.double().square().sum(1))
        assert rows == one_hot.shape[1]
