import copy
import dataclasses
import errno
import json
import math
import multiprocessing
import os
import pickle
import resource
import signal
import struct
import time
import warnings
import zipfile
from collections import OrderedDict

import fsspec
import numpy as np
import pytest
import torch
from compressed_models import RANKS, Net, compressed, net_solution, solution
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune

import lrf_lightning
from lrf_lightning import CheckpointError, load_compressed, read_metadata, restore_dense
from lrf_lightning.fingerprint import weights_fingerprint
from lrf_lightning.modules import LowRankLinear, LowRankModule
from lrf_lightning.saving.checkpoint import save_compressed
from lrf_lightning.saving.weights_file import HEADER_KEY, read_header


def images():
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(3))


def header_of(path):
    return read_header(path.read_bytes(), "file")


def rewrite(path, *, tensors=None, **changes):
    """Write the model file again with other tensors or entries of the description, hash and all else as they were."""
    record = {**header_of(path), **changes}
    save_file(load_file(path) if tensors is None else tensors, path, {HEADER_KEY: json.dumps(record)})


@pytest.fixture
def saved(tmp_path):
    result = net_solution()
    result.save(tmp_path / "model")
    return result, tmp_path / "model"


class TestRoundTrip:
    def test_files_of_the_first_version_load(self, saved):
        """They know one order of a convolution's factors only, which their description does not name."""
        result, folder = saved
        assert not any(
            module.split is not None for module in result.model.modules() if isinstance(module, LowRankModule)
        )
        rewrite(folder / "model.safetensors", format_version=1)
        assert torch.equal(load_compressed(Net().eval(), folder)(images()), result.model(images()))

    def test_outputs_are_equal_bit_for_bit(self, saved):
        result, path = saved
        dense = Net().eval()
        before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
        loaded = load_compressed(dense, path)
        assert torch.equal(loaded(images()), result.model(images()))
        assert isinstance(loaded.body, LowRankLinear)
        assert not loaded.training
        assert sum(p.numel() for p in loaded.parameters()) == result.params_model[1]
        assert dense.state_dict().keys() == before.keys()
        assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())

    @pytest.mark.parametrize("suffix", ["", "model.safetensors"])
    @pytest.mark.parametrize("kind", [str, os.fspath, lambda path: path])
    def test_paths_of_folder_and_file_of_any_kind(self, saved, suffix, kind):
        result, path = saved
        loaded = load_compressed(Net, kind(path / suffix)).eval()
        assert torch.equal(loaded(images()), result.model(images()))

    def test_a_model_that_is_compressed_already_is_given_the_ranks_of_the_file(self, saved):
        result, path = saved
        other = compressed(Net(), {"conv": 2, "stretch": 3}).eval()
        assert torch.equal(load_compressed(other, path)(images()), result.model(images()))

    def test_nothing_compressed(self, tmp_path):
        model = Net().eval()
        path = solution(model, {}, {}).save(tmp_path)
        assert torch.equal(load_compressed(Net().eval(), path)(images()), model(images()))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_dtypes_come_from_the_file(self, tmp_path, dtype):
        result = net_solution()
        result.model.to(dtype)
        loaded = load_compressed(Net().eval(), result.save(tmp_path))
        assert loaded.norm.num_batches_tracked.dtype == torch.int64
        assert {p.dtype for p in loaded.parameters()} == {dtype}
        assert torch.equal(loaded(images().to(dtype)), result.model(images().to(dtype)))

    def test_frozen_layers_stay_frozen(self, saved):
        dense = Net()
        dense.body.requires_grad_(False)
        loaded = load_compressed(dense, saved[1])
        assert not any(p.requires_grad for p in loaded.body.parameters())
        assert all(p.requires_grad for p in loaded.conv.parameters())

    def test_tied_modules_and_tied_parameters_stay_tied(self, tmp_path):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.first = nn.Linear(6, 6)
                self.again = self.first
                self.encode, self.decode = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
                self.decode.weight = self.encode.weight

            def forward(self, x):
                return self.decode(self.encode(self.again(self.first(x))))

        model = compressed(Tied(), {"first": 2})
        path = solution(model, {"first": 2}, {"first": ("Linear", (6, 6))}).save(tmp_path)
        loaded = load_compressed(Tied(), path)
        assert loaded.first is loaded.again
        assert loaded.encode.weight is loaded.decode.weight
        stored = load_file(path / "model.safetensors")
        assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in model.parameters())
        x = torch.randn(3, 6)
        assert torch.equal(loaded(x), model(x))

    def test_factors_of_an_embedding_and_its_output_layer_stay_tied(self, tmp_path):
        class Language(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
                self.head.weight = self.embed.weight

            def forward(self, x):
                return self.head(self.embed(x))

        model = compressed(Language(), {"embed": 3})
        path = solution(model, {"embed": 3}, {"embed": ("Embedding", (20, 8))}).save(tmp_path)
        loaded = load_compressed(Language(), path)
        assert loaded.head.left_factor is loaded.embed.left_factor
        x = torch.arange(20)
        assert torch.equal(loaded(x), model(x))

    @pytest.mark.parametrize("ranks", [{"body": 2}, {"embed": 3, "head": 3}])
    def test_two_weights_are_not_loaded_into_one(self, tmp_path, ranks):
        class Language(nn.Module):
            def __init__(self, *, tied):
                super().__init__()
                self.embed, self.body, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
                if tied:
                    self.head.weight = self.embed.weight

        model = compressed(Language(tied=False), ranks)
        path = solution(model, ranks, dict.fromkeys(ranks, ("Linear", (8, 8)))).save(tmp_path)
        with pytest.raises(CheckpointError, match=r"'embed\..*' and 'head\..*' differ in the file and are one tensor"):
            load_compressed(Language(tied=True), path)
        for key in ("weight", "left_factor", "right_factor"):
            if key in model.embed._parameters:  # the same values twice do fit
                model.head._parameters[key].data = model.embed._parameters[key].data.clone()
        loaded = load_compressed(Language(tied=True), solution(model, ranks, {}).save(tmp_path / "equal"))
        assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())

    def test_projections_of_attention(self, tmp_path):
        class Attention(nn.Module):
            def __init__(self):
                super().__init__()
                self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

            def forward(self, x):
                return self.attn(x, x, x)[0]

        ranks = {"attn.q_proj": 2, "attn.out_proj": 3}
        model = compressed(Attention(), ranks)
        path = solution(model, ranks, dict.fromkeys(ranks, ("Linear", (8, 8)))).save(tmp_path)
        x = torch.randn(2, 3, 8)
        assert torch.equal(load_compressed(Attention(), path)(x), model(x))

    def test_tensors_that_are_not_contiguous_or_views_of_one_storage(self, tmp_path):
        class Views(nn.Module):
            def __init__(self):
                super().__init__()
                flat = torch.arange(12.0)
                self.left, self.right = nn.Parameter(flat[:6].view(2, 3)), nn.Parameter(flat[6:].view(3, 2).T)
                self.register_buffer("wide", torch.ones(1, 3).expand(4, 3))
                self.register_buffer("empty", torch.empty(0, 2))

        model = Views()
        loaded = load_compressed(Fresh, solution(model, {}, {}).save(tmp_path))
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name

    def test_extra_state_of_plain_data_and_tensors(self, tmp_path):
        state = {
            "mean": torch.ones(2),
            3: (1, [None, True, b"\x00\xff"], OrderedDict(a=math.inf)),
            "text": "NaN",
            "nan": math.nan,
        }
        path = solution(Extra(state), {}, {}).save(tmp_path)
        found = load_compressed(Extra(None), path).extra
        assert torch.equal(found.pop("mean"), state["mean"])
        assert math.isnan(found.pop("nan"))
        assert found == {3: state[3], "text": "NaN"}
        assert type(found[3][2]) is OrderedDict

    def test_extra_state_that_needs_pickle_is_refused(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"'_extra_state' in the state dict is a set, which cannot be stored"):
            solution(Extra({"a": {1}}), {}, {}).save(tmp_path / "model")
        assert not (tmp_path / "model").exists()

    def test_sparse_buffers_are_refused(self, tmp_path):
        model = nn.Module()
        model.register_buffer("mask", torch.eye(3).to_sparse())
        with pytest.raises(CheckpointError, match=r"tensor 'mask' cannot be stored: it is torch.sparse_coo"):
            solution(model, {}, {}).save(tmp_path)

    def test_remote_folder(self):
        result = net_solution()
        try:
            assert result.save("memory://bucket/run/model") == "memory://bucket/run/model"
            loaded = load_compressed(Net().eval(), "memory://bucket/run/model")
            assert torch.equal(loaded(images()), result.model(images()))
            assert read_metadata("memory://bucket/run/model")["ranks"] == RANKS
            with pytest.raises(CheckpointError, match="there is no file or folder 'memory://bucket/other'"):
                load_compressed(Net(), "memory://bucket/other")
        finally:
            fsspec.filesystem("memory").rm("/bucket", recursive=True)


