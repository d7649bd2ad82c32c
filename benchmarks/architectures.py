"""Compress architectures of timm, torchvision and transformers, with random weights and random data, and check each.

``check`` asks of every architecture that nothing fails, that every layer with a weight matrix is in the report, that
outputs are finite, that the parameters are counted right, and that the saved model loads into a fresh dense one with
equal outputs. ``python -m benchmarks.architectures`` writes what became of each into ``RESULTS.md``; names of
architectures or libraries restrict it to these, and the others keep their rows. The tests run the same checks.
"""

from __future__ import annotations

import platform
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.architecture_cases import CASES, Case, Inputs
from benchmarks.results import append_row, read_rows, write_section
from lrf_lightning import CompressionResult, StepOutput, compress, load_compressed

__all__ = ["Row", "check"]

FOLDER = Path(__file__).parent
TABLE = FOLDER / "architectures.csv"
FIELDS = ("date", "library", "name", "params", "params_after", "factorized", "left_alone", "seconds", "failure")
LIBRARIES = ("timm", "torchvision", "transformers")
SOLVE = {"objective": "budget", "keep": 0.6, "points": 2, "refinements": 0, "rows_per_feature": 2, "speed": "none"}
# owners of a parameter called weight that is no matrix of a layer: vectors of norms, for instance
LAYERS = (
    nn.Linear,
    nn.Bilinear,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.MultiheadAttention,
    nn.modules.conv._ConvNd,
)


@dataclass(frozen=True)
class Row:
    """What became of one architecture.

    Attributes:
        case: the architecture.
        result: what the solve found.
        seconds: processor time of the solve.
    """

    case: Case
    result: CompressionResult
    seconds: float

    @property
    def factorized(self) -> int:
        """Number of layers with a rank."""
        return len(self.result.ranks)

    @property
    def left_alone(self) -> dict[str, int]:
        """Number of layers by the reason why they were left alone, without sizes; most frequent first."""
        reasons = (layer.reason for layer in self.result.layers if layer.rank is None)
        return dict(Counter(_without_names(reason) for reason in reasons).most_common())


def check(case: Case, folder: Path) -> Row:
    """Compress one architecture, and save and load it in ``folder``.

    Raises:
        AssertionError: if something is missing from the report, not finite, miscounted, or different after loading.
        Exception: whatever fails in the solve.
    """
    torch.manual_seed(0)
    model = case.make().eval()
    batches = [[case.inputs() for _ in range(count)] for count in (2, 1, 1)]
    with torch.no_grad():
        before = case.call(model, batches[2][0])
    assert before.isfinite().all(), "the original's outputs are not finite"

    def loss(model: nn.Module, inputs: Inputs) -> StepOutput:
        return _loss(case.call(model, inputs))

    started = time.process_time()
    result = compress(model, loss, *batches, exclude=case.exclude, **SOLVE)
    seconds = time.process_time() - started
    with torch.no_grad():
        after = case.call(result.model.eval(), batches[2][0])
        assert torch.equal(before, case.call(model, batches[2][0])), "the original was changed"
    assert after.shape == before.shape
    assert after.isfinite().all(), "the compressed model's outputs are not finite"
    _check_report(model, result)
    result.save(folder)
    torch.manual_seed(1)
    loaded = load_compressed(case.make(), folder).eval()
    with torch.no_grad():
        assert torch.equal(case.call(loaded, batches[2][0]), after), "the loaded model's outputs differ"
    return Row(case, result, seconds)


def _loss(output: Tensor) -> StepOutput:
    """Cross-entropy of every sample against made-up classes, of one answer, of pixels or of tokens."""
    logits = output if output.dim() in (2, 4) else output.movedim(-1, 1)
    positions = logits[:, 0].numel()
    targets = (torch.arange(positions) * 7 % logits.shape[1]).reshape(logits[:, 0].shape)
    losses = F.cross_entropy(logits, targets, reduction="none")
    return StepOutput(losses.reshape(len(losses), -1).mean(1))


