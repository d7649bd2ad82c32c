import io
import logging

import pytest
from rich.console import Console

from lrf_lightning.progress import stage_progress


def shown(reports, **options):
    stream = io.StringIO()
    with stage_progress(console=Console(file=stream, width=100), **options) as progress:
        for report in reports:
            progress(*report)
    return stream.getvalue()


def test_one_bar_per_stage():
    lines = shown([("statistics", 0, 3), ("statistics", 3, 3), ("frontier", 1, 8), ("frontier", 8, 8)]).splitlines()
    assert [line.split()[0] for line in lines] == ["statistics", "frontier"]
    assert "3/3" in lines[0]
    assert "8/8" in lines[1]


def test_stages_of_unknown_length_and_stages_that_end_early_are_complete_in_the_end():
    lines = shown([("evaluation", 0, 0), ("frontier", 2, 8), ("frontier", 3, 8), ("verification", 0, 0)]).splitlines()
    assert [("1/1" in lines[0]), ("3/3" in lines[1]), ("1/1" in lines[2])] == [True] * 3


def test_disabled_bars_still_log(caplog):
    with caplog.at_level(logging.INFO, logger="lrf_lightning.progress"):
        assert shown([("statistics", 1, 1), ("statistics", 1, 1)], enabled=False).strip() == ""
    assert [record.getMessage() for record in caplog.records] == ["Compression: statistics"]


def test_an_error_passes_through():
    with pytest.raises(RuntimeError, match="stop"), stage_progress(console=Console(file=io.StringIO())) as progress:  # noqa: PT012
        progress("statistics", 0, 2)
        raise RuntimeError("stop")
