import logging
import os
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import fsspec
import pytest
import torch
from compressed_models import Net, compressed
from torch import nn
from torch.nn.utils import prune

from lrf_lightning import ExportError, export_onnx, export_program
from lrf_lightning.export import files as export
from lrf_lightning.modules import LowRankModule

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

EXPORTS = {"onnx": export_onnx, "pt2": export_program}
both = pytest.mark.parametrize("name", EXPORTS)


def net():
    """Always the same; most of the parameters are in the factorized layers."""
    torch.manual_seed(0)
    model = compressed(Net(256), {"conv": 3, "body": 4}).eval()
    model.norm.running_mean.normal_()
    return model


def images(batch=2):
    return torch.randn(batch, 3, 6, 6, generator=torch.Generator().manual_seed(batch))


def run(path, *inputs):
    """The first output of a file, by tools that know nothing of this package."""
    if str(path).endswith(".pt2"):
        return torch.export.load(path).module()(*inputs)
    session = onnxruntime.InferenceSession(str(path))
    feed = {item.name: value.numpy() for item, value in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


@both
def test_outputs_sizes_and_report(name, tmp_path, caplog):
    model, path = net(), tmp_path / "deep" / f"net.{name}"
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with caplog.at_level(logging.INFO), warnings.catch_warnings():
        warnings.simplefilter("error")
        done = EXPORTS[name](model, images(1), path)
    for batch in (1, 2, 7):
        with torch.no_grad():
            torch.testing.assert_close(run(path, images(batch)), model(images(batch)), rtol=0, atol=1e-4)
    assert done.difference < 1e-4
    assert done.folded == ("norm",)
    assert done.size == path.stat().st_size
    # the dense file has the 256 x 256 weight instead of its factors of rank 4, and the 8 x 27 one instead of rank 3
    saved = 4 * (256 * 256 - 2 * 256 * 4 + 8 * 27 - 3 * (8 + 27))
    assert done.dense_size - done.size == pytest.approx(saved, rel=0.05)
    assert str(done).startswith(f"net.{name}: 0.")
    assert f"% against {done.dense_size / 1e6:.2f} MB dense; outputs differ by at most" in str(done)
    assert caplog.text == "", "libraries are quiet"
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items()), "the model was changed"
    assert os.listdir(path.parent) == [path.name]


def test_layers_stay_low_rank(tmp_path):
    onnx = pytest.importorskip("onnx")
    export_onnx(net(), images(), tmp_path / "net.onnx")
    graph = onnx.load(tmp_path / "net.onnx").graph
    assert {tuple(weight.dims) for weight in graph.initializer} >= {(4, 256), (256, 4), (3, 3, 3, 3), (8, 3, 1, 1)}
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


@pytest.mark.parametrize("fold_norms", [True, False])
def test_norms_are_gone(fold_norms, tmp_path):
    done = export_program(net(), images(), tmp_path / "net.pt2", fold_norms=fold_norms, compare_size=False)
    graph = str(torch.export.load(tmp_path / "net.pt2").graph)
    assert ("batch_norm" in graph) == (not fold_norms)
    assert done.folded == (("norm",) if fold_norms else ())


@both
def test_training_mode_is_left_for_the_export_only(name, tmp_path):
    model = net().train()
    EXPORTS[name](model, images(), tmp_path / f"net.{name}", compare_size=False)
    assert model.training
    torch.testing.assert_close(run(tmp_path / f"net.{name}", images()), model.eval()(images()), rtol=0, atol=1e-4)


@both
def test_the_sample_is_not_in_the_file(name, tmp_path):
    sample = images()
    EXPORTS[name](net(), sample, tmp_path / f"net.{name}", compare_size=False)
    assert sample.numpy().tobytes()[:64] not in (tmp_path / f"net.{name}").read_bytes()


