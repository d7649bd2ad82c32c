import pytest
import torch
from tiny_texts import write_works

import train as application
from recipes import passages, smollm2
from recipes.smollm2 import FILE

transformers = pytest.importorskip("transformers")


class Letters:
    def __call__(self, text, verbose):
        return {"input_ids": [ord(letter) % 32 for letter in text]}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A tiny model of the same kind with random weights, and tiny texts, in the place of the packages' files."""
    write_works(tmp_path)
    for module in (passages, smollm2):
        monkeypatch.setattr(module, "package_folder", lambda module, package: tmp_path)

    def model(folder, *, gguf_file, dtype):
        assert (folder, gguf_file, dtype) == (str(tmp_path), FILE, torch.float32)
        config = transformers.LlamaConfig(
            vocab_size=32,
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        )
        return transformers.LlamaForCausalLM(config)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda folder, gguf_file: Letters())


def test_a_model_without_training_is_compressed(files, composed):
    sizes = {"calibration": 16, "selection": 8, "verification": 12, "test": 8, "length": 10}
    cfg = composed(
        "recipe=smollm2",
        "+compress=budget",
        *(f"data.{name}={size}" for name, size in sizes.items()),
        "trainer.accelerator=cpu",
        "+trainer.enable_progress_bar=false",
        "callbacks.compress.points=2",
        "logger=csv",
    )
    metrics, objects = application.train(cfg)
    result = objects["result"]
    assert result.certificate.loss_change.pairs == 12
    names = {layer.name.rpartition(".")[2] for layer in result.layers if not layer.reason}
    assert {"embed_tokens", "q_proj", "o_proj", "down_proj"} <= names
    assert float(metrics["test/perplexity"]) == pytest.approx(float(metrics["test/loss"].exp()), rel=1e-3)
    inner = result.model.net.model
    if "net.model.model.embed_tokens" in result.ranks:
        assert inner.lm_head.left_factor is inner.model.embed_tokens.left_factor
