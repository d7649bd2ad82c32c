import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lrf_lightning
from lrf_lightning import solver

BLOCKED = "import sys; sys.modules.update(dict.fromkeys({names}))  # as if they were not installed\n"


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_is_light():
    heavy = ("torch", "lightning", "hydra", "wandb", "matplotlib", "numpy", "rich")
    loaded = run(f"import sys, lrf_lightning; print([m for m in {heavy} if m in sys.modules])")
    assert loaded.strip() == "[]"


def test_compress_needs_only_torch_and_safetensors(tmp_path):
    others = ("lightning", "torchmetrics", "matplotlib", "rich", "hydra", "omegaconf", "wandb")
    code = """
import torch
from lrf_lightning import Settings, StepOutput, compress, load_compressed
model, data = torch.nn.Sequential(torch.nn.Linear(8, 8)), [(torch.randn(8, 8),) for _ in range(3)]
result = compress(
    model, lambda model, batch: model(batch[0]).square().mean(1), *([batch] for batch in data), keep=0.5,
    objective="budget", speed="none", cache_dir=FOLDER,
)
result.save(FOLDER + "/small")
print(load_compressed(model, FOLDER + "/small")[0].rank)
"""
    assert run(BLOCKED.format(names=others) + f"FOLDER = {str(tmp_path)!r}\n" + code).strip() == "2"
    assert list(tmp_path.glob("calibration-*.pt")), "the calibration was kept"


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


def imports(package):
    """The folders and modules right below a package that each of them imports."""
    root, graph = Path(package.__file__).parent, {}
    for path in root.rglob("*.py"):
        part = path.relative_to(root).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom):
                continue
            own = node.module == package.__name__
            homes = [lrf_lightning._HOMES.get(name.name, f"{node.module}.{name.name}") for name in node.names]
            for module in homes if own else (node.module or "",):
                if module.startswith(f"{package.__name__}."):
                    graph.setdefault(part, set()).add(module.removeprefix(f"{package.__name__}.").split(".")[0])
    for part, others in graph.items():
        others.discard(part)
    graph.pop("__init__", None)  # it hands names on
    return graph


def test_no_folder_imports_one_that_imports_it():
    order = list(TopologicalSorter(imports(lrf_lightning)).static_order())
    assert order.index("modules") < order.index("surgery") < order.index("solver") < order.index("callbacks")


def test_the_map_of_the_solver_names_all_of_its_modules():
    root = Path(solver.__file__).parent
    folders = {path.name for path in root.iterdir() if (path / "__init__.py").is_file()}
    found, place = {}, {}  # the modules of every folder, and the order of the folders
    for line in solver.__doc__.partition("=\n")[2].splitlines():
        folder = re.match(r"``(\w+)``", line)
        names = re.findall(r"``(\w+)``", line[17:])
        if line[:1] not in (" ", "=", ""):
            home = folder[1] if folder else ""
            place |= {home: len(place)} if home else {}
        found.setdefault(home, set()).update(names)
    assert found.pop("") == {path.stem for path in root.glob("*.py")} - {"__init__"}
    assert found == {name: {path.stem for path in (root / name).glob("*.py")} - {"__init__"} for name in folders}
    graph = imports(solver)
    assert list(TopologicalSorter(graph).static_order())[-1] == "joint", "or there is a circle"
    for name, others in graph.items():
        above = {other for other in others & folders if place[other] < place.get(name, len(place))}
        assert others & folders == above, f"{name} stands above {others & folders - above}"
