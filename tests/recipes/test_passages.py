import pytest
import torch
from tiny_texts import needs, write_works
from torch.nn import functional as F

import train as application
from lrf_lightning import load_compressed
from recipes import passages
from recipes.lm_shakespeare import CharacterModel, CharacterNet
from recipes.passages import CausalModule, Characters, Passages, read_works

SIZES = {"calibration": 32, "selection": 16, "verification": 24, "test": 10}


@pytest.fixture
def files(tmp_path, monkeypatch):
    write_works(tmp_path)
    monkeypatch.setattr(passages, "package_folder", lambda module, package: tmp_path)


def data(**options):
    datamodule = Passages(Characters("abcdefghklmnop "), **(dict(length=12, page=4, **SIZES) | options))
    datamodule.setup()
    return datamodule


def test_works_in_old_spelling_are_left_out(files):
    assert "OLD" not in read_works()
    assert len(read_works()) > 20_000


@needs("shksprdata", "shakespeare")
def test_the_real_works_are_there():
    text = read_works()
    assert len(text) > 5_000_000
    assert text.count("by William Shakespeare") == 42
    assert "To be, or not to be" in text


def test_unknown_characters_are_one_and_the_same():
    assert Characters("abc")("cab!?") == [3, 1, 2, 0, 0]


def test_splits_are_disjoint_pages_of_the_text(files):
    datamodule = data()
    ids = torch.tensor(datamodule.tokenizer(read_works()))
    assert {name: len(split) for name, split in datamodule.splits.items() if name != "train"} == SIZES
    places = {}
    for name, split in datamodule.splits.items():
        inputs, following = split.tensors
        torch.testing.assert_close(inputs[:, 1:], following[:, :-1], rtol=0, atol=0)
        start, size = ids.data_ptr(), ids.element_size()
        assert start != inputs.data_ptr(), "the text is copied"
        places[name] = {tuple(row) for row in torch.cat([inputs, following[:, -1:]], 1).tolist()}
        assert size == 8
    assert len(set().union(*places.values())) == sum(map(len, places.values()))
    assert sum(len(split) for split in datamodule.splits.values()) > len(ids) / 12 - 20


def test_training_takes_as_many_passages_as_it_is_told(files):
    assert len(data(train=50).splits["train"]) == 50


def test_splits_depend_on_the_seed_alone(files):
    first, again, other = (data(seed=seed).splits["verification"].tensors[0] for seed in (1, 1, 2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first, other)


def test_too_large_splits_are_refused(files):
    with pytest.raises(ValueError, match=r"leave none of \d+ passages"):
        data(verification=100_000)


def net():
    return CharacterNet(vocabulary=16, length=12, width=16, heads=2, layers=2)


def test_no_token_sees_what_follows():
    model, ids = net().eval(), torch.randint(16, (3, 12))
    changed = ids.clone()
    changed[:, 7:] = (ids[:, 7:] + 1) % 16
    with torch.no_grad():
        before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_loss_and_perplexity_of_the_next_token(files):
    module = CausalModule(net())
    logged = {}
    module.log = lambda name, value, **_: logged.setdefault(name, value)
    batch = next(iter(data().test_dataloader()))
    loss = module.test_step(batch, 0)
    expected = F.cross_entropy(module(batch[0]).transpose(1, 2), batch[1])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logged["test/perplexity"].compute(), expected.exp().detach())


def test_a_trained_model_is_compressed_with_its_tied_table(files, tmp_path, composed):
    cfg = composed(
        "recipe=lm_shakespeare",
        "+compress=budget",
        "data.tokenizer.known='abcdefghklmnop '",
        *(f"data.{name}={size}" for name, size in (SIZES | {"length": 12, "train": 320}).items()),
        "model.net.vocabulary=16",
        "model.net.width=16",
        "model.net.layers=2",
        "model.net.heads=2",
        "trainer.accelerator=cpu",
        "+trainer.enable_progress_bar=false",
        "callbacks.compress.points=2",
        "logger=csv",
    )
    metrics, objects = application.train(cfg)
    result = objects["result"]
    assert float(metrics["test/perplexity"]) < 16, "better than chance"
    assert float(metrics["test/perplexity"]) == pytest.approx(float(metrics["test/loss"].exp()), rel=0.02)
    reasons = {layer.name: layer.reason for layer in result.layers}
    assert reasons["net.tokens"] == ""
    assert "once for all" in reasons["net.places"]
    assert result.score_name == "accuracy"
    assert result.certificate.loss_change.pairs == 24, "a passage is a pair"
    ids = objects["datamodule"].splits["test"].tensors[0]
    fresh = CharacterModel(net())
    loaded = load_compressed(fresh, tmp_path / "outputs" / "csv" / "compressed").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids), result.model.eval()(ids), rtol=0, atol=0)
    if "net.tokens" in result.ranks:
        assert loaded.net.head.left_factor is loaded.net.tokens.left_factor