class Fresh(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(2, 3))
        self.register_buffer("wide", torch.zeros(4, 3))
        self.register_buffer("empty", torch.empty(0, 2))


class Extra(nn.Module):
    def __init__(self, extra):
        super().__init__()
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


class TestMetadata:
    def test_certificate_and_settings_can_be_read_without_the_model(self, saved):
        result, path = saved
        record = read_metadata(path)
        assert record["ranks"] == RANKS
        assert record["factorized"]["conv"] == {"kind": "Conv2d", "shape": [8, 3, 3, 3], "rank": 3}
        assert record["certificate"]["verdict"] == "inconclusive"
        assert record["certificate"]["dense"] == {"samples": 64, "loss": 0.5, "score": 0.9}
        assert record["frontier"][0]["ranks"] == RANKS
        assert record["settings"]["objective"] == "lossless"
        assert record["params_model"] == list(result.params_model)
        assert record["library_version"] == lrf_lightning.__version__
        assert record["format_version"] == 3

    def test_numbers_that_json_lacks_are_strings_that_float_understands(self, saved):
        text = (saved[1] / "compression.json").read_text()
        record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        change = record["certificate"]["loss_change"]
        assert (float(change["lower"]), float(change["upper"])) == (-math.inf, math.inf)
        assert math.isnan(float(record["layers"][0]["curve"]["first_order"][0])) is False
        assert math.isnan(float(record["layers"][0]["curve"]["standard_error"][0]))

    def test_description_file_and_header_agree(self, saved):
        assert json.loads((saved[1] / "compression.json").read_text()) == read_metadata(saved[1])

    def test_numbers_of_numpy_and_torch_become_pythons(self, tmp_path):
        result = dataclasses.replace(net_solution(), seconds={"a": np.float64(0.5), "b": torch.tensor(2.0), "c": 1})
        assert read_metadata(result.save(tmp_path))["seconds"] == {"a": 0.5, "b": 2.0, "c": 1}

    def test_long_curves_are_thinned(self, tmp_path):
        result = net_solution()
        ranks = list(range(1, 1001))
        values = [1 / 3 / rank for rank in ranks]
        curve = dataclasses.replace(
            result.layers[0].curve,
            **dict.fromkeys(("first_order", "standard_error", "curvature", "predicted", "perturbation"), values),
            ranks=ranks,
            allowed=[True] * 1000,
            singular_values=[2.0 / rank for rank in range(1, 1201)],
            probes=[(5, 0.1, 0.2, 0.3)],
        )
        layers = [dataclasses.replace(result.layers[0], curve=curve), *result.layers[1:]]
        path = dataclasses.replace(result, layers=layers).save(tmp_path)
        kept = read_metadata(path)["layers"][0]["curve"]
        assert len(kept["ranks"]) <= 65
        assert kept["ranks"][0] == 1
        assert kept["ranks"][-1] == 1000
        for i, rank in enumerate(kept["ranks"]):
            assert kept["predicted"][i] == pytest.approx(1 / 3 / rank, rel=1e-5)
            assert kept["singular_values"][i] == pytest.approx(2.0 / rank, rel=1e-5)
        assert kept["probes"] == [[5, 0.1, 0.2, 0.3]]


