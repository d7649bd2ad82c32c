"""Eckart and Young in every metric, against the dense singular value decomposition of P W Q in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrf_lightning.solver.factors.factorization import Root, damped, decomposition_cost, divided, factorize

SHAPES = [(1, 5, 9), (1, 9, 5), (3, 4, 7), (4, 6, 3), (1, 6, 6), (1, 1, 8), (1, 8, 1)]
METRICS = ["euclidean", "activation", "fisher"]


def moment(groups, size, rows=None, dead=0):
    """Second moment of random rows; with fewer rows than ``size`` or dead entries it is singular."""
    x = torch.randn(groups, rows or 4 * size, size, dtype=torch.float64) * torch.linspace(0.1, 3, size).double()
    x[..., :dead] = 0
    return x.transpose(1, 2) @ x / x.shape[1]


def moments(shape, metric, **kwargs):
    groups, rows, columns = shape
    inputs = None if metric == "euclidean" else moment(groups, columns, **kwargs)
    outputs = moment(groups, rows, **kwargs) if metric == "fisher" else None
    return inputs, outputs


def root(matrix, size, inverse=False):
    """Symmetric root or its pseudo-inverse by a decomposition of its own."""
    if matrix is None:
        return torch.eye(size, dtype=torch.float64)
    u, s, _ = torch.linalg.svd(matrix)
    alive = s > 1e-12 * s.amax(-1, keepdim=True)
    powers = torch.where(alive, s.clamp_min(1e-300) ** (-0.5 if inverse else 0.5), torch.zeros_like(s))
    return u @ torch.diag_embed(powers) @ u.transpose(-1, -2)


def dense_truth(weight, inputs, outputs, rank):
    """Truncate P W Q and undo both sides; needs moments of full rank."""
    _, rows, columns = weight.shape
    u, s, v = torch.linalg.svd(root(outputs, rows) @ weight.double() @ root(inputs, columns), full_matrices=False)
    truncated = u[..., :rank] @ torch.diag_embed(s[..., :rank]) @ v[..., :rank, :]
    return root(outputs, rows, inverse=True) @ truncated @ root(inputs, columns, inverse=True), s


def error_in_metric(difference, inputs, outputs):
    _, rows, columns = difference.shape
    return (root(outputs, rows) @ difference.double() @ root(inputs, columns)).flatten(1).norm(dim=1)


def product(factors, rank):
    left, right = factors.truncated(rank)
    return left @ right


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("damping", [0.0, 1e-2])
@pytest.mark.parametrize("sides", [(True, False), (False, True), (True, True)])
def test_a_diagonal_stands_for_a_diagonal_matrix(shape, damping, sides):
    weight, moments_ = torch.randn(shape), []
    for diagonal, size in zip(sides, shape[:0:-1], strict=True):
        whole = moment(shape[0], size)
        moments_.append((whole.diagonal(dim1=1, dim2=2), torch.diag_embed(whole.diagonal(dim1=1, dim2=2))))
        if not diagonal:
            moments_[-1] = (whole, whole)
    short = factorize(weight, moments_[0][0], moments_[1][0], damping=damping)
    full = factorize(weight, moments_[0][1], moments_[1][1], damping=damping)
    torch.testing.assert_close(short.singular_values, full.singular_values)
    for rank in range(1, min(shape[1:]) + 1):
        torch.testing.assert_close(product(short, rank), product(full, rank))


@pytest.mark.parametrize("damping", [0.0, 1e-2])
def test_entries_that_were_never_seen_are_projected_like_the_others(damping):
    table, counts = torch.randn(1, 4, 6), torch.tensor([[3.0, 0.0, 1.0, 0.0, 2.0, 5.0]])
    factors = factorize(table, counts, damping=damping)
    torch.testing.assert_close(product(factors, 4), table.double())
    left, _ = factors.truncated(2)
    basis = torch.linalg.qr(left).Q
    torch.testing.assert_close(product(factors, 2), basis @ basis.mT @ table.double())


@pytest.mark.parametrize("damping", [0.0, 1e-2])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", METRICS)
def test_truncations_are_those_of_the_dense_decomposition(shape, metric, damping):
    weight = torch.randn(shape, dtype=torch.float64)
    inputs, outputs = moments(shape, metric)
    factors = factorize(weight, inputs, outputs, damping=damping)
    inputs, outputs = (side if side is None else damped(side, damping) for side in (inputs, outputs))
    for rank in range(1, min(shape[1:]) + 1):
        truth, _ = dense_truth(weight, inputs, outputs, rank)
        torch.testing.assert_close(product(factors, rank), truth, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", METRICS)
def test_singular_values_are_the_dense_ones_up_to_one_unit(shape, metric):
    weight = torch.randn(shape, dtype=torch.float64)
    inputs, outputs = moments(shape, metric)
    values = factorize(weight, inputs, outputs).singular_values
    _, truth = dense_truth(weight, inputs, outputs, 1)
    torch.testing.assert_close(values / values.norm(), truth / truth.norm(), rtol=1e-7, atol=1e-9)
    if metric == "euclidean":
        torch.testing.assert_close(values, truth, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", METRICS)
def test_relative_tail_is_the_measured_error(shape, metric):
    weight = torch.randn(shape, dtype=torch.float64)
    inputs, outputs = moments(shape, metric)
    if inputs is not None:
        inputs[0] *= 100  # groups of different size keep their share of the error
    factors = factorize(weight, inputs, outputs)
    tails = factors.relative_tail()
    whole = error_in_metric(weight, inputs, outputs).norm()
    for rank in range(1, min(shape[1:]) + 1):
        error = error_in_metric(weight - product(factors, rank), inputs, outputs).norm()
        torch.testing.assert_close(tails[rank - 1], error / whole, rtol=1e-6, atol=1e-7)
    assert tails[-1] == 0
    assert (tails.diff() <= 0).all()


@pytest.mark.parametrize("kind", ["dead channels", "few samples"])
@pytest.mark.parametrize("shape", [(1, 5, 9), (1, 9, 5), (2, 6, 6)])
@pytest.mark.parametrize("metric", ["activation", "fisher"])
def test_singular_moments_are_no_obstacle(shape, metric, kind):
    """The error in the metric is that of the dense truncation of P W Q, without any damping."""
    weight = torch.randn(shape, dtype=torch.float64)
    inputs, outputs = moments(shape, metric, **({"dead": 2} if kind == "dead channels" else {"rows": 3}))
    factors = factorize(weight, inputs, outputs)
    for rank in range(1, min(shape[1:]) + 1):
        approximation = product(factors, rank)
        assert torch.isfinite(approximation).all()
        _, s = dense_truth(weight, inputs, outputs, rank)
        error = error_in_metric(weight - approximation, inputs, outputs)
        torch.testing.assert_close(error, s[..., rank:].norm(dim=-1), rtol=1e-6, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 7),
    st.integers(1, 7),
    st.sampled_from(METRICS),
    st.integers(1, 12),
    st.floats(0, 1),
    st.integers(0, 10**6),
)
def test_no_other_matrix_of_that_rank_is_closer(groups, rows, columns, metric, samples, damping, seed):
    torch.manual_seed(seed)
    weight = torch.randn(groups, rows, columns, dtype=torch.float64)
    inputs, outputs = moments((groups, rows, columns), metric, rows=samples)
    factors = factorize(weight, inputs, outputs, damping=damping)
    metric_inputs = None if inputs is None else damped(inputs, damping)
    metric_outputs = None if outputs is None else damped(outputs, damping)
    rank = 1 + seed % min(rows, columns)
    best = error_in_metric(weight - product(factors, rank), metric_inputs, metric_outputs)
    left, right = factors.truncated(rank)
    for size in (1e-3, 0.1, 1.0):
        rival = (left + size * torch.randn_like(left)) @ (right + size * torch.randn_like(right))
        assert (error_in_metric(weight - rival, metric_inputs, metric_outputs) >= best - 1e-7).all()


@pytest.mark.parametrize("metric", METRICS)
def test_a_rank_deficient_weight_is_recovered_at_its_rank(metric):
    shape, rank = (2, 8, 12), 3
    weight = torch.randn(2, 8, rank, dtype=torch.float64) @ torch.randn(2, rank, 12, dtype=torch.float64)
    inputs, outputs = moments(shape, metric)
    factors = factorize(weight, inputs, outputs)
    torch.testing.assert_close(product(factors, rank), weight, rtol=1e-9, atol=1e-9)
    assert (factors.singular_values[:, rank:] == 0).all()
    assert (factors.relative_tail()[rank - 1 :] == 0).all()
    torch.testing.assert_close(product(factors, 8), weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", [(2, 4, 6), (2, 6, 4)])
def test_a_zero_weight_gives_zero_factors(metric, shape):
    factors = factorize(torch.zeros(shape), *moments(shape, metric))
    assert (factors.singular_values == 0).all()
    assert (factors.relative_tail() == 0).all()
    left, right = factors.truncated(2)
    assert torch.isfinite(left).all()
    assert torch.isfinite(right).all()
    assert (left @ right == 0).all()


def test_a_zero_moment_stands_for_the_identity():
    weight = torch.randn(1, 5, 7, dtype=torch.float64)
    plain = factorize(weight)
    zeros = factorize(weight, torch.zeros(1, 7, 7), torch.zeros(1, 5, 5))
    torch.testing.assert_close(product(zeros, 2), product(plain, 2))
    torch.testing.assert_close(zeros.relative_tail(), plain.relative_tail())


def test_a_dead_group_does_not_count():
    weight = torch.randn(2, 5, 7, dtype=torch.float64)
    inputs = moment(2, 7)
    inputs[1] = 0
    alone = factorize(weight[:1], inputs[:1])
    torch.testing.assert_close(factorize(weight, inputs).relative_tail(), alone.relative_tail())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1e-20, 1e20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_pass_through(metric, scale, dtype):
    shape = (2, 5, 8)
    weight = torch.randn(shape).to(dtype)
    inputs, outputs = moments(shape, metric)
    plain = factorize(weight, inputs, outputs, damping=1e-2)
    scaled = factorize(
        weight * scale,
        None if inputs is None else inputs * scale**2,
        None if outputs is None else outputs / scale**2,
        damping=1e-2,
    )
    torch.testing.assert_close(product(scaled, 3) / scale, product(plain, 3), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scaled.relative_tail(), plain.relative_tail(), rtol=1e-5, atol=1e-6)
    left, right = scaled.truncated(3)
    torch.testing.assert_close(left.norm(dim=-2), right.norm(dim=-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("metric", METRICS)
def test_short_dtypes_are_solved_in_float64(dtype, metric):
    shape = (1, 6, 9)
    weight = torch.randn(shape).to(dtype)
    inputs, outputs = moments(shape, metric)
    factors = factorize(weight, inputs, outputs)
    truth, _ = dense_truth(weight.double(), inputs, outputs, 2)
    assert factors.left.dtype == factors.right.dtype == factors.singular_values.dtype == torch.float64
    torch.testing.assert_close(product(factors, 2), truth, rtol=1e-7, atol=1e-9)


def test_factors_share_the_size_of_their_component():
    left, right = factorize(torch.randn(2, 6, 9, dtype=torch.float64), moment(2, 9)).truncated(4)
    assert left.shape == (2, 6, 4)
    assert right.shape == (2, 4, 9)
    torch.testing.assert_close(left.norm(dim=-2), right.norm(dim=-1))


def test_max_rank_limits_the_components_but_not_the_singular_values():
    weight = torch.randn(1, 6, 9, dtype=torch.float64)
    few, all_ = factorize(weight, max_rank=2), factorize(weight)
    assert few.left.shape == (1, 6, 2)
    assert few.right.shape == (1, 2, 9)
    torch.testing.assert_close(few.singular_values, all_.singular_values)
    torch.testing.assert_close(product(few, 2), product(all_, 2))


def test_damping_adds_a_share_of_the_mean_eigenvalue():
    matrix = moment(1, 4) * 1e-7
    result = damped(matrix, 0.1)
    mean = matrix[0].trace() / 4
    torch.testing.assert_close(result[0], matrix[0] / mean + 0.1 * torch.eye(4, dtype=torch.float64))
    assert torch.equal(damped(torch.zeros(1, 3, 3), 0.1)[0], torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_entries_that_are_not_finite_are_errors(bad):
    weight, inputs, outputs = torch.randn(1, 3, 4), moment(1, 4), moment(1, 3)
    for name, tensor in (("weight", weight), ("input moment", inputs), ("output moment", outputs)):
        kept = float(tensor[0, 0, 0])
        tensor[0, 0, 0] = bad
        with pytest.raises(ValueError, match=f"the {name} holds NaN or infinite entries"):
            factorize(weight, inputs, outputs)
        tensor[0, 0, 0] = kept


def test_the_estimated_cost_is_that_of_measured_shapes():
    """Milliseconds on one core, from the section Scaling of ``benchmarks/RESULTS.md``."""
    measured = {
        (64, 576): 3.0,
        (128, 1152): 16.7,
        (256, 2304): 137,
        (512, 512): 84.1,
        (512, 2048): 261,
        (768, 768): 214,
    }
    rates = sorted(ms / decomposition_cost(1, *shape) for shape, ms in measured.items())
    assert rates[-1] / rates[0] < 1.8
    assert decomposition_cost(2, 256, 64) == 2 * decomposition_cost(1, 64, 256)
    # of a vocabulary only a diagonal is kept
    assert decomposition_cost(1, 768, 30522) < 3 * decomposition_cost(1, 768, 3072)


@pytest.mark.parametrize("damping", [0.0, 1e-16, 1e-9, 1e-2, 1.0])
@pytest.mark.parametrize("kind", ["full rank", "dead channels", "few samples", "one side"])
def test_a_root_squares_to_the_moment(damping, kind):
    groups, side = 3, 1 if kind == "one side" else 7
    kwargs = {"dead channels": {"dead": 2}, "few samples": {"rows": 3}}.get(kind, {})
    whole = damped(moment(groups, side, **kwargs), damping)
    found, columns = Root.of(whole, damping), torch.randn(groups, side, 4, dtype=torch.float64)
    squared = found.transposed(found.times(columns))
    torch.testing.assert_close(squared, whole @ columns, rtol=1e-9, atol=1e-9)
    visible = columns
    if damping < 1e-9 and kwargs:  # null directions stay null
        values, vectors = torch.linalg.eigh(whole)
        alive = (values > 1e-9)[:, None, :].to(values.dtype)
        assert 0 < alive.sum() < alive.numel()
        visible = (vectors * alive) @ vectors.transpose(1, 2) @ columns
    torch.testing.assert_close(found.divided(found.times(columns)), visible, rtol=1e-5, atol=1e-5)


def test_the_root_of_a_diagonal_is_that_of_the_matrix():
    diagonal = torch.tensor([[4.0, 0.0, 0.25], [1.0, 9.0, 0.0]], dtype=torch.float64)
    columns = torch.randn(2, 3, 2, dtype=torch.float64)
    found = Root.of(diagonal, 0.0)
    roots, inverse = torch.diag_embed(diagonal.sqrt()), torch.diag_embed(torch.tensor([[0.5, 0, 2], [1, 1 / 3, 0]]))
    for result in (found.times(columns), found.transposed(columns)):
        torch.testing.assert_close(result, roots @ columns)
    torch.testing.assert_close(found.divided(columns), inverse.double() @ columns, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 2])
def test_roots_of_large_damped_moments(threads):
    """Several groups at once, as large as in a grouped convolution; damping spares the eigendecomposition."""
    before, side = torch.get_num_threads(), 288
    torch.manual_seed(0)
    whole = damped(moment(4, side, rows=100), 1e-2)
    columns = torch.randn(4, side, 32, dtype=torch.float64)
    try:
        torch.set_num_threads(threads)
        found = Root.of(whole, 1e-2)
        there, back = found.times(columns), found.divided(columns)
    finally:
        torch.set_num_threads(before)
    assert found.inverse is None
    torch.testing.assert_close(found.transposed(there), whole @ columns, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.times(back), columns, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("threads", [1, 2])
def test_division_by_moments_of_several_groups(threads):
    """As large as in a grouped convolution: there a general solver failed with two threads."""
    before = torch.get_num_threads()
    torch.manual_seed(0)
    rows = torch.randn(4, 600, 288, dtype=torch.float64) * torch.logspace(0, -2, 288, dtype=torch.float64)
    moment, numerator = rows.transpose(1, 2) @ rows / 600, torch.randn(4, 32, 288, dtype=torch.float64)
    try:
        torch.set_num_threads(threads)
        found = divided(numerator, moment)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found @ moment, numerator, rtol=1e-8, atol=1e-8)


def test_division_by_a_singular_moment_is_the_pseudo_inverse():
    torch.manual_seed(0)
    rows = torch.randn(2, 5, 9, dtype=torch.float64)
    moment, numerator = rows.transpose(1, 2) @ rows, torch.randn(2, 3, 5, dtype=torch.float64) @ rows
    moment[1] += torch.eye(9, dtype=torch.float64)
    found = divided(numerator, moment)
    torch.testing.assert_close(found @ moment, numerator)
    torch.testing.assert_close(found, numerator @ torch.linalg.pinv(moment))
