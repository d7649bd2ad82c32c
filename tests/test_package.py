import subprocess
import sys

import pytest

import lrf_lightning


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_is_light():
    heavy = ("torch", "lightning", "hydra", "wandb", "matplotlib", "numpy", "rich")
    loaded = run(f"import sys, lrf_lightning; print([m for m in {heavy} if m in sys.modules])")
    assert loaded.strip() == "[]"


CODE = """
import sys
for name in ("lightning", "torchmetrics", "matplotlib", "rich", "hydra", "omegaconf", "wandb"):
    sys.modules[name] = None  # as if it were not installed
from lrf_lightning import Settings, StepOutput, compress, load_compressed
for name in ("lightning", "torchmetrics", "matplotlib", "rich"):
    del sys.modules[name]
from lrf_lightning import LowRankCompression
LowRankCompression()
"""


def test_compress_needs_only_torch_and_the_callback_neither_hydra_nor_wandb():
    run(CODE)


def test_every_name_can_be_had():
    for name in lrf_lightning.__all__:
        assert getattr(lrf_lightning, name).__name__ == name
        assert name in dir(lrf_lightning)
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        _ = lrf_lightning.missing
