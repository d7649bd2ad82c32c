"""The package as users get it: wheel, sdist and editable install, beside a separate Hydra app.

The little app has the layout of lightning-hydra-template: ``src/train.py``, ``configs/`` with the groups ``data``,
``model``, ``callbacks`` and ``trainer``, callbacks that are instantiated one by one.
"""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

# new processes import torch, which takes minutes on a machine that is busy with something else
pytestmark = pytest.mark.timeout(400)

# Hydra 1.3 does not start on Python 3.14 by itself, see train.py; an app of somebody else has to wait for Hydra
HYDRA_STARTS = pytest.mark.skipif(sys.version_info >= (3, 14), reason="Hydra does not start on this Python")

OPTIONS = ["budget", "compact", "frontier", "lossless", "paper"]

APP = {
    "configs/train.yaml": """
        defaults:
          - _self_
          - data: blobs
          - model: mlp
          - callbacks: default
          - trainer: cpu
        seed: 1
        """,
    "configs/data/blobs.yaml": "{_target_: src.parts.Blobs}",
    "configs/model/mlp.yaml": "{_target_: src.parts.Classifier, width: 64}",
    "configs/callbacks/default.yaml": "timer: {_target_: lightning.pytorch.callbacks.Timer}",
    "configs/trainer/cpu.yaml": """
        _target_: lightning.Trainer
        accelerator: cpu
        max_epochs: 3
        logger: false
        enable_checkpointing: false
        enable_progress_bar: false
        default_root_dir: ${hydra:runtime.output_dir}
        """,
    "src/__init__.py": "",
    "src/parts.py": """
        import torch
        from lightning import LightningDataModule, LightningModule
        from torch import nn
        from torch.nn.functional import cross_entropy
        from torch.utils.data import DataLoader, TensorDataset

        class Blobs(LightningDataModule):
            def setup(self, stage=None):
                labels = torch.arange(1200) % 4
                inputs = 2 * nn.functional.one_hot(labels, 16).float() + torch.randn(1200, 16)
                self.train = TensorDataset(inputs[:600], labels[:600])
                self.val = TensorDataset(inputs[600:], labels[600:])

            def train_dataloader(self):
                return DataLoader(self.train, batch_size=50, shuffle=True)

            def val_dataloader(self):
                return DataLoader(self.val, batch_size=100)

        class Classifier(LightningModule):
            def __init__(self, width):
                super().__init__()
                self.net = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
                                         nn.Linear(width, 4))

            def training_step(self, batch, batch_idx):
                return cross_entropy(self.net(batch[0]), batch[1])

            def validation_step(self, batch, batch_idx):
                self.log("val/loss", cross_entropy(self.net(batch[0]), batch[1]))

            def configure_optimizers(self):
                return torch.optim.Adam(self.parameters(), lr=3e-3)
        """,
    "src/train.py": """
        import sys
        from pathlib import Path

        import hydra

        sys.path.insert(0, str(Path(__file__).parents[1]))

        @hydra.main(version_base="1.3", config_path="../configs", config_name="train.yaml")
        def main(cfg):
            from lightning import seed_everything
            seed_everything(cfg.seed)
            callbacks = [hydra.utils.instantiate(node) for node in cfg.callbacks.values() if "_target_" in node]
            trainer = hydra.utils.instantiate(cfg.trainer, callbacks=callbacks)
            trainer.fit(hydra.utils.instantiate(cfg.model), datamodule=hydra.utils.instantiate(cfg.data))
            import lrf_lightning
            print("PACKAGE", lrf_lightning.__file__)
            print("RESULT", trainer.callbacks[1].result.params_model, trainer.callbacks[1].result.settings.keep)

        main()
        """,
}


def build(project: Path, folder: Path, kind: str) -> Path:
    """Build with the backend that pyproject.toml names, in a process of its own."""
    code = f"import os, hatchling.build as b; print(b.build_{kind}({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(Path(__file__).parents[1], tmp_path_factory.mktemp("dist"), "wheel")


@pytest.fixture
def app(tmp_path) -> Path:
    for name, text in APP.items():
        path = tmp_path / "app" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = text.strip("\n").splitlines()
        indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
        path.write_text("\n".join(line[indent:] for line in lines) + "\n")
    return tmp_path / "app"


