"""A sweep's folder, written as jobs of a multirun write theirs, becomes one table and one picture."""

import csv
import dataclasses
import io
import subprocess
import sys

import pytest
from readable import assert_readable
from rich.console import Console
from tiny_result import budgets_result, tiny_result, with_certificate

from lrf_lightning.callbacks.tracking import _write_tables
from lrf_lightning.reports.summary import summary
from lrf_lightning.sweeps.callback import SweepSummary
from lrf_lightning.sweeps.plot import sweep_figure
from lrf_lightning.sweeps.summary import main, sweep_rows, write_sweep


def sized(share, verdict="worse", result=None):
    """A result with another size, loss and verdict."""
    result = with_certificate(result or tiny_result(), verdict=verdict)
    point = dataclasses.replace(result.frontier[0], loss=2.0 - share)
    return dataclasses.replace(
        result, params_model=(result.params_model[0], round(share * result.params_model[0])), frontier=[point]
    )


def write_job(folder, overrides, result):
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {line}\n" for line in overrides) or "[]\n")
    if result is not None:
        _write_tables(result, summary(result), folder / "csv" / "compressed")


@pytest.fixture
def sweep(tmp_path):
    jobs = [
        (["+compress=budget", "seed=0", "callbacks.compress.keep=0.5"], sized(0.5, "not worse")),
        (["+compress=budget", "seed=0", "callbacks.compress.keep=0.2"], sized(0.2)),
        (["+compress=budget", "seed=1", "callbacks.compress.keep=0.5"], sized(0.6, "better")),
        (["+compress=budget", "seed=1", "callbacks.compress.keep=0.19999999999"], None),
    ]
    for number, (overrides, result) in enumerate(jobs):
        write_job(tmp_path / f"{9 + number}", overrides, result)
    (tmp_path / "cache").mkdir()
    return tmp_path


def printed(folder, width):
    stream = io.StringIO()
    write_sweep(folder, console=Console(file=stream, width=width))
    return stream.getvalue()


def test_rows_hold_what_differs_and_what_was_found(sweep):
    rows = sweep_rows(sweep)
    assert [row["job"] for row in rows] == ["9", "10", "11", "12"], "in the order of the numbers"
    assert list(rows[0])[:3] == ["job", "seed", "callbacks.compress.keep"]
    assert "compress" not in rows[0]
    assert [row["verdict"] for row in rows] == ["not worse", "worse", "better", "no result"]
    assert rows[0]["params_model_after"] == round(0.5 * tiny_result().params_model[0])
    assert rows[0]["loss_change_upper"] == pytest.approx(tiny_result().certificate.loss_change.upper)
    assert rows[3]["params_model_after"] is None


