"""Lossless low-rank compression of trained models, as a PyTorch Lightning callback.

Names are imported on first use, so that importing the package stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrf_lightning.api import CompressionResult, compress
    from lrf_lightning.batch_norm_folding import fold_batch_norms
    from lrf_lightning.callbacks.compression import LowRankCompression
    from lrf_lightning.callbacks.rank_monitor import RankMonitor
    from lrf_lightning.checkpoint import CheckpointError, load_compressed, read_metadata, restore_dense
    from lrf_lightning.export import ExportError, export_onnx, export_program
    from lrf_lightning.solver.evaluation import StepOutput
    from lrf_lightning.solver.loss_terms import LossTerms
    from lrf_lightning.solver.settings import Settings
    from lrf_lightning.structure_hook import LowRankCheckpointMixin

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "CompressionResult",
    "ExportError",
    "LossTerms",
    "LowRankCheckpointMixin",
    "LowRankCompression",
    "RankMonitor",
    "Settings",
    "StepOutput",
    "compress",
    "export_onnx",
    "export_program",
    "fold_batch_norms",
    "load_compressed",
    "read_metadata",
    "restore_dense",
]

_HOMES = {
    "CheckpointError": "lrf_lightning.checkpoint",
    "CompressionResult": "lrf_lightning.api",
    "ExportError": "lrf_lightning.export",
    "LossTerms": "lrf_lightning.solver.loss_terms",
    "LowRankCheckpointMixin": "lrf_lightning.structure_hook",
    "LowRankCompression": "lrf_lightning.callbacks.compression",
    "RankMonitor": "lrf_lightning.callbacks.rank_monitor",
    "Settings": "lrf_lightning.solver.settings",
    "StepOutput": "lrf_lightning.solver.evaluation",
    "compress": "lrf_lightning.api",
    "export_onnx": "lrf_lightning.export",
    "export_program": "lrf_lightning.export",
    "fold_batch_norms": "lrf_lightning.batch_norm_folding",
    "load_compressed": "lrf_lightning.checkpoint",
    "read_metadata": "lrf_lightning.checkpoint",
    "restore_dense": "lrf_lightning.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
