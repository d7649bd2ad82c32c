"""The examples run as a user runs them."""

import json
import subprocess
import sys

import pytest

# new processes import torch, which takes minutes on a machine that is busy with something else
pytestmark = pytest.mark.timeout(400)


def run(project, *command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=".", timeout=380)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_plain_torch(project):
    output = run(project, str(project / "examples" / "plain_torch.py"))
    assert "parameters: not worse" in output or "parameters: better" in output
    assert "reloaded outputs are equal: True" in output


@pytest.mark.slow
def test_lightning_cli(project, tmp_path):
    pytest.importorskip("jsonargparse")
    run(
        project,
        str(project / "examples" / "lightning_cli.py"),
        "fit",
        "--trainer.callbacks+=lrf_lightning.LowRankCompression",
        "--trainer.callbacks.objective=budget",
        "--trainer.callbacks.keep=0.4",
        f"--trainer.callbacks.dirpath={tmp_path}/compressed",
        "--trainer.max_epochs=3",
        "--trainer.logger=false",
        "--trainer.enable_checkpointing=false",
    )
    record = json.loads((tmp_path / "compressed" / "compression.json").read_text())
    assert record["settings"]["objective"] == "budget"
    assert record["settings"]["keep"] == 0.4