def run_app(python: str, app: Path, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [python, str(app / "src" / "train.py"), *arguments],
        cwd=app,
        capture_output=True,
        text=True,
        timeout=380,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_holds_the_package_the_plugin_and_the_group_only(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"lrf_lightning", "hydra_plugins", "lrf_lightning-0.1.0.dist-info"}
    assert {
        "lrf_lightning/py.typed",
        "lrf_lightning/conf/compress/lossless.yaml",
        "lrf_lightning/conf/callbacks/rank_monitor/default.yaml",
        "hydra_plugins/lrf_lightning/search_path.py",
        "lrf_lightning-0.1.0.dist-info/licenses/LICENSE",
    } <= names
    # Hydra's namespace is shared by all plugins
    assert "hydra_plugins/__init__.py" not in names


def test_sdist_holds_what_the_tests_need_and_builds_the_same_wheel(project, wheel, tmp_path):
    sdist = build(project, tmp_path, "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir() and path.name.startswith("lrf_lightning"))
    assert {"train.py", "conf", "recipes", "tests", "LICENSE", "README.md"} <= {path.name for path in source.iterdir()}
    again = build(source, tmp_path, "wheel")
    assert zipfile.ZipFile(again).namelist() == zipfile.ZipFile(wheel).namelist()


def test_licence_is_the_whole_text(project):
    text = (project / "LICENSE").read_text()
    assert len(text) == 11358
    assert text.split("\n")[1].strip() == "Apache License"


@HYDRA_STARTS
def test_other_app_finds_the_group_in_the_wheel(wheel, app, tmp_path):
    """Without the repository on the path: the wheel's files alone."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PYTHONSAFEPATH": "1"}
    searched = run_app(sys.executable, app, "--info", "searchpath", **environment)
    assert "pkg://lrf_lightning.conf" in searched
    config = run_app(
        sys.executable,
        app,
        "+compress=compact",
        "callbacks.compress.tolerance=0.1",
        "+callbacks/rank_monitor=default",
        "--cfg",
        "job",
        **environment,
    )
    assert "_target_: lrf_lightning.RankMonitor" in config
    assert "_target_: lrf_lightning.LowRankCompression" in config
    assert "objective: compact" in config
    assert "tolerance: 0.1" in config


@HYDRA_STARTS
@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("python src/train.py +compress=", {f"+compress={option}" for option in OPTIONS}),
        ("python src/train.py +compress=budget callbacks.compress.ke", {"callbacks.compress.keep="}),
    ],
)
def test_other_app_completes_the_options(app, line, found):
    """What Hydra's shell completion asks the app for."""
    environment = {"COMP_LINE": line, "COMP_POINT": str(len(line))}
    assert set(run_app(sys.executable, app, "-sc", "query=bash", **environment).split()) == found


@HYDRA_STARTS
def test_other_app_shows_the_options_in_its_help(app):
    assert f"compress: {', '.join(OPTIONS)}" in run_app(sys.executable, app, "--help")
    shown = run_app(sys.executable, app, "+compress=frontier", "--help")
    assert "objective: frontier" in shown
    assert "budgets:" in shown


def test_plugin_imports_nothing_heavy(project):
    code = (
        "import sys; from hydra_plugins.lrf_lightning.search_path import LrfLightningSearchPath; "
        "import lrf_lightning.conf; print(sorted({'torch', 'lightning', 'wandb', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, timeout=380)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.fixture
def environment(tmp_path) -> Path:
    """A fresh virtual environment that sees the libraries of this one, but not its editable installs."""
    venv.create(tmp_path / "venv", with_pip=True)
    folder = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    (folder / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"


@HYDRA_STARTS
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_other_app_compresses(kind, wheel, project, app, environment):
    target = [str(wheel)] if kind == "wheel" else ["--no-build-isolation", "-e", str(project)]
    install = [str(environment), "-m", "pip", "install", "-q", "--no-deps", "--no-index", *target]
    done = subprocess.run(install, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stdout + done.stderr
    output = run_app(str(environment), app, "+compress=budget", "callbacks.compress.keep=0.4")
    home = str(project) if kind == "editable" else str(environment.parents[1])
    assert f"PACKAGE {home}" in output
    before, after, keep = output.split("RESULT (")[1].replace(",", " ").replace(")", " ").split()[:3]
    assert int(after) < 0.6 * int(before)
    assert keep == "0.4"

    cache = app / "cache"
    # Hydra composes once without what is swept, here the group, so its arguments need ++
    options = [f"++callbacks.compress.cache_dir={cache}", "++callbacks.compress.points=3"]
    output = run_app(str(environment), app, "-m", f"+compress={','.join(OPTIONS)}", *options)
    assert output.count("RESULT (") == len(OPTIONS), "each option works, one after the other in a multirun"
    # the trainings are equal, so four objectives share a calibration; the published algorithm has its own
    assert len(list(cache.glob("calibration-*.pt"))) == 2
