import dataclasses

import pytest
from rich.console import Console
from tiny_result import tiny_result

from lrf_lightning.reports.report import print_report
from lrf_lightning.reports.summary import summary
from lrf_lightning.reports.tables import speed_rows
from lrf_lightning.solver.speed_result import SlowerLayer, Speed, Timing


def timing(batch, speedup, runtime="eager"):
    return Timing(runtime, batch, (1e-3, 1e-3 / speedup), speedup, 0.95 * speedup, 1.05 * speedup, 9)


def with_speed(*timings, **fields):
    defaults = {"device": "Some CPU", "what": "forward", "bytes_on_disk": (4096, 1024), "flops": (1000.0, 400.0)}
    return dataclasses.replace(tiny_result(), speed=Speed(timings=list(timings), **(defaults | fields)))


def report(result, width=80):
    console = Console(width=width, record=True, quiet=False, file=open("report.txt", "w"))  # noqa: SIM115
    print_report(result, console=console)
    console.file.close()
    return " ".join(console.export_text().split())


def test_a_faster_model_needs_no_reason():
    text = report(with_speed(timing(64, 1.8), timing(1, 1.2), peak_memory=(2**20, 2**19)))
    for part in (
        "size on disk 4.00 KiB 1.00 KiB 0.25",
        "operations 1.00 kFLOP 400 FLOP 0.40",
        "peak memory 1.00 MiB 512 KiB 0.50",
        "latency, batch 64 1.00 ms 556 us 1.80 1.71 to 1.89",
        "throughput, batch 64 64,000 /s 115,200 /s 1.80",
        "Measured on Some CPU",
    ):
        assert part in text
    assert "faster at" not in text
    assert "Slower" not in text


@pytest.mark.parametrize(
    ("timings", "fields", "reason"),
    [
        (
            [timing(64, 0.8)],
            {"slower_layers": [SlowerLayer("net.1", 4, 1.6)], "timed_layers": 2},
            "Slower at batch 64: 1 of the 2 factorized layers takes longer than the dense ones (time "
            "net.1 x1.6), their median rank of 4 being too small to fill vector units; use cost=latency.",
        ),
        (
            [timing(64, 0.8)],
            {"slower_layers": [SlowerLayer("net.1", 4, 1.6)], "timed_layers": 1},
            "1 of the 1 costliest factorized layers takes longer",
        ),
        ([timing(64, 0.9)], {"flops": (1000.0, 950.0)}, "95 % of the operations remain, since the costly layers"),
        ([timing(64, 1.5), timing(1, 0.9)], {}, "Slower at batch 1: a single sample leaves little work per call"),
        ([timing(64, 1.0), timing(1, 0.5)], {}, "Slower at batch 1, not measurably faster at batch 64: "),
        ([timing(64, 1.0)], {}, "Not measurably faster at batch 64: "),
        ([timing(64, 1.0)], {}, "disappears in the rest of the model and in the noise (40 % of the operations remain)"),
        ([timing(64, 1.5), timing(64, 0.9, "compile")], {}, "Slower at batch 64 (compile)"),
    ],
)
def test_a_slower_model_is_explained(timings, fields, reason):
    assert reason in report(with_speed(*timings, **fields))


def test_what_could_not_be_measured_is_said():
    text = report(with_speed(timing(64, 2.0), problems=["could not time compile at batch 1 (Error: no compiler)"]))
    assert "Speed: could not time compile at batch 1 (Error: no compiler)." in text


def test_rows_and_figures_agree():
    result = with_speed(timing(64, 1.8), timing(1, 1.2), timing(64, 2.0, "compile"))
    rows = speed_rows(result)
    assert [(row["figure"], row["batch"], row["runtime"]) for row in rows[2:4]] == [
        ("latency", 64, "eager"),
        ("throughput", 64, "eager"),
    ]
    assert len({tuple(row) for row in rows}) == 1, "all rows have the same columns"
    figures = summary(result)
    assert figures["compress/bytes_on_disk_kept"] == 0.25
    assert figures["compress/speedup/eager_batch_large"] == 1.8
    assert figures["compress/speedup/eager_batch_1_lower"] == pytest.approx(1.14)
    assert figures["compress/latency_compressed/compile_batch_large"] == pytest.approx(5e-4)
    assert figures["compress/throughput_dense/eager_batch_1"] == pytest.approx(1000)
    assert speed_rows(dataclasses.replace(result, speed=None)) == []
    assert not any("speedup" in name for name in summary(dataclasses.replace(result, speed=None)))
