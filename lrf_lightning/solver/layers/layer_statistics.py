"""What is known about a layer from the calibration data, and how much memory that takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from torch import nn

from lrf_lightning.solver.layers.conv_rows import ConvRows
from lrf_lightning.solver.layers.layer_input import LayerInput
from lrf_lightning.solver.layers.moments import LARGEST_SIDE, Moment
from lrf_lightning.solver.layers.row_readers import row_reader
from lrf_lightning.solver.layers.rows import RowReader
from lrf_lightning.surgery import Candidate

__all__ = ["LayerStatistics", "TiedUse", "empty_statistics", "memory_groups", "whole_sides"]


@dataclass
class TiedUse:
    """What one pass says about modules that read a layer's weight transposed, in their own orientation.

    Attributes:
        module: the first of them.
        reader: how their rows are read.
        inputs: moment of their input rows, which belong to the output side of the layer.
        gradients: moment of their output-gradient rows, which belong to the input side of the layer.
        rows_per_sample: tokens per sample.
        observed: the input of their first call, None if they never ran.
    """

    module: nn.Module
    reader: RowReader
    inputs: Moment
    gradients: Moment
    rows_per_sample: float = 0.0
    observed: LayerInput | None = None


@dataclass
class LayerStatistics:
    """What one pass says about one layer.

    Attributes:
        candidate: the layer.
        reader: how its rows are read.
        inputs: moment of the input rows.
        gradients: moment of the output-gradient rows.
        samples: calibration samples of all processes, whether the layer ran on them or not.
        rows_per_sample: tokens or positions per sample, the mean over the calls.
        observed: the input of its first call, None if it never ran.
        repeated: whether it runs several times in one pass.
        recorded: whether gradients were recorded whenever it ran.
        input_bytes: largest size of its input per sample.
        order: place of the layer's first call in the execution order, -1 if it never ran.
        problem: why the layer cannot be used, empty if it can.
        tied: modules that read the weight transposed, None if there are none; once the pass is over, ``inputs`` and
            ``gradients`` hold their part.
    """

    candidate: Candidate
    reader: RowReader
    inputs: Moment = field(default_factory=Moment)
    gradients: Moment = field(default_factory=Moment)
    samples: int = 0
    rows_per_sample: float = 0.0
    observed: LayerInput | None = None
    repeated: bool = False
    recorded: bool = True
    input_bytes: float = 0.0
    order: int = -1
    problem: str = ""
    tied: TiedUse | None = None

    def flops(self, rank: int | None) -> int:
        """Multiply-adds per sample at a rank, or of the dense layer for None; a lookup in a dense table costs none."""
        candidate, looked_up = self.candidate, isinstance(self.candidate.module, nn.Embedding)
        tied = 0.0 if self.tied is None else self.tied.rows_per_sample
        products, lookups = (tied, self.rows_per_sample) if looked_up else (self.rows_per_sample, tied)
        if rank is None:
            return round(candidate.dense_params * products)
        if candidate.split is not None:
            rows, columns = candidate.sides
            return round(candidate.groups * rank * (rows * products + columns * self._rows_between))
        entry = candidate.rows if looked_up else candidate.columns
        return round(candidate.low_rank_params(rank) * products + rank * entry * lookups)

    @property
    def _rows_between(self) -> float:
        """Rows per sample that the right factor puts out, more than of the output where the left one has a stride."""
        if self.observed is None:
            return self.rows_per_sample
        assert isinstance(self.reader, ConvRows)
        shape = self.observed.shape
        return self.rows_per_sample * shape[0] * self.reader.positions_between(shape) / self.observed.rows

    def set_order(self, split: int | None) -> None:
        """Set the order of a convolution's factors."""
        if self.candidate.split != split:
            self.candidate = replace(self.candidate, split=split)
            self.reader = row_reader(self.candidate)

    def use(self, *, transposed: bool) -> LayerStatistics | TiedUse:
        """The part of the modules that read the weight as the layer does, or transposed."""
        if not transposed:
            return self
        assert self.tied is not None
        return self.tied


def memory_groups(candidates: Iterable[Candidate], limit: float) -> Iterator[list[Candidate]]:
    """Cut the layers into runs whose statistics fit into ``limit`` bytes; a larger layer is a run of its own."""
    group: list[Candidate] = []
    used = 0.0
    for candidate in candidates:
        size = 8.0 * candidate.groups * sum(side**2 if whole else side for side, whole in whole_sides(candidate))
        if group and used + size > limit:
            yield group
            group, used = [], 0.0
        group.append(candidate)
        used += size
    if group:
        yield group


def whole_sides(candidate: Candidate) -> tuple[tuple[int, bool], tuple[int, bool]]:
    """Output and input side of a layer, and whether the whole moment is kept or only its diagonal."""
    embedding = isinstance(candidate.module, nn.Embedding)
    tables = (not embedding and bool(candidate.transposed), embedding)  # which side counts the entries of a table
    outputs, inputs = (
        (side, side <= LARGEST_SIDE and not table)
        for side, table in zip((candidate.rows, candidate.columns), tables, strict=True)
    )
    return outputs, inputs


def empty_statistics(model: nn.Module, candidate: Candidate) -> LayerStatistics:
    """Statistics of a layer before any pass."""
    (_, whole_outputs), (_, whole_inputs) = whole_sides(candidate)
    layer = LayerStatistics(
        candidate, row_reader(candidate), Moment(diagonal=not whole_inputs), Moment(diagonal=not whole_outputs)
    )
    if candidate.transposed:
        twin = model.get_submodule(candidate.transposed[0])
        mirrored = replace(candidate, module=twin, rows=candidate.columns, columns=candidate.rows)
        layer.tied = TiedUse(
            twin, row_reader(mirrored), Moment(diagonal=not whole_outputs), Moment(diagonal=not whole_inputs)
        )
    return layer
