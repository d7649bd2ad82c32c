"""DDP as users start it: relaunched scripts, spawned and forked processes, torchrun, and two nodes."""

import json
import os
import socket
import subprocess
import sys

import pytest

from lrf_lightning import load_compressed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


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


def notes(*processes, folder, world):
    """What every process of a finished job has noted, in order."""
    for process in processes:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
    assert len(list(folder.glob("process*.json"))) == world
    found = [json.loads((folder / f"process{rank}.json").read_text()) for rank in range(world)]
    assert all(note["world"] == world for note in found)
    return found


@pytest.fixture
def alone(project, tmp_path):
    """What a single process ends with."""
    folder = tmp_path / "alone"
    (note,) = notes(started(project, folder), folder=folder, world=1)
    assert note["ranks"]
    return note


def check(found, alone, folder):
    for note in found:
        assert note["ranks"] == alone["ranks"]
        assert note["samples"] == alone["samples"]
        assert note["sums"] == found[0]["sums"]
        assert note["sums"] == pytest.approx(alone["sums"], rel=1e-4, abs=1e-4)
    from launched import Frozen

    model = load_compressed(Frozen(), folder / "compressed")
    assert {n: float(v.double().sum()) for n, v in model.state_dict().items()} == found[0]["sums"]
    assert (folder / "compressed" / "compressed.ckpt").is_file()


@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn", "ddp_notebook"])
def test_strategies(project, tmp_path, alone, strategy):
    folder = tmp_path / strategy
    process = started(project, folder, "--strategy", strategy, "--devices", "2")
    check(notes(process, folder=folder, world=2), alone, folder)


@pytest.mark.parametrize(
    "options", [(), ("--weights", "best"), ("--weights", "best", "--shards")], ids=["last", "best", "best of shards"]
)
def test_weights_that_fsdp2_has_spread(project, tmp_path, alone, options):
    folder = tmp_path / "fsdp2"
    process = started(project, folder, "--strategy", "fsdp2", "--devices", "2", *options)
    check(notes(process, folder=folder, world=2), alone, folder)


def test_torchrun(project, tmp_path, alone):
    folder = tmp_path / "torchrun"
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}")
    process = started(project, folder, "--strategy", "ddp", "--devices", "2", launcher=launcher)
    check(notes(process, folder=folder, world=2), alone, folder)


def test_two_nodes(project, tmp_path, alone):
    """Two launchers that know each other by an address only, as on two machines."""
    folder, port = tmp_path / "nodes", free_port()
    launchers = [
        [
            *("-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={node}", "--nproc_per_node=1"),
            *("--master_addr=127.0.0.1", f"--master_port={port}"),
        ]
        for node in range(2)
    ]
    options = ("--strategy", "ddp", "--devices", "1", "--nodes", "2")
    processes = [started(project, folder, *options, launcher=launcher) for launcher in launchers]
    check(notes(*processes, folder=folder, world=2), alone, folder)


def test_a_batch_size_of_its_own_on_every_process(project, tmp_path):
    folder = tmp_path / "uneven"
    process = started(project, folder, "--strategy", "ddp", "--devices", "2", "--uneven")
    found = notes(process, folder=folder, world=2)
    assert found[0]["ranks"]
    assert found[0] == found[1]
    assert sum(found[0]["samples"].values()) == 83


@pytest.mark.parametrize("options", [(), ("-m", "callbacks.compress.keep=0.4,0.6")], ids=["run", "multirun"])
def test_hydra(project, tmp_path, options):
    """The application relaunches itself for every process, once per job."""
    tiny = [
        *("+compress=budget", "recipe=digits_small", "model.net.width=32", "model.net.blocks=1", "seed=3"),
        *("trainer.max_epochs=1", "trainer.accelerator=cpu", "+trainer.strategy=ddp", "trainer.devices=2"),
        *("+trainer.enable_progress_bar=false", "data.verification=100", "data.selection=100", "data.calibration=100"),
        *("logger=csv", "test=false"),
    ]
    command = [sys.executable, project / "train.py", *options[:1], *tiny, *options[1:]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    folders = sorted(path.parent for path in tmp_path.rglob("compressed/model.safetensors"))
    assert len(folders) == (2 if options else 1)
    for folder in folders:
        assert (folder / "compressed.ckpt").is_file()
        record = json.loads((folder / "compression.json").read_text())
        assert record["certificate"]["dense"]["samples"] == 100
