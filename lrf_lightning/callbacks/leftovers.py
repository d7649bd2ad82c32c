"""What an earlier result has left in the folder of a new one, and would be taken for a part of that."""

from __future__ import annotations

from pathlib import Path

from lrf_lightning.export.files import FORMATS
from lrf_lightning.saving.checkpoint import DESCRIPTION_FILE, MODEL_FILE

__all__ = ["POINTS", "remove_leftovers"]

POINTS = "points"  # folder of the models of all budgets


def remove_leftovers(directory: Path) -> None:
    """Remove exports, pictures and models of single budgets; whatever else is written is written anew.

    Only files with names of our own are removed.

    Raises:
        OSError: if one cannot be removed.
    """
    from lrf_lightning.plots.pictures import PICTURES  # matplotlib takes its time

    pictures = (*PICTURES, "changed_samples")
    for path in [directory / name for name in FORMATS.values()]:
        path.unlink(missing_ok=True)
    for path in directory.glob("*.png"):
        if any(path.stem == name or path.stem.rstrip("0123456789") == f"{name}_" for name in pictures):
            path.unlink()
    for folder in (directory / POINTS).glob("keep_*"):
        for name in (MODEL_FILE, DESCRIPTION_FILE):
            (folder / name).unlink(missing_ok=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
