import copy
import dataclasses
import random

import numpy as np
import pytest
import torch
from small_modules import QUICK, clouds, loader, network
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset

import lrf_lightning
from lrf_lightning import StepOutput, compress, load_compressed, read_metadata
from lrf_lightning.modules import LowRankModule


def loss(model, batch):
    x, y = batch
    return functional.cross_entropy(model(x), y, reduction="none")


def squeeze(model, *, splits=None, **options):
    calibration, selection, verification = splits or (loader(seed=1), loader(seed=2), loader(seed=3))
    return compress(
        model, options.pop("loss", loss), calibration, selection, verification, frozen=True, **(QUICK | options)
    )


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x, y = clouds()
    for _ in range(60):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.zero_grad()
    model[0].requires_grad_(False)
    model[1].eval()
    return model


@pytest.fixture(scope="module")
def result(trained):
    return squeeze(trained, objective="budget")


class TestResult:
    def test_model_has_the_ranks(self, trained, result):
        assert result.ranks
        for name, layer in result.model.named_modules():
            assert isinstance(layer, LowRankModule) == (name in result.ranks)
            if name in result.ranks:
                assert layer.rank == result.ranks[name]
        assert result.params_model == tuple(sum(p.numel() for p in m.parameters()) for m in (trained, result.model))
        assert {layer.name: layer.rank for layer in result.layers if layer.rank} == result.ranks

    def test_budget_is_met(self, result):
        before, after = result.params_layers
        assert after <= 0.5 * before

    def test_figures_of_the_verdict_can_be_repeated(self, trained, result):
        x, y = clouds(seed=3)
        with torch.no_grad():
            dense, compressed = (functional.cross_entropy(m(x), y, reduction="none") for m in (trained, result.model))
            scores = [(m(x).argmax(1) == y).double().mean() for m in (trained, result.model)]
        difference = (compressed - dense).double()
        certificate = result.certificate
        torch.testing.assert_close(certificate.dense.loss, dense.mean().item(), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(certificate.loss_change.mean, difference.mean().item(), rtol=1e-4, atol=1e-7)
        error = (difference.std() / len(y) ** 0.5).item()
        torch.testing.assert_close(certificate.loss_change.standard_error, error, rtol=1e-4, atol=1e-7)
        assert certificate.dense.samples == certificate.loss_change.pairs == 96
        assert certificate.score_change is None, "a plain loss tells no score"
        assert scores[0] > 0.9

    def test_the_chosen_point_is_on_the_frontier(self, result):
        (chosen,) = [point for point in result.frontier if point.chosen]
        assert chosen.ranks == result.ranks
        assert chosen.params_model == result.params_model[1]

    def test_a_file_says_whether_its_weights_are_those_that_were_judged(self, trained, tmp_path):
        result = squeeze(trained, objective="frontier", budgets=[0.5])
        for each in (result, result.at(0.5)):
            assert read_metadata(each.save(tmp_path / "model"))["judged_weights"] is True
        with torch.no_grad():
            result.model[0].bias.add_(1)
        with pytest.warns(UserWarning, match="are not those that were judged"):
            assert read_metadata(result.save(tmp_path / "model"))["judged_weights"] is False

    def test_step_output_brings_the_score(self, trained):
        def with_score(model, batch):
            x, y = batch
            logits = model(x)
            hits = (logits.argmax(1) == y).float()
            return StepOutput(functional.cross_entropy(logits, y, reduction="none"), hits, logits, y)

        result = squeeze(trained, objective="budget", loss=with_score)
        x, y = clouds(seed=3)
        assert result.certificate.dense.score == pytest.approx((trained(x).argmax(1) == y).double().mean().item())
        assert result.certificate.score_change.pairs == 96
        assert result.certificate.temperature > 0

    def test_nothing_to_factorize(self):
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 1))
        result = squeeze(model, loss=lambda m, batch: m(batch[0]).square().mean(1))
        assert (result.ranks, result.certificate.verdict) == ({}, "unchanged")
        torch.testing.assert_close(result.model.state_dict(), model.state_dict(), rtol=0, atol=0)
        assert result.model is not model


