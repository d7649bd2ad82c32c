from lrf_lightning.callbacks.leftovers import remove_leftovers


def test_only_files_of_an_earlier_result_are_removed(tmp_path):
    ours = ["model.onnx", "model.pt2", "frontier.png", "spectra.png", "spectra_12.png", "changed_samples.png"]
    ours += ["points/keep_30/model.safetensors", "points/keep_30/compression.json", "points/keep_50/compression.json"]
    others = ["frontier_of_mine.png", "mine.png", "mine.onnx", "points/keep_50/notes.txt", "points/mine.txt"]
    for name in (*ours, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    remove_leftovers(tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == set(others)
    assert not (tmp_path / "points" / "keep_30").exists()
    remove_leftovers(tmp_path / "none")