def _check_report(model: nn.Module, result: CompressionResult) -> None:
    listed = {layer.name: layer for layer in result.layers}
    assert len(listed) == len(result.layers), "a layer is listed twice"
    for layer in result.layers:
        assert (layer.rank is not None) == (layer.name in result.ranks)
        assert layer.rank is not None or layer.reason or layer.curve is not None, f"{layer.name} is dense for no reason"
    for name, module in model.named_modules():
        if isinstance(module, LAYERS):
            # attention is listed by its projections where it can be split
            inside = [other for other in listed if other == name or other.startswith(f"{name}.")]
            parent = name.rpartition(".")[0]
            assert inside or f"{parent}.out_proj" in listed or parent in listed, f"{name} is missing from the report"
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, result.model))
    assert result.params_model == (before, after)
    saved = result.params_layers[0] - result.params_layers[1]
    assert before - after == saved > 0 if result.ranks else before == after
    assert all(layer.params_after < layer.params_before for layer in result.layers if layer.rank is not None)


def _without_names(reason: str) -> str:
    reason = re.sub(r"'[^']*'", "another layer", reason or "dense is best within the budget")
    reason = re.sub(r"layer another layer sees a tensor of shape .*; (?=its rows)", "", reason)
    return re.sub(r" \(\d+ x .*\)", "", reason)


def main(arguments: Sequence[str]) -> None:
    """Run over all architectures, or those that are named by themselves or by their library, and write the section."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for case in CASES:
        if not arguments or case.name in arguments or case.library in arguments:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    row = _row(check(case, Path(folder)))
                except Exception as error:
                    row = {"library": case.library, "name": case.name, "failure": f"{type(error).__name__}: {error}"}
            print(_line(row), flush=True)
            append_row(TABLE, FIELDS, row | {"date": str(date.today())})
    write_section(FOLDER / "RESULTS.md", "Architectures", _section())


def _row(found: Row) -> dict[str, str]:
    before, after = found.result.params_model
    reasons = "; ".join(f"{count} {reason}" for reason, count in found.left_alone.items())
    return {
        "library": found.case.library,
        "name": found.case.name,
        "params": f"{before / 1000:,.0f}",
        "params_after": f"{after / 1000:,.0f}",
        "factorized": str(found.factorized),
        "left_alone": reasons,
        "seconds": f"{found.seconds:.1f}",
    }


def _section() -> str:
    last = {(row["library"], row["name"]): row for row in read_rows(TABLE)}
    rows = [last[case.library, case.name] for case in CASES if (case.library, case.name) in last]
    failed = [row["name"] for row in rows if row["failure"]]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", *LIBRARIES))
    verdict = f"{len(rows) - len(failed)} of {len(rows)} passed." + (f" Failed: {', '.join(failed)}." if failed else "")
    lines = [
        f"`python -m benchmarks.architectures`, {max((row['date'] for row in rows), default='never')}, "
        f"{platform.machine()}, one thread, {versions}. Random weights, random data, depth and width cut down where "
        "the library offers it; 0.6 of the factorizable parameters kept. Passed means: nothing failed, every layer "
        "with a weight is in the report, outputs are finite before and after, parameters are counted right, and the "
        "saved model gives equal outputs when it is loaded into a fresh dense one. "
        f"**{verdict}** {len(CASES) - len(rows)} have not been run.",
        "",
        "| architecture | parameters, k | after, k | factorized | left alone, and why | solve, s |",
        "|---|---|---|---|---|---|",
        *map(_line, rows),
    ]
    return "\n".join(lines)


def _line(row: Mapping[str, str]) -> str:
    reason = f"**{row['failure']}**" if row.get("failure") else row["left_alone"]
    numbers = [row.get(name, "") for name in ("params", "params_after", "factorized")]
    return f"| {row['library']} {row['name']} | {' | '.join(numbers)} | {reason} | {row.get('seconds', '')} |"


if __name__ == "__main__":
    main(sys.argv[1:])
