"""The published greedy algorithms against a literal loop over ranks."""

import copy

import pytest
import torch
from literal_curves import LAYERS, as_matrices, mean_loss, per_sample, predictions, problem

from lrf_lightning import compress
from lrf_lightning.solver.ranks.paper import candidate_ranks, greedy_rank


def algorithm_2(model, batches, name, gamma, kind):
    """Algorithm 2 as it is printed, one rank after the other: every recorded (k, gradient times change)."""
    weight = model.get_parameter(f"{name}.weight")
    loss = torch.cat([per_sample(model, batch) for batch in batches]).mean()
    (gradient,) = torch.autograd.grad(loss, weight)
    groups = getattr(model.get_submodule(name), "groups", 1)
    matrices, gradients = as_matrices(weight.detach(), groups), as_matrices(gradient, groups)
    _, rows, columns = matrices.shape
    recorded = []
    k = 1
    while k < rows * columns / (rows + columns):
        u, s, v = torch.linalg.svd(matrices, full_matrices=False)
        change = u[..., :k] @ torch.diag_embed(s[..., :k]) @ v[..., :k, :] - matrices
        error = change.square().sum()
        size = matrices.square().sum() if kind == "relative" else matrices.numel()
        slope = (gradients * change).sum()
        if error / size <= gamma and slope < 0:
            recorded.append((k, float(slope)))
        if error.sqrt() <= 1e-6 * matrices.norm():
            break
        k += 1
    return recorded


def choice(recorded, variant):
    if not recorded:
        return None
    return recorded[0][0] if variant == "compact" else min(recorded, key=lambda candidate: candidate[1])[0]


@pytest.mark.parametrize("gamma", [0.02, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_all_ranks_at_once_give_the_candidates_of_the_loop(seed, gamma):
    model, batches = problem(seed)
    found = 0
    for name, prediction in predictions(model, batches, "euclidean").items():
        recorded = algorithm_2(model, batches, name, gamma, "relative")
        assert candidate_ranks(prediction.first_order, prediction.perturbation, gamma) == [k for k, _ in recorded]
        for rank, slope in recorded:
            assert float(prediction.first_order[rank - 1]) == pytest.approx(slope, rel=1e-7)
        for variant in ("lossless", "compact"):
            chosen = greedy_rank(prediction.first_order, prediction.perturbation, gamma, variant)
            assert chosen == choice(recorded, variant)
        found += len(recorded)
    assert found > 0 or gamma < 1


@pytest.mark.parametrize("variant", ["lossless", "compact"])
@pytest.mark.parametrize(("kind", "gamma"), [("relative", 0.4), ("mean_square", 4e-3)])
def test_compress_gives_the_ranks_of_the_loop(variant, kind, gamma):
    model, batches = problem(1)
    before = copy.deepcopy(model.state_dict())
    result = compress(
        model, mean_loss, batches, problem(2)[1], problem(3)[1],
        objective="paper", variant=variant, gamma=gamma, gamma_kind=kind,
    )  # fmt: skip
    expected = {name: choice(algorithm_2(model, batches, name, gamma, kind), variant) for name in LAYERS}
    expected = {name: rank for name, rank in expected.items() if rank is not None}
    assert expected
    assert result.ranks == expected
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    # the factors are those of the plain decomposition: no compensation, no whitening
    for name, rank in expected.items():
        groups = getattr(model.get_submodule(name), "groups", 1)
        u, s, v = torch.linalg.svd(as_matrices(model.get_parameter(f"{name}.weight").detach(), groups))
        truth = u[..., :rank] @ torch.diag_embed(s[..., :rank]) @ v[..., :rank, :]
        dense = result.model.get_submodule(name).to_dense().weight.detach()
        torch.testing.assert_close(as_matrices(dense, groups), truth, rtol=1e-6, atol=1e-8)


def test_nothing_within_gamma_leaves_the_model_alone():
    model, batches = problem()
    result = compress(model, mean_loss, batches, problem(1)[1], problem(2)[1], objective="paper", gamma=1e-9)
    assert result.ranks == {}
    assert result.certificate.verdict == "unchanged"
    assert "gamma=1e-09" in result.message


def test_lossless_and_compact_differ_in_the_candidate_they_take():
    first_order = torch.tensor([-9.0, -0.1, 0.2, -0.3, -0.2])
    error = torch.tensor([0.9, 0.3, 0.2, 0.15, 0.1])
    assert candidate_ranks(first_order, error, 0.1) == [2, 4, 5]
    assert greedy_rank(first_order, error, 0.1, "lossless") == 4
    assert greedy_rank(first_order, error, 0.1, "compact") == 2
    assert greedy_rank(first_order.abs(), error, 1.0, "lossless") is None


def test_the_loop_stops_where_the_error_is_near_zero():
    first_order = torch.tensor([-0.1, -1e-9, -0.5, -0.6])
    error = torch.tensor([0.3, 1e-8, 1e-9, 0.0])
    assert candidate_ranks(first_order, error, 0.1) == [1, 2]


def test_of_equal_losses_the_smaller_rank_is_kept():
    assert greedy_rank(torch.tensor([-0.2, -0.2]), torch.tensor([0.2, 0.1]), 0.1, "lossless") == 1