@both
def test_a_dense_model_is_its_own_dense_file(name, tmp_path):
    done = EXPORTS[name](nn.Linear(3, 4), torch.ones(2, 3), tmp_path / f"net.{name}")
    assert done.size == done.dense_size
    assert EXPORTS[name](net(), images(), tmp_path / f"net.{name}", compare_size=False).dense_size is None


class Keywords(nn.Module):
    """Several inputs and outputs, one input of which has no batch."""

    def __init__(self):
        super().__init__()
        self.table, self.body = nn.Embedding(9, 16), nn.Linear(16, 16)

    def forward(self, ids, mask=None, shift=None):
        x = self.body(self.table(ids)) + shift
        return {"mean": (x * mask[..., None]).mean(1), "tokens": x, "none": None}


def test_keyword_arguments_and_structured_outputs(tmp_path):
    model = compressed(Keywords(), {"table": 3, "body": 4}).eval()
    sample = {"ids": torch.arange(8).reshape(2, 4), "mask": torch.ones(2, 4), "shift": torch.randn(16)}
    for name, function in EXPORTS.items():
        assert function(model, sample, tmp_path / f"net.{name}", compare_size=False).difference < 1e-5
    larger = [torch.randint(9, (5, 4)), torch.rand(5, 4), torch.randn(16)]
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "net.onnx", *larger), model(*larger)["mean"], rtol=0, atol=1e-4)


@both
def test_attention(name, tmp_path):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    compressed(model, {"layers.0.self_attn.out_proj": 3, "layers.1.linear1": 4})
    tokens = torch.randn(2, 5, 16)
    assert EXPORTS[name](model, tokens, tmp_path / f"net.{name}", compare_size=False).difference < 1e-4
    assert torch.backends.mha.get_fastpath_enabled()


class Fixed(nn.Module):
    """Can be called with a batch of two only."""

    def forward(self, x):
        return x.reshape(2, -1)


class TestFailures:
    @both
    def test_a_batch_that_cannot_be_dynamic(self, name, tmp_path):
        with pytest.raises(ExportError, match=rf"(?s)Fixed cannot be exported as {name}.*dynamic_batch=False"):
            EXPORTS[name](Fixed(), torch.ones(2, 3, 4), tmp_path / f"net.{name}")
        assert not list(tmp_path.glob("net*"))
        EXPORTS[name](Fixed(), torch.ones(2, 3, 4), tmp_path / f"net.{name}", dynamic_batch=False)
        assert run(tmp_path / f"net.{name}", torch.ones(2, 3, 4)).shape == (2, 12)

    def test_of_others_the_size_of_the_batch_is_not_blamed(self, tmp_path):
        with pytest.raises(ExportError, match="Net cannot be exported as pt2") as caught:
            export_program(net(), torch.ones(2, 5, 6, 6), tmp_path / "net.pt2", fold_norms=False)
        assert "dynamic_batch" not in str(caught.value)

    @both
    def test_a_forward_that_cannot_be_captured(self, name, tmp_path):
        class Branching(nn.Module):
            def forward(self, x):
                return x if x.sum() > 0 else -x

        with pytest.raises(ExportError, match=f"Branching cannot be exported as {name}"):
            EXPORTS[name](Branching(), torch.ones(2, 3), tmp_path / f"net.{name}")

    @both
    def test_a_file_that_computes_something_else_is_not_written(self, name, tmp_path, monkeypatch):
        (tmp_path / f"net.{name}").write_bytes(b"older")
        fold = export.fold

        def wrong(model, call):
            folded, names = fold(model, call)
            folded.head.bias.data += 0.01
            return folded, names

        monkeypatch.setattr(export, "fold", wrong)
        with pytest.raises(ExportError, match=r"outputs of net\..* differ from the model's by 1\.0e-02, more than"):
            EXPORTS[name](net(), images(), tmp_path / f"net.{name}")
        assert (tmp_path / f"net.{name}").read_bytes() == b"older"

    def test_nan_is_not_equal(self, tmp_path, monkeypatch):
        model = net()
        monkeypatch.setattr(export, "_tensors", lambda outputs: [torch.full((len(outputs), 5), torch.nan)])
        with pytest.raises(ExportError, match="differ from the model's by nan"):
            export_program(model, images(), tmp_path / "net.pt2")

    def test_dense_layers_that_cannot_be_exported_do_not_cost_the_file(self, tmp_path, monkeypatch):
        write = export._write

        def failing(name, model, *others):
            if not any(isinstance(module, LowRankModule) for module in model.modules()):
                raise ExportError("no dense file")
            write(name, model, *others)

        monkeypatch.setattr(export, "_write", failing)
        with pytest.warns(UserWarning, match="the size of the dense file is not known: no dense file"):
            done = export_program(net(), images(), tmp_path / "net.pt2")
        assert done.dense_size is None
        assert "MB dense" not in str(done)
        assert (tmp_path / "net.pt2").stat().st_size == done.size

    def test_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(OSError, match=r"cannot create the folder .*file"):
            export_program(net(), images(), tmp_path / "file" / "net.pt2", compare_size=False)

    def test_packages_that_are_missing(self, tmp_path, monkeypatch):
        monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r"needs onnx, onnxscript, onnxruntime; pip install 'lrf_lightning\[exp"):
            export_onnx(net(), images(), tmp_path / "net.onnx")
        assert export.missing_packages("pt2") == []

    def test_old_torch(self, monkeypatch):
        monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
        assert export.missing_packages("onnx") == ["torch>=2.6"]


