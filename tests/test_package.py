import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lrf_lightning

BLOCKED = "import sys; sys.modules.update(dict.fromkeys({names}))  # as if they were not installed\n"


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_is_light():
    heavy = ("torch", "lightning", "hydra", "wandb", "matplotlib", "numpy", "rich")
    loaded = run(f"import sys, lrf_lightning; print([m for m in {heavy} if m in sys.modules])")
    assert loaded.strip() == "[]"


def test_compress_needs_only_torch_and_safetensors():
    others = ("lightning", "torchmetrics", "matplotlib", "rich", "hydra", "omegaconf", "wandb")
    imports = "from lrf_lightning import Settings, StepOutput, compress, load_compressed; print(compress.__name__)"
    assert run(BLOCKED.format(names=others) + imports).strip() == "compress"


@pytest.mark.slow  # imports Lightning in a process of its own
def test_callback_needs_neither_hydra_nor_wandb():
    code = BLOCKED.format(names=("hydra", "omegaconf", "wandb"))
    code += "from lrf_lightning import LowRankCompression; print(LowRankCompression().settings.objective)"
    assert run(code).strip() == "lossless"


def test_every_name_can_be_had():
    for name in lrf_lightning.__all__:
        assert getattr(lrf_lightning, name).__name__ == name
        assert name in dir(lrf_lightning)
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        _ = lrf_lightning.missing


def test_no_folder_imports_one_that_imports_it():
    root = Path(lrf_lightning.__file__).parent
    graph = {}
    for path in root.rglob("*.py"):
        part = path.relative_to(root).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lrf_lightning."):
                graph.setdefault(part, set()).add(node.module.split(".")[1])
    for part, others in graph.items():
        others.discard(part)
    del graph["__init__"]  # it hands names on
    order = list(TopologicalSorter(graph).static_order())
    assert order.index("modules") < order.index("surgery") < order.index("solver") < order.index("callbacks")