class TestRefusals:
    def check(self, path, match, model=None):
        model = model or Net()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=match):
            load_compressed(model, path)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    def test_future_version(self, saved):
        rewrite(saved[1] / "model.safetensors", format_version=4, library_version="9.9")
        self.check(saved[1], r"format version 4, written by lrf_lightning 9\.9.*reads up to 3\. Update lrf_lightning")
        with pytest.raises(CheckpointError, match="format version 4"):
            read_metadata(saved[1])

    @pytest.mark.parametrize("version", [None, "1", True, 0])
    def test_no_version(self, saved, version):
        rewrite(saved[1] / "model.safetensors", format_version=version)
        self.check(saved[1], "was not written by lrf_lightning: its description has no format_version")

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"ranks": {"conv": "3"}}, "ranks=.* is no map from names to whole numbers"),
            ({"ranks": None}, "ranks=None is no map"),
            ({"weights_hash": None}, "lacks weights_hash or factorized"),
            ({"factorized": 3}, "lacks weights_hash or factorized"),
            ({"ranks": {"conv": True}}, "ranks=.* is no map from names to whole numbers"),
            ({"factorized": {"conv": [1]}}, "describes the factorized layer 'conv' as"),
            ({"factorized": {"conv": {"kind": "Linear"}}}, "describes the factorized layer 'conv' as"),
            ({"factorized": {"conv": {"kind": "Linear", "shape": 3}}}, "describes the factorized layer 'conv' as"),
            ({"aliases": {"x": "nothing"}}, "aliases or extra state refer to 'nothing'"),
            ({"extra_state": {"x": {"tensor": "nothing"}}}, "aliases or extra state refer to 'nothing'"),
        ],
    )
    def test_damaged_description(self, saved, changes, match):
        rewrite(saved[1] / "model.safetensors", **changes)
        self.check(saved[1], match)

    @pytest.mark.parametrize("header", ["[" * 100_000, '{"__metadata__": null}', '{"__metadata__": "x"}'])
    def test_hostile_header(self, tmp_path, header):
        header = '{"a":' + header if header[0] == "[" else header
        file = tmp_path / "model.safetensors"
        file.write_bytes(len(header).to_bytes(8, "little") + header.encode())
        self.check(tmp_path, "is no safetensors file|was not written by lrf_lightning")

    def test_changed_weights(self, saved):
        file = saved[1] / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        self.check(saved[1], "were changed after it was written: their hash is")

    @pytest.mark.parametrize("share", [0.0, 0.0005, 0.5, 0.999])
    def test_truncated_file(self, saved, share):
        file = saved[1] / "model.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[: int(share * len(content))])
        self.check(saved[1], "truncated")

    def test_foreign_safetensors(self, tmp_path):
        save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
        self.check(tmp_path, "was not written by lrf_lightning: its header has no entry")

    def test_foreign_description(self, tmp_path):
        for text in ("[1]", "no json"):
            save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors", {HEADER_KEY: text})
            self.check(tmp_path, "is no JSON object|no readable description")

    @pytest.mark.parametrize(
        "content", [b"", b"hello world, this is text", b"\x80\x02}q\x00.", struct.pack("<Q", 5) + b"{nojs}"]
    )
    def test_foreign_bytes(self, tmp_path, content):
        (tmp_path / "model.safetensors").write_bytes(content)
        self.check(tmp_path, "is no safetensors file")

    def test_missing_files(self, tmp_path):
        self.check(tmp_path, "holds no model.safetensors, so no compressed model")
        self.check(tmp_path / "nowhere", "there is no file or folder")

    def resave(self, saved, edit):
        """Save a state dict that was edited, with a right hash."""
        result, path = saved
        state = result.model.state_dict()
        edit(state)
        result.model.state_dict = lambda: state
        save_compressed(result, path)
        del result.model.state_dict
        return path

    def test_missing_tensors(self, saved):
        path = self.resave(saved, lambda state: state.pop("head.bias"))
        self.check(path, r"does not fit Net; missing tensors: head.bias \(1 in all\)")

    def test_extra_tensors(self, saved):
        path = self.resave(saved, lambda state: state.update({f"x{i}": torch.ones(1) for i in range(9)}))
        self.check(path, r"extra tensors: x0, x1, x2, x3, x4, \.\.\. \(9 in all\)")

    def test_wrong_shapes(self, saved):
        path = self.resave(saved, lambda state: state.update({"head.bias": torch.ones(6)}))
        self.check(path, r"wrong shapes: head.bias is \(6,\) instead of \(5,\)")

    def test_factors_of_another_rank_than_the_description_says(self, saved):
        path = self.resave(saved, lambda state: state.update({"body.left_factor": torch.ones(12, 5)}))
        self.check(path, r"body.left_factor is \(12, 5\) instead of \(12, 4\)")

    def test_another_architecture(self, saved):
        wider = r"layer 'body' is a Linear with a weight of shape \(13, 13\), in the file it was a Linear .* \(12, 12\)"
        self.check(saved[1], wider, Net(features=13))
        self.check(saved[1], "does not fit Linear: .* no module named 'conv'", nn.Linear(3, 3))
        other = Net()
        other.body = nn.Conv1d(12, 12, 1)
        self.check(saved[1], r"layer 'body' is a Conv1d with a weight of shape \(12, 12, 1\)", other)

    def test_meta_device(self, saved):
        with pytest.raises(CheckpointError, match="Net has tensors on the meta device"):
            load_compressed(Net().to("meta"), saved[1])

    def test_what_is_no_model(self, saved):
        with pytest.raises(TypeError, match="neither a module nor a class or function"):
            load_compressed("Net", saved[1])
        with pytest.raises(TypeError, match="neither a module"):
            load_compressed(lambda: 3, saved[1])


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