def test_jobs_that_no_other_beats_are_marked(sweep):
    """In this sweep smaller models have a higher loss, so all of them are; an equal one that is larger is not."""
    rows = {row["job"]: row["pareto"] for row in sweep_rows(sweep)}
    assert rows == {"9": True, "10": True, "11": True, "12": False}
    larger = dataclasses.replace(sized(0.5), params_model=(10**6, 10**6))
    write_job(sweep / "14", ["seed=3"], larger)
    assert not sweep_rows(sweep)[-1]["pareto"]


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_and_names_are_short(sweep, width):
    text = printed(sweep, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    lines = [line.split() for line in text.splitlines()]
    assert ["11*", "1", "0.5"] in [line[:3] for line in lines]
    assert ["12", "1", "0.2", "no", "result"] in lines
    assert "callbacks" not in text


def test_brackets_in_settings_are_no_markup(tmp_path):
    for number, value in enumerate(("[encoder.*]", "[/data/a]")):
        write_job(tmp_path / f"{number}", [f"callbacks.compress.include={value}"], sized(0.5))
    text = printed(tmp_path, 120)
    assert "[encoder.*]" in text
    assert "[/data/a]" in text


def test_files(sweep):
    printed(sweep, 100)
    with (sweep / "sweep.csv").open(newline="") as file:
        assert [row["verdict"] for row in csv.DictReader(file)] == ["not worse", "worse", "better", "no result"]
    assert (sweep / "sweep.png").read_bytes()[:4] == b"\x89PNG"


def test_the_picture_has_one_series_per_setting_that_is_no_size(sweep):
    figure = sweep_figure(sweep_rows(sweep), ["seed", "callbacks.compress.keep"], {})
    assert_readable(figure)
    loss, score = figure.axes
    for ax in (loss, score):
        assert ax.get_legend_handles_labels()[1] == ["seed=0", "seed=1"]
    first = loss.containers[0][0]
    assert list(first.get_xdata()) == pytest.approx([50, 20], abs=0.1)
    assert list(first.get_ydata()) == [tiny_result().certificate.loss_change.mean] * 2
    (held,) = [
        line for line in loss.lines if line.get_linestyle() == "None" and line.get_zorder() > first.get_zorder()
    ][:1]
    assert held.get_markerfacecolor() == held.get_color(), "jobs that are not worse are filled, above the hollow ones"


def test_many_series_stay_readable(sweep):
    rows = [dict(sweep_rows(sweep)[0], seed=str(i), metric="fisher" * 5, recipe="digits") for i in range(18)]
    assert_readable(sweep_figure(rows, ["seed", "metric", "recipe"], {}))


def test_all_budgets_of_a_job_are_drawn(tmp_path):
    write_job(tmp_path / "0", [], budgets_result())
    printed(tmp_path, 100)
    from lrf_lightning.sweeps.summary import _budgets

    points = _budgets(tmp_path / "0")
    assert len(points) == 5
    figure = sweep_figure(sweep_rows(tmp_path), [], {"0": points})
    assert list(figure.axes[0].containers[0][0].get_xdata()) == pytest.approx([80, 50, 30, 20, 10], abs=0.1)


def test_a_sweep_without_any_result_has_no_picture(tmp_path):
    write_job(tmp_path / "0", ["seed=0"], None)
    assert "no result" in printed(tmp_path, 100)
    assert not (tmp_path / "sweep.png").exists()


def test_the_command(sweep, tmp_path, capsys):
    main([str(sweep)])
    assert "Sweep: 4 jobs" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([str(tmp_path / "nothing")])
    assert "holds no jobs of a multirun" in capsys.readouterr().err


def test_the_callback_never_fails_a_sweep(tmp_path, caplog):
    from omegaconf import OmegaConf

    SweepSummary().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path / "gone")}}}))
    assert "could not be summed up" in caplog.text


APP = """
import hydra

@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg):
    1 / cfg.number

def app():
    from hydra.core.config_store import ConfigStore
    summary = {"_target_": "lrf_lightning.sweeps.callback.SweepSummary"}
    hydra = {"callbacks": {"summary": summary}, "sweep": {"dir": "jobs"}, "job": {"chdir": True}}
    ConfigStore.instance().store("config", {"number": 1, "hydra": hydra})
    main()

app()
"""


@pytest.mark.timeout(400)  # a new process imports torch
def test_a_sweep_with_a_job_that_failed_is_summed_up_too(tmp_path):
    (tmp_path / "app.py").write_text(APP)
    command = [sys.executable, "app.py", "-m", "number=1,0,2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=380)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert "Sweep: 3 jobs" in done.stdout
    with (tmp_path / "jobs" / "sweep.csv").open(newline="") as file:
        assert [row["number"] for row in csv.DictReader(file)] == ["1", "0", "2"]


def test_a_sweep_is_summed_up_once_and_only_if_a_job_began(tmp_path, monkeypatch, caplog, capsys):
    from omegaconf import OmegaConf

    at_exit = []
    monkeypatch.setattr("atexit.register", at_exit.append)
    monkeypatch.setattr("atexit.unregister", at_exit.remove)
    config = OmegaConf.create({"hydra": {"sweep": {"dir": "."}}})
    callback = SweepSummary()
    callback.on_multirun_start(config)
    at_exit[0]()
    assert not caplog.text
    write_job(tmp_path / "0", ["seed=0"], None)
    callback.on_multirun_end(config)
    assert "Sweep: 1 jobs" in capsys.readouterr().out
    assert not at_exit
