"""Which reader reads the rows of a layer."""

from __future__ import annotations

from torch import nn

from lrf_lightning.solver.layers.conv_rows import ConvRows, ConvTransposeRows
from lrf_lightning.solver.layers.rows import EmbeddingRows, LinearRows, RowReader
from lrf_lightning.surgery import Candidate

__all__ = ["row_reader"]


def row_reader(candidate: Candidate) -> RowReader:
    """The reader for a layer's kind."""
    if isinstance(candidate.module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return ConvTransposeRows(candidate)
    if isinstance(candidate.module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return ConvRows(candidate)
    return EmbeddingRows(candidate) if isinstance(candidate.module, nn.Embedding) else LinearRows(candidate)
