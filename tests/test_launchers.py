"""DDP as users start it: relaunched scripts, spawned and forked processes, torchrun, and two nodes."""

import json
import subprocess
import sys

import pytest
from launching import check, free_port, notes, started, started_on_two_nodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def alone(project, tmp_path):
    """What a single process ends with."""
    folder = tmp_path / "alone"
    (note,) = notes(started(project, folder), folder=folder, world=1)
    assert note["ranks"]
    return note


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
    folder = tmp_path / "nodes"
    processes = started_on_two_nodes(project, folder, "--strategy", "ddp")
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
        *("trainer.max_epochs=1", "trainer.accelerator=cpu", "trainer.strategy=ddp", "trainer.devices=2"),
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