class TestMaliciousFiles:
    def test_pickles_in_the_folder_are_not_touched(self, saved, tmp_path):
        result, path = saved
        for name in ("pytorch_model.bin", "compression.json", "model.safetensors.index.json", "model.ckpt"):
            (path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
        assert torch.equal(load_compressed(Net().eval(), path)(images()), result.model(images()))
        read_metadata(path)
        assert not (tmp_path / "exploded").exists()

    def test_a_pickle_instead_of_the_model(self, saved, tmp_path):
        (saved[1] / "model.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
        with pytest.raises(CheckpointError, match="is no safetensors file"):
            load_compressed(Net(), saved[1])
        assert not (tmp_path / "exploded").exists()

    def test_an_archive_of_torch_instead_of_the_model(self, saved, tmp_path):
        for content in (Bomb(tmp_path / "exploded"), {"state_dict": {}, "lrf_lightning": Bomb(tmp_path / "exploded")}):
            torch.save(content, saved[1] / "model.safetensors")
            with pytest.raises(CheckpointError, match="more than plain data, which is not loaded"):
                load_compressed(Net(), saved[1])
        assert not (tmp_path / "exploded").exists()

    def test_torchscript_is_not_run(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "script.ckpt", "w") as archive:
            archive.writestr("script/constants.pkl", b"")
            archive.writestr("script/data.pkl", pickle.dumps(Bomb(tmp_path / "exploded")))
        with pytest.raises(CheckpointError, match="is a TorchScript archive"):
            load_compressed(Net(), tmp_path / "script.ckpt")
        assert not (tmp_path / "exploded").exists()


class TestModels:
    """Models that are saved without a result: loaded, trained, saved again."""

    def test_that_were_trained_since_they_were_loaded(self, saved, tmp_path):
        model = load_compressed(Net(), saved[1])
        with torch.no_grad():
            model.body.left_factor.mul_(2)
        path = save_compressed(model, tmp_path / "again")
        assert torch.equal(load_compressed(Net(), path).eval()(images()), model.eval()(images()))
        before, record = read_metadata(saved[1]), read_metadata(path)
        assert [record[key] for key in ("ranks", "factorized")] == [before[key] for key in ("ranks", "factorized")]
        assert (record["certificate"], record["judged_weights"]) == (None, False)
        assert json.loads((path / "compression.json").read_text()) == record

    def test_others_are_refused_before_a_file_is_written(self, tmp_path):
        for source, what in (
            (Net(), "is a Net without low-rank layers"),
            (LowRankLinear(4, 4, 2), "is a LowRankLinear itself.*wrap it in a module"),
            (Net, "is a type"),
            (net_solution().model.state_dict(), "is a OrderedDict"),
        ):
            with pytest.raises(TypeError, match=what) as caught:
                save_compressed(source, tmp_path / "model")
            assert "allowed are the result of compress and a model with low-rank layers" in str(caught.value)
        assert not (tmp_path / "model").exists()

    @pytest.mark.parametrize("name", ["left_factor", "bias"])
    def test_factors_that_are_computed_are_refused(self, tmp_path, name):
        model = net_solution().model
        prune.l1_unstructured(model.body, name, 0.5)
        with pytest.raises(CheckpointError, match=rf"{name} of the layer 'body' is computed .*prune\.remove"):
            save_compressed(model, tmp_path / "model")
        assert not (tmp_path / "model").exists()
        prune.remove(model.body, name)
        loaded = load_compressed(Net().eval(), save_compressed(model, tmp_path / "model"))
        assert torch.equal(loaded(images()), model(images()))


class TestJudgedWeights:
    """Whether the certificate in a file is about the weights beside it."""

    @pytest.fixture
    def judged(self):
        result = net_solution()
        return dataclasses.replace(result, fingerprint=weights_fingerprint(result.model))

    def test_are_those_that_were_judged(self, judged, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            judged.model.load_state_dict(copy.deepcopy(judged.model.state_dict()))
            judged.model.train().requires_grad_(False)
            assert read_metadata(judged.save(tmp_path))["judged_weights"] is True

    @pytest.mark.parametrize(
        "change",
        [
            lambda model: model.bfloat16(),
            lambda model: model.norm.running_mean.add_(1),
            lambda model: model.head.bias.data.add_(1),
        ],
    )
    def test_have_changed(self, judged, change, tmp_path):
        change(judged.model)
        with pytest.warns(UserWarning, match="are not those that were judged"):
            record = read_metadata(judged.save(tmp_path))
        assert record["judged_weights"] is False
        assert record["certificate"]["verdict"] == "inconclusive"

    def test_are_unknown(self, saved):
        assert read_metadata(saved[1])["judged_weights"] is None


def _save_for_ever(path, ready):
    results = [net_solution(seed) for seed in (1, 2)]
    ready.set()
    while True:
        for result in results:
            save_compressed(result, path)


class TestAtomicity:
    @pytest.mark.parametrize("step", [0, 1])
    @pytest.mark.parametrize("when", ["before", "after"])
    def test_interrupted_around_each_rename(self, saved, monkeypatch, step, when):
        old, path = saved
        new, calls, replace = net_solution(1), [], os.replace

        def interrupted(source, target):
            calls.append(target)
            if len(calls) - 1 == step and when == "before":
                raise KeyboardInterrupt
            replace(source, target)
            if len(calls) - 1 == step:
                raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            new.save(path)
        expected = old if (step, when) == (0, "before") else new
        assert torch.equal(load_compressed(Net().eval(), path)(images()), expected.model(images()))
        assert not list(path.glob(".*")), "temporary files were left behind"

    def test_killed_at_any_moment(self, tmp_path):
        expected = [net_solution(seed).model(images()) for seed in (1, 2)]
        net_solution(1).save(tmp_path / "model")
        context = multiprocessing.get_context("fork")
        seen = set()
        for attempt in range(8):
            ready = context.Event()
            process = context.Process(target=_save_for_ever, args=(tmp_path / "model", ready))
            process.start()
            assert ready.wait(30)
            time.sleep(0.003 + 0.0041 * attempt)
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            output = load_compressed(Net().eval(), tmp_path / "model")(images())
            matches = [torch.equal(output, other) for other in expected]
            assert any(matches), "neither the old nor the new model"
            seen.add(matches.index(True))
            json.loads((tmp_path / "model" / "compression.json").read_text())
        assert seen <= {0, 1}

    @pytest.mark.parametrize("cause", [errno.ENOSPC, errno.EROFS])
    def test_disk_full_or_read_only_names_the_cause_and_keeps_the_old_model(self, saved, monkeypatch, cause):
        old, path = saved
        new = net_solution(1)

        def failing(descriptor):
            raise OSError(cause, os.strerror(cause))

        monkeypatch.setattr(os, "fsync", failing)
        with pytest.raises(
            OSError, match=rf"cannot write .*{os.strerror(cause)}.*stays in memory; save it again"
        ) as info:
            new.save(path)
        assert info.value.errno == cause
        monkeypatch.undo()
        assert torch.equal(load_compressed(Net().eval(), path)(images()), old.model(images()))
        assert {file.name for file in path.iterdir()} == {"model.safetensors", "compression.json"}
        new.save(path)
        assert torch.equal(load_compressed(Net().eval(), path)(images()), new.model(images()))

    def test_a_write_that_the_system_cuts_off(self, saved):
        old, path = saved
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # bytes; a full disk cuts off in the same way
        try:
            with pytest.raises(OSError, match=r"cannot write .*model\.safetensors.*File too large.*stays in memory"):
                net_solution(1).save(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert torch.equal(load_compressed(Net().eval(), path)(images()), old.model(images()))
        assert {file.name for file in path.iterdir()} == {"model.safetensors", "compression.json"}

    def test_a_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(OSError, match=r"cannot create the folder .*file.*stays in memory"):
            net_solution().save(tmp_path / "file" / "model")

    def test_a_folder_without_permission(self, tmp_path, monkeypatch):
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere")
        tmp_path.chmod(0o500)
        try:
            with pytest.raises(PermissionError, match="Permission denied"):
                net_solution().save(tmp_path / "model")
        finally:
            tmp_path.chmod(0o700)

    def test_new_files_have_ordinary_permissions(self, saved):
        (saved[1] / "other").write_text("")
        assert (saved[1] / "model.safetensors").stat().st_mode == (saved[1] / "other").stat().st_mode


class TestRestoreDense:
    def test_outputs_are_equal_up_to_rounding(self):
        model = net_solution().model.double()
        dense = restore_dense(model)
        assert type(dense.body) is nn.Linear
        assert type(dense.conv) is nn.Conv2d
        assert isinstance(model.body, LowRankLinear)
        torch.testing.assert_close(dense(images().double()), model(images().double()))
        weight = model.body.left_factor @ model.body.right_factor
        torch.testing.assert_close(dense.body.weight, weight)

    def test_a_single_layer(self):
        layer = compressed(nn.Sequential(nn.Linear(5, 4)), {"0": 2})[0]
        dense = restore_dense(layer)
        assert type(dense) is nn.Linear
        x = torch.randn(3, 5)
        expected = functional.linear(x, layer.left_factor @ layer.right_factor, layer.bias)
        torch.testing.assert_close(dense(x), expected)


def test_a_dense_model_may_have_lazy_layers_that_stay_dense(tmp_path):
    def model(last):
        return nn.Sequential(nn.Linear(12, 12), nn.ReLU(), last)

    data = [[(torch.randn(20, 12),)] for _ in range(3)]
    options = {"objective": "budget", "keep": 0.5, "speed": "none", "include": ["0"]}
    trained = model(nn.Linear(12, 4))
    result = lrf_lightning.compress(trained, lambda net, batch: net(batch[0]).square().mean(1), *data, **options)
    result.save(tmp_path)
    loaded = load_compressed(model(nn.LazyLinear(4)), tmp_path)
    torch.testing.assert_close(loaded(data[0][0][0]), result.model(data[0][0][0]))
