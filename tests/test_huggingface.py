import json

import pytest
import torch
from compressed_models import compressed, net_solution, solution
from small_modules import QUICK
from torch import nn

from lrf_lightning import CheckpointError, StepOutput, compress
from lrf_lightning.huggingface import from_pretrained, save_pretrained

transformers = pytest.importorskip("transformers")


def bert():
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    return transformers.BertForSequenceClassification(config).eval()


def gpt():
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=24, bos_token_id=1)
    return transformers.GPT2LMHeadModel(config).eval()


def batches(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 40, (8, 6), generator=generator) for _ in range(4)]


def loss(model, tokens):
    logits = model(input_ids=tokens).logits
    return StepOutput(nn.functional.cross_entropy(logits, tokens[:, 0] % 3, reduction="none"))


@pytest.mark.parametrize("auto", [False, True])
def test_bert_that_was_really_compressed(tmp_path, auto):
    result = compress(bert(), loss, batches(0), batches(1), batches(2), objective="budget", keep=0.5, **QUICK)
    assert result.ranks
    save_pretrained(result, tmp_path / "bert")
    cls = transformers.AutoModelForSequenceClassification if auto else transformers.BertForSequenceClassification
    loaded = from_pretrained(cls, tmp_path / "bert")
    tokens = batches(3)[0]
    assert torch.equal(loaded(input_ids=tokens).logits, result.model.eval()(input_ids=tokens).logits)
    assert sum(p.numel() for p in loaded.parameters()) == result.params_model[1] < result.params_model[0]
    assert loaded.config.num_labels == 3
    assert not loaded.training


def test_gpt_with_transposed_layers_and_a_tied_head(tmp_path):
    ranks = {"transformer.h.0.mlp.c_fc": 3, "transformer.h.1.attn.c_attn": 4, "transformer.wte": 5}
    model = compressed(gpt(), ranks).eval()
    save_pretrained(solution(model, ranks, {}), tmp_path)
    loaded = from_pretrained(transformers.AutoModelForCausalLM, tmp_path)
    tokens = batches(3)[0]
    assert torch.equal(loaded(input_ids=tokens).logits, model(input_ids=tokens).logits)
    assert loaded.lm_head.left_factor is loaded.transformer.wte.left_factor
    assert loaded.generation_config.bos_token_id == 1
    assert json.loads((tmp_path / "config.json").read_text())["n_embd"] == 16


def test_other_models_are_refused(tmp_path):
    with pytest.raises(TypeError, match="Net has no configuration of the transformers library"):
        save_pretrained(net_solution(), tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        from_pretrained(transformers.BertModel, tmp_path)
