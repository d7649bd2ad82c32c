"""Models as files for deployment: ONNX and ``torch.export``.

Both go through ``torch.export``, so the model's forward must be one that it can capture. The first dimension of the
tensors in the sample is the batch, and may have any size later. Batch norm is folded into the layers before it
(:mod:`lrf_lightning.export.batch_norm_folding`). Before a file is put in place it is read again and run, ONNX in
onnxruntime, and its outputs are compared with the model's on two sizes of the batch.

onnx, onnxscript and onnxruntime, the extra ``export``, are imported only by :func:`export_onnx`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lrf_lightning import random_state, safe_files
from lrf_lightning.copies.model_copy import copied_model
from lrf_lightning.export.batch_norm_folding import fold
from lrf_lightning.export.sample_call import Sample, SampleCall
from lrf_lightning.modules import LowRankModule
from lrf_lightning.safe_files import AnyPath
from lrf_lightning.saving.checkpoint import restore_dense
from lrf_lightning.surgery.module_hooks import settle_parameters

__all__ = [
    "FORMATS",
    "ExportError",
    "ExportedFile",
    "export_model",
    "export_onnx",
    "export_program",
    "missing_packages",
]

FORMATS = {"onnx": "model.onnx", "pt2": "model.pt2"}
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "pt2": ()}
TOLERANCE = 1e-4  # largest difference of an output, relative to the largest output if that is above 1
ONE_FILE = 1_500_000_000  # bytes; protobuf, in which ONNX is written, ends at 2 GiB


class ExportError(RuntimeError):
    """A model cannot be exported, or what was exported does not compute the same; the message says why."""


@dataclass(frozen=True)
class ExportedFile:
    """What was written.

    Attributes:
        format: ``onnx`` or ``pt2``.
        path: the file.
        size: bytes on the disk, weights in a file beside it included.
        dense_size: bytes of the same model exported with its factors multiplied to dense layers, None if not asked for.
        difference: largest absolute difference from the model's outputs.
        folded: names of the batch norms that are part of the layer before them now.
    """

    format: str
    path: Path | str
    size: int
    dense_size: int | None
    difference: float
    folded: tuple[str, ...]

    def __str__(self) -> str:
        dense = ""
        if self.dense_size is not None:
            change = 100 * (self.size / self.dense_size - 1)
            dense = f", {change:+.1f} % against {_megabytes(self.dense_size)} dense"
        name, size = os.path.basename(self.path), _megabytes(self.size)
        return f"{name}: {size}{dense}; outputs differ by at most {self.difference:.1e}"


def export_onnx(
    model: nn.Module,
    sample: Sample,
    path: AnyPath,
    *,
    fold_norms: bool = True,
    dynamic_batch: bool = True,
    compare_size: bool = True,
) -> ExportedFile:
    """Write a model as ONNX with torch's ``dynamo`` exporter, and check it in onnxruntime.

    Weights of more than 1.5 GB stand in a file ``<path>.data`` beside it.

    Args:
        model: any model; a copy of it on the CPU and in evaluation mode is exported.
        sample: what it is called with: a Tensor, a tuple of positional or a dict of keyword arguments.
        path: the file, ending in ``.onnx``, or the URL of one that fsspec understands. The folder is created.
        fold_norms: whether batch norm is folded into the layer before it.
        dynamic_batch: whether the batch may have any size, or only that of the sample.
        compare_size: whether the model is also exported with dense layers, to tell the size of that file.

    Raises:
        ExportError: if the model cannot be captured, the file does not run or its outputs differ from the model's by
            more than 1e-4 (of the largest output if that is above 1). Nothing is written then.
        ImportError: if a package of the extra ``export`` or torch 2.6 is missing.
        OSError: if the file cannot be written.
        ValueError: if the sample holds no batch, or the name of the file has another ending.
    """
    missing = missing_packages("onnx")
    if missing:
        raise ImportError(f"export to ONNX needs {', '.join(missing)}; pip install 'lrf_lightning[export]'")
    return _export("onnx", model, sample, path, fold_norms, dynamic_batch, compare_size)


def export_program(
    model: nn.Module,
    sample: Sample,
    path: AnyPath,
    *,
    fold_norms: bool = True,
    dynamic_batch: bool = True,
    compare_size: bool = True,
) -> ExportedFile:
    """Write a model with ``torch.export``; ``torch.export.load(path).module()`` runs it without the model's class.

    Arguments and errors are those of :func:`export_onnx`, whose packages are not needed; the file ends in ``.pt2``.
    """
    return _export("pt2", model, sample, path, fold_norms, dynamic_batch, compare_size)


def export_model(name: str, model: nn.Module, sample: Sample, folder: AnyPath) -> ExportedFile:
    """Write ``model.onnx`` or ``model.pt2`` into a folder.

    Args:
        name: ``onnx`` or ``pt2``; for the rest see :func:`export_onnx`.
        model: the model.
        sample: what it is called with.
        folder: a folder, or the URL of one.
    """
    function = {"onnx": export_onnx, "pt2": export_program}[name]
    return function(model, sample, safe_files.join(folder, FORMATS[name]))


def missing_packages(name: str) -> list[str]:
    """What a format needs and is not installed."""
    missing = [package for package in PACKAGES[name] if importlib.util.find_spec(package) is None]
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return [*missing, "torch>=2.6"] if name == "onnx" and version < (2, 6) else missing


def _export(
    name: str,
    model: nn.Module,
    sample: Sample,
    path: AnyPath,
    fold_norms: bool,
    dynamic_batch: bool,
    compare_size: bool,
) -> ExportedFile:
    file_name = os.path.basename(os.fspath(path))
    if not file_name.endswith(f".{name}"):
        raise ValueError(f"path={os.fspath(path)!r} does not end in '.{name}'")
    call = SampleCall(sample).to("cpu")
    if dynamic_batch:
        call = call.resized(2)  # torch takes a batch of one for a constant, and more take more time
    original = copied_model(model).cpu().eval()
    for module in original.modules():
        settle_parameters(module)  # what a hook computes anew at every call would be captured as a constant
    with _deployable(), TemporaryDirectory() as temporary:
        ready, folded = fold(original, call) if fold_norms else (original, [])
        file = Path(temporary) / file_name
        _write(name, ready, call, file, dynamic_batch)
        difference = _checked(name, file, original, call, dynamic_batch)
        contents = {other.name: other.read_bytes() for other in sorted(file.parent.iterdir())}
    size = sum(map(len, contents.values()))
    dense_size = _dense_size(name, ready, call, dynamic_batch, size) if compare_size else None
    folder = safe_files.parent(path)
    safe_files.make_folder(folder)
    # weights in a file beside it first, since the file refers to them
    for other in sorted(contents, key=len, reverse=True):
        safe_files.write_bytes(safe_files.join(folder, other), contents[other])
    return ExportedFile(name, safe_files.normal(path), size, dense_size, difference, tuple(folded))


@contextlib.contextmanager
def _deployable() -> Iterator[None]:
    """Without gradients and without torch's fused attention, which other runtimes do not know.

    Random states stay as they are: layers draw weights when they are made.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with random_state.preserved(), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _write(name: str, model: nn.Module, call: SampleCall, file: Path, dynamic_batch: bool) -> None:
    """Write a model in one of the formats.

    Raises:
        ExportError: if torch cannot capture or convert the model.
    """
    try:
        _capture(name, model, call, file, dynamic_batch)
    # the model's own code, the capture and the converter raise errors of all kinds
    except Exception as error:
        hint = ""
        # nothing in an error says whether the size of the batch is to blame
        if dynamic_batch and _can_be_captured(name, model, call, file):
            hint = "; dynamic_batch=False lifts the demand that the batch may have any size"
        raise ExportError(f"{type(model).__name__} cannot be exported as {name} ({error}){hint}") from error


