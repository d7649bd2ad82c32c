"""Low-rank compression of trained models, and the proof that they are not worse, as a PyTorch Lightning callback.

Names are imported on first use, so that importing the package stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrf_lightning.api import CompressionResult, compress
    from lrf_lightning.callbacks.compression import LowRankCompression
    from lrf_lightning.callbacks.rank_monitor import RankMonitor
    from lrf_lightning.export.batch_norm_folding import fold_batch_norms
    from lrf_lightning.export.files import ExportError, export_onnx, export_program
    from lrf_lightning.saving.checkpoint import (
        CheckpointError,
        load_compressed,
        read_metadata,
        restore_dense,
        save_compressed,
    )
    from lrf_lightning.saving.structure_hook import LowRankCheckpointMixin
    from lrf_lightning.solver.running.evaluation import StepOutput
    from lrf_lightning.solver.running.loss_terms import LossTerms
    from lrf_lightning.solver.settings import Settings

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
    "save_compressed",
]

_HOMES = {
    "CheckpointError": "lrf_lightning.saving.checkpoint",
    "CompressionResult": "lrf_lightning.api",
    "ExportError": "lrf_lightning.export.files",
    "LossTerms": "lrf_lightning.solver.running.loss_terms",
    "LowRankCheckpointMixin": "lrf_lightning.saving.structure_hook",
    "LowRankCompression": "lrf_lightning.callbacks.compression",
    "RankMonitor": "lrf_lightning.callbacks.rank_monitor",
    "Settings": "lrf_lightning.solver.settings",
    "StepOutput": "lrf_lightning.solver.running.evaluation",
    "compress": "lrf_lightning.api",
    "export_onnx": "lrf_lightning.export.files",
    "export_program": "lrf_lightning.export.files",
    "fold_batch_norms": "lrf_lightning.export.batch_norm_folding",
    "load_compressed": "lrf_lightning.saving.checkpoint",
    "read_metadata": "lrf_lightning.saving.checkpoint",
    "restore_dense": "lrf_lightning.saving.checkpoint",
    "save_compressed": "lrf_lightning.saving.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
