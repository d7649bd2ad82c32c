"""Starting ``launched.py`` as users start their scripts, and reading what its processes have noted."""

import json
import os
import socket
import subprocess
import sys

import pytest
from launched import Frozen

from lrf_lightning import load_compressed


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def started(project, folder, *options, launcher=(), environment=None):
    """A running script and the folder it writes to."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, *launcher, project / "tests" / "launched.py", folder, *options]
    variables = {**os.environ, "PYTHONPATH": str(project), **(environment or {})}
    return subprocess.Popen(
        command, env=variables, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def started_on_two_nodes(project, folder, *options, environment=None):
    """Two running launchers with a process each."""
    port = free_port()
    launchers = [
        [
            *("-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={node}", "--nproc_per_node=1"),
            *("--master_addr=127.0.0.1", f"--master_port={port}"),
        ]
        for node in range(2)
    ]
    options = (*options, "--devices", "1", "--nodes", "2")
    return [started(project, folder, *options, launcher=launcher, environment=environment) for launcher in launchers]


def notes(*processes, folder, world):
    """What every process of a finished job has noted, in order."""
    for process in processes:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
    assert len(list(folder.glob("process*.json"))) == world
    found = [json.loads((folder / f"process{rank}.json").read_text()) for rank in range(world)]
    assert all(note["world"] == world for note in found)
    return found


def check(found, alone, folder):
    """Compare what processes have noted with each other, with what one alone has, and with the saved model."""
    for note in found:
        assert note["ranks"] == alone["ranks"]
        assert note["samples"] == alone["samples"]
        assert note["sums"] == found[0]["sums"]
        assert note["sums"] == pytest.approx(alone["sums"], rel=1e-4, abs=1e-4)
    model = load_compressed(Frozen(), folder / "compressed")
    assert {n: float(v.double().sum()) for n, v in model.state_dict().items()} == found[0]["sums"]
    assert (folder / "compressed" / "compressed.ckpt").is_file()