def _capture(name: str, model: nn.Module, call: SampleCall, file: Path, dynamic_batch: bool) -> None:
    shapes = call.dynamic_shapes(torch.export.Dim("batch")) if dynamic_batch else None
    program = torch.export.export(model, call.args, call.kwargs, dynamic_shapes=shapes, strict=False)
    if name == "pt2":
        program.example_inputs = None  # nobody's data stands in the file
        torch.export.save(program, file)
    else:
        _save_onnx(program, file, shapes)


def _can_be_captured(name: str, model: nn.Module, call: SampleCall, file: Path) -> bool:
    """Whether a model can be exported for one size of the batch."""
    try:
        _capture(name, model, call, file, False)
    except Exception:  # of all kinds
        return False
    return True


def _save_onnx(program: torch.export.ExportedProgram, file: Path, shapes: Any) -> None:
    weights = sum(tensor.nbytes for tensor in program.state_dict.values())
    with _quiet("onnxscript"), _quiet("onnx_ir"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "# The axis name: batch will not be used")  # several inputs share it
        converted: Any = torch.onnx.export(program, dynamo=True, dynamic_shapes=shapes, verbose=False)
    converted.save(file, external_data=weights > ONE_FILE)


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without the notes of a library on every constant that it folds or does not fold."""
    noisy = logging.getLogger(name)
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        yield
    finally:
        noisy.setLevel(level)


def _checked(name: str, file: Path, model: nn.Module, call: SampleCall, dynamic_batch: bool) -> float:
    """The largest difference between the outputs of a file and of the model.

    Raises:
        ExportError: if the file does not run, or the difference is too large.
    """
    largest = 0.0
    for each in [call, call.resized(call.batch_size + 1)] if dynamic_batch else [call]:
        expected = _tensors(model(*each.args, **each.kwargs))
        try:
            found = _run_onnx(file, each) if name == "onnx" else _run_program(file, each)
        except Exception as error:
            raise ExportError(f"{file.name} was written, but does not run ({type(error).__name__}: {error})") from error
        if [tuple(tensor.shape) for tensor in found] != [tuple(tensor.shape) for tensor in expected]:
            raise ExportError(
                f"{file.name} yields {[tuple(tensor.shape) for tensor in found]} for a batch of {each.batch_size}, the "
                f"model {[tuple(tensor.shape) for tensor in expected]}"
            )
        for one, other in zip(found, expected, strict=True):
            difference, allowed = _difference(one, other)
            if not difference <= allowed:  # NaN is not
                raise ExportError(
                    f"outputs of {file.name} differ from the model's by {difference:.1e}, more than {allowed:.1e}"
                )
            largest = max(largest, difference)
    return largest


def _difference(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """The largest difference and how large it may be."""
    if expected.numel() == 0:
        return 0.0, TOLERANCE
    found, expected = found.double(), expected.double()
    # equal infinities, as masks have them, do not differ
    difference = torch.where(found == expected, 0.0, (found - expected).abs()).max()
    finite = expected[expected.isfinite()]
    return float(difference), TOLERANCE * max(1.0, float(finite.abs().max()) if finite.numel() else 0.0)


def _run_onnx(file: Path, call: SampleCall) -> list[Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    inputs = dict(zip(names, (tensor.numpy() for tensor in call.tensors()), strict=True))
    return [torch.from_numpy(output) for output in session.run(None, inputs)]


def _run_program(file: Path, call: SampleCall) -> list[Tensor]:
    return _tensors(torch.export.load(file).module()(*call.args, **call.kwargs))


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf.detach() for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _dense_size(name: str, model: nn.Module, call: SampleCall, dynamic_batch: bool, size: int) -> int | None:
    """Bytes of the same file with dense layers; None, with a warning, if they cannot be exported."""
    if not any(isinstance(module, LowRankModule) for module in model.modules()):
        return size
    with _deployable(), TemporaryDirectory() as temporary:
        try:
            _write(name, restore_dense(model), call, Path(temporary) / FORMATS[name], dynamic_batch)
        except ExportError as error:
            warnings.warn(f"the size of the dense file is not known: {error}", stacklevel=4)
            return None
        return sum(file.stat().st_size for file in Path(temporary).iterdir())


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.2f} MB"