class TestNothingElseChanges:
    def test_model_flags_and_random_states(self, trained):
        model = copy.deepcopy(trained)
        weights = {name: value.clone() for name, value in model.state_dict().items()}

        def flags():
            return (
                [p.requires_grad for p in model.parameters()],
                [p.grad is None for p in model.parameters()],
                [m.training for m in model.modules()],
                [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
                random.getstate(),
                np.random.get_state()[1].tolist(),
                torch.get_rng_state().tolist(),
            )

        def noisy(model, batch):
            torch.rand(1), np.random.rand(), random.random()
            return loss(model, batch)

        before = flags()
        squeeze(model, objective="budget", loss=noisy)
        assert flags() == before
        torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)

    @pytest.mark.parametrize("training", [True, False])
    def test_the_result_is_in_the_mode_of_the_model(self, trained, training):
        result = squeeze(copy.deepcopy(trained).train(training), objective="budget")
        assert result.ranks
        assert {module.training for module in result.model.modules()} == {training}

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
    def test_gradient_mode(self, trained, result, mode):
        with mode():
            other = squeeze(trained, objective="budget")
            assert not torch.is_grad_enabled()
        torch.testing.assert_close(other.model.state_dict(), result.model.state_dict())
        assert not any(p.is_inference() for p in other.model.parameters())

    def test_a_failure_leaves_no_trace(self, trained):
        def fails(model, batch):
            if not torch.is_grad_enabled():
                return loss(model, batch)
            raise RuntimeError("in the middle")

        state = torch.get_rng_state()
        with pytest.raises(RuntimeError, match="in the middle"):
            squeeze(trained, loss=fails)
        assert torch.equal(torch.get_rng_state(), state)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in trained.modules())


class TestData:
    def test_shuffled_loaders_are_compared_sample_by_sample(self, trained, result):
        """The order is drawn once, so paired differences are those of the same samples."""
        shuffled = [loader(seed=seed, shuffle=True) for seed in (1, 2, 3)]
        interval = squeeze(trained, objective="budget", splits=shuffled).certificate.loss_change
        torch.testing.assert_close(
            interval.standard_error, result.certificate.loss_change.standard_error, rtol=0.5, atol=0
        )

    def test_generators_are_read_once(self, trained, result):
        splits = [(batch for batch in loader(seed=seed)) for seed in (1, 2, 3)]
        other = squeeze(trained, objective="budget", splits=splits)
        torch.testing.assert_close(other.model.state_dict(), result.model.state_dict())

    def test_the_same_data_for_choice_and_verdict(self, trained):
        shared = loader(seed=2)
        with pytest.warns(UserWarning, match=r"selection and verification share data \(96 of 96"):
            squeeze(trained, splits=(loader(seed=1), shared, shared))

    def test_a_step_that_changes_its_batch_gives_what_one_does_that_leaves_it(self, trained):
        def changing(model, batch):
            x, y = batch.pop("x").mul_(1.5), batch.pop("y")
            return 2 * loss(model, (x, y)) - loss(model, (x, y))  # two calls, so that the step is timed itself

        def plain(model, batch):
            x, y = 1.5 * batch["x"], batch["y"]
            return 2 * loss(model, (x, y)) - loss(model, (x, y))

        splits = [[{"x": x, "y": y} for x, y in loader(seed=seed)] for seed in (1, 2, 3)]
        found, wanted = (
            squeeze(trained, splits=splits, objective="budget", loss=function, probes=True, speed="eager")
            for function in (changing, plain)
        )
        assert found.ranks == wanted.ranks
        assert found.certificate == wanted.certificate
        assert found.speed.problems == []
        torch.testing.assert_close(found.model.state_dict(), wanted.model.state_dict(), rtol=0, atol=0)

    @pytest.mark.parametrize("position", [0, 1, 2])
    def test_empty_split(self, trained, position):
        splits = [loader(seed=seed) for seed in (1, 2, 3)]
        splits[position] = []
        with pytest.raises(
            ValueError, match=f"{('calibration', 'selection', 'verification')[position]} holds no batch"
        ):
            squeeze(trained, splits=splits)


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"objectve": "compact"}, TypeError, "no setting 'objectve', did you mean 'objective'"),
            ({"objective": "copmact"}, ValueError, "did you mean 'compact'"),
            ({"keep": 0.0}, ValueError, r"keep=0.0 is not a number in \(0, 1\]"),
            ({"loss": "mse"}, TypeError, "loss='mse' is no callable"),
            ({"loss": lambda m, b: m(b[0])}, ValueError, r"loss has shape \(16, 4\) for a batch of 16"),
            ({"loss": lambda m, b: 1.0}, ValueError, "loss returned float"),
            ({"loss": lambda m, b: m(b[0]).sum(1) / 0}, ValueError, "loss of the original model on selection is"),
            ({"splits": (3, [], [])}, TypeError, "calibration is a int; give a DataLoader"),
        ],
    )
    def test_one_clear_error(self, trained, options, error, message):
        with pytest.raises(error, match=message):
            squeeze(trained, **options)

    def test_no_module(self):
        with pytest.raises(TypeError, match=r"model is a function; give the trained torch.nn.Module"):
            squeeze(network)

    def test_weights_that_are_not_finite(self, trained):
        model = copy.deepcopy(trained)
        model[2].bias.data[0] = torch.inf
        with pytest.raises(ValueError, match=r"weights of '2\.bias' hold NaN or infinite"):
            squeeze(model)