def test_large_weights_stand_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "ONE_FILE", 1000)
    done = export_onnx(net(), images(), tmp_path / "net.onnx")
    assert {path.name for path in tmp_path.glob("*.*")} >= {"net.onnx", "net.onnx.data"}
    assert done.size == sum(path.stat().st_size for path in tmp_path.glob("net.*"))
    assert done.size < done.dense_size
    torch.testing.assert_close(run(tmp_path / "net.onnx", images(3)), net_outputs(3), rtol=0, atol=1e-4)


def net_outputs(batch):
    with torch.no_grad():
        return net()(images(batch))


def test_remote_file():
    try:
        done = export_program(net(), images(), "memory://bucket/models/net.pt2", compare_size=False)
        assert done.path == "memory://bucket/models/net.pt2"
        assert fsspec.filesystem("memory").size("/bucket/models/net.pt2") == done.size
    finally:
        fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_snippet_of_the_readme(project, tmp_path, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (project / "README.md").read_text(), re.DOTALL)
    (snippet,) = [block for block in blocks if "export_onnx" in block]
    exec(snippet, {"result": SimpleNamespace(model=net()), "inputs": images()})
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("model.onnx: ")
    assert second.startswith("model.pt2: ")
    for name in ("model.onnx", "model.pt2"):
        torch.testing.assert_close(run(tmp_path / name, images(3)), net_outputs(3), rtol=0, atol=1e-4)


@both
def test_ending(name, tmp_path):
    with pytest.raises(ValueError, match=rf"path='.*net\.bin' does not end in '\.{name}'"):
        EXPORTS[name](net(), images(), tmp_path / "net.bin")


@pytest.mark.slow  # imports torch in a process of its own
def test_pt2_needs_neither_onnx_nor_this_package_to_run(tmp_path):
    export_program(net(), images(), tmp_path / "net.pt2", compare_size=False)
    blocked = ("onnx", "onnxscript", "onnxruntime", "lrf_lightning")
    code = (
        f"import sys, torch; sys.modules.update(dict.fromkeys({blocked})); "
        "print(tuple(torch.export.load('net.pt2').module()(torch.ones(4, 3, 6, 6)).shape))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "(4, 5)", done.stderr


def test_pruned_factors_are_plain_in_the_file(tmp_path):
    model = net()
    prune.l1_unstructured(model.body, "left_factor", 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = export_program(model, images(), tmp_path / "net.pt2")
    assert done.dense_size > done.size
    assert "body.left_factor_orig" in model.state_dict()
