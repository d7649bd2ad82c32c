import csv
import dataclasses

import pytest
from tiny_result import budgets_result, frontier_result, tiny_result

from lrf_lightning.reports.tables import curve_rows, frontier_rows, layer_rows, probe_rows, rank_rows, write_csv


def test_layer_rows_add_up_to_the_result():
    result = tiny_result()
    rows = layer_rows(result)
    assert [row["layer"] for row in rows] == [layer.name for layer in result.layers]
    usable = [row for row in rows if not row["reason"]]
    assert sum(row["params_after"] for row in usable) == result.params_layers[1]
    assert {row["layer"]: row["rank"] for row in usable if row["rank"] is not None} == result.ranks
    assert [row["shape"] for row in rows if row["layer"] == "conv"] == ["16x8x3x3"]


def test_the_frontier_starts_with_the_original():
    result = frontier_result()
    original, *points = frontier_rows(result)
    assert original["params_model_kept"] == 1.0
    assert (original["loss"], original["loss_change"], original["chosen"]) == (result.dense.loss, 0.0, False)
    assert [row["params_model"] for row in points] == [point.params_model for point in result.frontier]
    assert [row["chosen"] for row in points] == [False, True, False, False, False]
    unchanged = dataclasses.replace(result, ranks={}, frontier=[])
    assert [row["chosen"] for row in frontier_rows(unchanged)] == [True]


def test_the_frontier_holds_front_knee_budgets_and_verdicts():
    result = budgets_result()
    original, *points = frontier_rows(result)
    assert (original["budget"], original["verdict"], original["pareto"]) == (None, None, False)
    assert [row["budget"] for row in points] == [0.8, 0.6, 0.4, 0.2, 0.1]
    assert [row["verdict"] for row in points] == [point.certificate.verdict for point in result.frontier]
    assert [row["pareto"] for row in points] == [True, True, False, True, True]
    assert [row["knee"] for row in points] == [False, False, False, True, False]
    assert points[0]["verification_loss_upper"] == result.certificate.loss_change.upper
    assert points[0]["verification_score_lower"] == result.certificate.score_change.lower


def test_rank_rows_hold_every_layer_at_every_point():
    result = frontier_result()
    rows = rank_rows(result)
    assert len(rows) == 5 * 3
    for row in rows[:3]:
        assert row["rank"] == result.frontier[0].ranks.get(row["layer"])


def test_curve_rows_hold_the_predictions_of_every_rank():
    result = tiny_result()
    layer = next(layer for layer in result.layers if layer.name == "hidden")
    rows = [row for row in curve_rows(result) if row["layer"] == "hidden"]
    assert [row["rank"] for row in rows] == list(range(1, 33))
    assert [row["predicted_change"] for row in rows if row["predicted_change"] is not None] == layer.curve.predicted
    assert [row["singular_value"] for row in rows] == layer.curve.singular_values
    assert [row["rank"] for row in rows if row["chosen"]] == [layer.rank]


def test_curve_rows_can_be_thinned_out_between_the_first_and_the_last_rank():
    ranks = [row["rank"] for row in curve_rows(tiny_result(), most=10) if row["layer"] == "hidden"]
    assert ranks[0] == 1
    assert ranks[-1] == 32
    assert len(ranks) == len(set(ranks)) <= 10


def test_probe_rows_are_the_measured_points():
    layers = [layer for layer in tiny_result().layers if layer.curve is not None]
    expected = [(layer.name, str(rank), *rest) for layer in layers for rank, *rest in layer.curve.probes]
    assert expected
    assert not any(layer.curve.probed_with for layer in layers)
    assert [tuple(row.values()) for row in probe_rows(tiny_result())] == expected


def test_layers_that_were_truncated_together_share_a_row():
    result = tiny_result()
    first, second = [layer for layer in result.layers if layer.curve is not None][:2]
    shared = [(4, 0.1, 0.2, 0.01)]
    layers = [
        dataclasses.replace(
            layer, curve=dataclasses.replace(layer.curve, probes=[(rank, *shared[0][1:])], probed_with=[other.name])
        )
        for layer, other, rank in ((first, second, 4), (second, first, 7))
    ]
    rows = probe_rows(dataclasses.replace(result, layers=layers))
    assert [tuple(row.values()) for row in rows] == [(f"{first.name} + {second.name}", "4 + 7", 0.1, 0.2, 0.01)]


def test_csv_reads_back(tmp_path):
    rows = layer_rows(tiny_result())
    write_csv(tmp_path / "layers.csv", rows)
    with (tmp_path / "layers.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert read == [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows]


def test_no_rows_write_no_file(tmp_path):
    write_csv(tmp_path / "none.csv", [])
    assert not (tmp_path / "none.csv").exists()


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(OSError, match="none"):
        write_csv(tmp_path / "none" / "a.csv", [{"a": 1}])


def test_rows_of_an_earlier_result_do_not_stay(tmp_path):
    write_csv(tmp_path / "speed.csv", [{"a": 1}])
    write_csv(tmp_path / "speed.csv", [])
    assert not (tmp_path / "speed.csv").exists()
    write_csv(tmp_path / "speed.csv", [])
