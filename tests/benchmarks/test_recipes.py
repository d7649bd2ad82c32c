import sys
from pathlib import Path

import pytest

from benchmarks.recipe_report import write_report
from benchmarks.recipes import FIELDS, Run, main
from benchmarks.results import append_row, read_rows

TINY = [
    "trainer.max_epochs=1",
    "model.net.width=32",
    "model.net.blocks=1",
    "callbacks.compress.points=2",
    "callbacks.compress.refinements=0",
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows of a tiny network, by method; trained once."""
    cache = tmp_path_factory.mktemp("cache")
    found = {}
    for method in ("lossless", "frontier", "plain SVD"):
        training = [item for item in TINY if "compress" not in item]
        run = Run("digits", 3, training, (0.6, 0.3), cache)
        found[method] = run.rows(method, [{name: str(value) for name, value in row.items()} for row in done(found)])
    assert len(list(cache.glob("digits-3-*.ckpt"))) == 1
    return found


def done(found):
    return [row for rows in found.values() for row in rows]


def test_rows_of_ours(rows):
    (lossless,) = rows["lossless"]
    assert lossless["params_model_after"] < lossless["params_model_before"] or lossless["verdict"] == "unchanged"
    assert lossless["samples_verification"] == 700
    assert lossless["training_processor_seconds"] > 0
    assert set(lossless) <= set(FIELDS)
    assert [row["keep"] for row in rows["frontier"]] == ["0.6", "0.3"]
    for row in rows["frontier"]:
        assert float(row["speedup/eager_batch_large"]) > 0
        assert float(row["test_loss"]) > 0


def test_objectives_share_a_calibration_whose_time_counts(tmp_path, monkeypatch):
    run, seen = Run("digits", 3, [item for item in TINY if "compress" not in item], (0.6,), tmp_path), []
    adjusted = run._with_calibration
    monkeypatch.setattr(run, "_with_calibration", lambda result: seen.append(result) or adjusted(result))
    (first,), (second,) = run.rows("lossless", []), run.rows("frontier", [])
    assert len(list(Path(run._calibrations.name).glob("*.pt"))) == 1
    alone, shared = (result.seconds for result in seen)
    calibration = sum(alone[stage] for stage in ("statistics", "factorization", "curves", "perturbation range"))
    assert float(first["solve_seconds"]) == pytest.approx(alone["total"], rel=1e-4)
    expected = shared["total"] - shared["calibration from the cache"] + calibration
    assert float(second["solve_seconds"]) == pytest.approx(expected, rel=1e-4)


def test_a_baseline_is_measured_at_the_sizes_of_ours(rows):
    keeps = {float(row["keep"]) for row in rows["plain SVD"]}
    (lossless,) = rows["lossless"]
    assert {0.6, 0.3} <= keeps
    if lossless["verdict"] != "unchanged":
        assert float(lossless["keep"]) in keeps
    ours = {row["keep"]: row for row in rows["frontier"]}
    for row in rows["plain SVD"]:
        assert row["loss_dense"] == rows["lossless"][0]["loss_dense"], "the same trained network"
        if row["keep"] in ours:
            assert row["params_layers_after"] == pytest.approx(ours[row["keep"]]["params_layers_after"], rel=0.05)


def test_report(rows, tmp_path):
    (tmp_path / "recipe_rows").mkdir()
    path = tmp_path / "recipe_rows" / "digits.csv"
    for row in done(rows):
        append_row(path, FIELDS, {name: row.get(name, "") for name in FIELDS})
    write_report("digits", tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    assert "## Recipes" in text
    assert "## Recipe digits" in text
    row = next(row for row in read_rows(path) if row["method"] == "frontier")
    assert f"| 0.6 | {int(row['params_model_after']):,} |" in text
    assert (tmp_path / "recipes.png").stat().st_size > 10_000


def test_rows_with_overrides_have_a_name_of_their_own(tmp_path, monkeypatch):
    training = [item for item in TINY if "compress" not in item]
    options = ["--seeds", "3", "--methods", "frontier", "--budgets", "0.6", "--set", *training]
    options += ["callbacks.compress.types=[Linear]", "--as", "digits_linear"]
    monkeypatch.setattr(sys, "argv", ["recipes", "digits", *options, "--cache", str(tmp_path), "--out", str(tmp_path)])
    main()
    (row,) = read_rows(tmp_path / "recipe_rows" / "digits_linear.csv")
    assert row["recipe"] == "digits"
    assert row["overrides"].endswith("callbacks.compress.types=[Linear]")
    text = (tmp_path / "RESULTS.md").read_text()
    assert "## Recipe digits_linear" in text
    assert f"benchmarks.recipes digits --set {row['overrides']} --as digits_linear --budgets 0.6 --seeds 3`" in text


def test_a_name_is_for_one_recipe(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recipes", "digits", "finetuned", "--as", "both"])
    with pytest.raises(SystemExit):
        main()
    assert "--as=both names the rows of one recipe" in capsys.readouterr().err


def test_unknown_recipe(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recipes", "digit"])
    with pytest.raises(SystemExit):
        main()
    printed = capsys.readouterr().err
    assert "invalid choice: 'digit'" in printed
    assert "digits_small" in printed
