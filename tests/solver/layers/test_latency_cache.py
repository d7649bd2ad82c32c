import json
from pathlib import Path

import pytest

from lrf_lightning.solver.layers import latency_cache

KEY = {"layer": "Linear", "shape": [4, 8], "ranks": (1, 2)}
FIGURES = {"dense": 1e-6, "ratios": [0.5, 0.9], "errors": [0.01, 0.01]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(latency_cache.VARIABLE, str(tmp_path / "figures"))
    monkeypatch.setattr(latency_cache, "_memory", {})
    return tmp_path / "figures"


def forget(monkeypatch):
    monkeypatch.setattr(latency_cache, "_memory", {})


def test_figures_are_found_again_by_another_process(folder, monkeypatch):
    assert latency_cache.look_up(KEY) is None
    latency_cache.keep(KEY, FIGURES)
    assert latency_cache.look_up(KEY) == FIGURES
    forget(monkeypatch)
    assert latency_cache.look_up(KEY) == FIGURES
    assert latency_cache.look_up(KEY | {"shape": [8, 8]}) is None
    assert [path.suffix for path in folder.iterdir()] == [".json"], "no temporary file is left"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", json.dumps({"key": {}, "figures": FIGURES}), json.dumps({"key": 1})]
)
def test_a_damaged_file_is_as_good_as_none(folder, monkeypatch, content):
    latency_cache.keep(KEY, FIGURES)
    next(folder.iterdir()).write_text(content)
    forget(monkeypatch)
    assert latency_cache.look_up(KEY) is None
    latency_cache.keep(KEY, FIGURES)
    forget(monkeypatch)
    assert latency_cache.look_up(KEY) == FIGURES


def test_a_folder_that_cannot_be_written_costs_nothing(folder, monkeypatch):
    folder.write_text("a file, no folder")
    latency_cache.keep(KEY, FIGURES)
    assert latency_cache.look_up(KEY) == FIGURES
    forget(monkeypatch)
    assert latency_cache.look_up(KEY) is None


def test_a_folder_that_cannot_be_written_is_told_once(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    (tmp_path / "file").touch()
    monkeypatch.setenv(latency_cache.VARIABLE, str(tmp_path / "file" / "figures"))
    for number in range(3):
        latency_cache.keep(KEY | {"shape": [number]}, FIGURES)
        assert latency_cache.look_up(KEY | {"shape": [number]}) == FIGURES
    assert caplog.text.count("kept in memory only") == 1


def test_without_a_home_there_is_no_folder(monkeypatch):
    monkeypatch.delenv(latency_cache.VARIABLE)
    monkeypatch.setattr(latency_cache, "user_cache_path", lambda name: Path("~/.cache") / name)
    assert latency_cache.folder() is None


def test_an_empty_variable_means_memory_only(tmp_path, monkeypatch):
    monkeypatch.setenv(latency_cache.VARIABLE, "")
    latency_cache.keep(KEY, FIGURES)
    assert latency_cache.look_up(KEY) == FIGURES
    assert latency_cache.folder() is None
    assert not list(tmp_path.rglob("latency-*"))


def test_without_the_variable_figures_are_in_the_users_cache(monkeypatch):
    monkeypatch.delenv(latency_cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert latency_cache.folder().name == "lrf_lightning"