class TestWhatExistsAlready:
    def test_a_bare_state_dict(self, trained, result, tmp_path):
        torch.save({"state_dict": {f"net.{name}": value for name, value in trained.state_dict().items()}}, "a.ckpt")
        for weights in (trained.state_dict(), tmp_path / "a.ckpt"):
            random = torch.get_rng_state()
            fresh = network()
            found = squeeze(fresh, objective="budget", weights=weights)
            assert found.ranks == result.ranks
            torch.testing.assert_close(found.model.state_dict(), result.model.state_dict(), rtol=0, atol=0)
            torch.set_rng_state(random)
            torch.testing.assert_close(fresh.state_dict(), network().state_dict(), rtol=0, atol=0)

    def test_weights_that_do_not_fit(self, trained):
        with pytest.raises(ValueError, match="weights does not fit Sequential"):
            squeeze(network(32), weights=trained.state_dict())

    @pytest.mark.slow
    def test_a_model_of_timm(self, tmp_path):
        timm = pytest.importorskip("timm")

        def make():
            return timm.create_model("resnet10t", num_classes=4).eval()

        def images(seed):
            generator = torch.Generator().manual_seed(seed)
            return [(torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8) % 4) for _ in range(2)]

        options = QUICK | {"objective": "budget", "keep": 0.5, "compensation": False, "probes": False}
        found = compress(make(), loss, images(1), images(2), images(3), **options)
        assert found.params_layers[1] <= 0.5 * found.params_layers[0]
        found.save(tmp_path / "small")
        x = images(4)[0][0]
        assert torch.equal(load_compressed(make, tmp_path / "small")(x), found.model.eval()(x))


def test_save_and_load(trained, result, tmp_path):
    assert result.save(tmp_path / "folder") == tmp_path / "folder"
    loaded = lrf_lightning.load_compressed(network(), tmp_path / "folder")
    x, _ = clouds()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), result.model(x), rtol=0, atol=0)


def test_layers_of_a_users_own_subclass_are_layers(trained, result, tmp_path):
    class Begun(nn.Linear):
        def __init__(self, like):
            super().__init__(like.in_features, like.out_features)
            self.load_state_dict(like.state_dict())

    model = nn.Sequential(*(Begun(layer) if isinstance(layer, nn.Linear) else layer for layer in trained))
    found = squeeze(model, objective="budget")
    assert found.ranks == result.ranks
    found.save(tmp_path)
    x = clouds()[0]
    torch.testing.assert_close(load_compressed(copy.deepcopy(model), tmp_path)(x), found.model(x), rtol=0, atol=0)
    torch.testing.assert_close(found.model(x), result.model(x))


def test_progress_is_told(trained):
    told = []
    squeeze(trained, progress=lambda *report: told.append(report))
    stages = list(dict.fromkeys(stage for stage, _, _ in told))
    assert stages[0] == "evaluation"
    assert stages[-1] == "speed"
    assert all(total == 0 or done <= total for _, done, total in told)
    assert ("statistics", 6, 6) in told


def test_result_has_the_fields_of_a_solution(result):
    names = {field.name for field in dataclasses.fields(result)}
    assert {"model", "ranks", "frontier", "certificate", "layers", "message", "seconds", "samples"} <= names
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.ranks = {}


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_loss_that_draws_noise_draws_the_same_for_every_model(trained, shuffled):
    """Two models that are compared under different noise would differ by much more than their weights do."""
    drawn = {}

    def noisy(model, batch):
        noise = torch.randn_like(batch[0])
        if not torch.is_grad_enabled():
            drawn.setdefault(float(batch[0].sum()), []).append(float(noise.sum()))
        return functional.cross_entropy(model(batch[0] + noise), batch[1], reduction="none")

    state = torch.get_rng_state()
    splits = [loader(seed=seed, shuffle=shuffled) for seed in (1, 2, 3)]
    result = squeeze(trained, loss=noisy, splits=splits, speed="none")  # the order of timed runs does not matter
    assert torch.equal(torch.get_rng_state(), state)
    assert len(result.frontier) >= 2
    counts = sorted(len(values) for values in drawn.values())
    assert len(counts) == 18
    assert counts[0] >= 2, "verification: the original and the chosen model"
    assert counts[6] > len(result.frontier), "selection: the original and all that were measured"
    assert all(len(set(values)) == 1 for values in drawn.values())
    assert len({values[0] for values in drawn.values()}) == 18, "every batch of every split has noise of its own"


def test_loaders_over_streams_of_unknown_length():
    class Stream(IterableDataset):
        def __iter__(self):
            generator = torch.Generator().manual_seed(0)
            return iter([(torch.randn(12, generator=generator),) for _ in range(40)])

    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 4))
    splits = [DataLoader(Stream(), batch_size=8) for _ in range(3)]
    result = compress(model, lambda model, batch: model(batch[0]).square().mean(1), *splits, objective="budget")
    assert result.samples == {"calibration": 40, "selection": 40, "verification": 40}
