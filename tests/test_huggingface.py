import copy
import json

import pytest
import torch
from compressed_models import compressed, net_solution, solution
from lightning.pytorch import LightningModule
from safetensors.torch import load_file
from small_modules import QUICK
from torch import nn

from lrf_lightning import CheckpointError, StepOutput, compress, restore_dense
from lrf_lightning.huggingface import from_pretrained, save_pretrained
from lrf_lightning.steps.loss_explanation import ExplainedLoss
from lrf_lightning.steps.step_loss import StepLoss

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


def test_the_loss_of_a_causal_model_is_explained_by_its_tokens():
    model, tokens = gpt(), batches(0)[0]
    output = ExplainedLoss(lambda model, batch: model(input_ids=batch, labels=batch).loss)(model, tokens)
    rows = nn.functional.cross_entropy(
        model(input_ids=tokens).logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none"
    )
    torch.testing.assert_close(output.loss, rows.mean())
    assert output.terms.count == 5
    torch.testing.assert_close(output.terms.values[:, :5], rows / 5)


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


def test_a_model_that_was_loaded_is_saved_again(tmp_path):
    ranks = {"transformer.h.0.mlp.c_fc": 3}
    save_pretrained(solution(compressed(gpt(), ranks), ranks, {}), tmp_path / "first")
    model = from_pretrained(transformers.AutoModelForCausalLM, tmp_path / "first").bfloat16()
    save_pretrained(model, tmp_path / "second")
    loaded, tokens = from_pretrained(transformers.AutoModelForCausalLM, tmp_path / "second"), batches(3)[0]
    assert torch.equal(loaded(input_ids=tokens).logits, model(input_ids=tokens).logits)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second")]
    name = "dtype" if "dtype" in configs[0] else "torch_dtype"
    assert [config[name] for config in configs] == ["float32", "bfloat16"]
    assert configs[0]["architectures"] == ["GPT2LMHeadModel"]
    assert gpt().config.architectures is None


def test_linear_layers_of_a_class_of_its_own(tmp_path):
    config = transformers.FalconConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    name, tokens = "transformer.h.0.mlp.dense_h_to_4h", batches(3)[0]
    model = compressed(transformers.FalconForCausalLM(config), {name: 3}).eval()
    save_pretrained(solution(model, {name: 3}, {}), tmp_path)
    loaded = from_pretrained(transformers.FalconForCausalLM, tmp_path)
    assert loaded.get_submodule(name).rank == 3
    assert torch.equal(loaded(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_tied_weights_stay_tied_in_the_eyes_of_transformers(tmp_path):
    declared = copy.copy(transformers.GPT2LMHeadModel._tied_weights_keys)
    model = compressed(gpt(), {"transformer.wte": 5}).eval()
    dense = restore_dense(model)
    tokens = batches(3)[0]
    expected = model(input_ids=tokens).logits
    model.tie_weights()
    assert model.lm_head.left_factor is model.transformer.wte.left_factor
    assert torch.equal(model(input_ids=tokens).logits, expected)
    model.save_pretrained(tmp_path)  # that of transformers, which its Trainer calls
    assert "lm_head.left_factor" not in load_file(tmp_path / "model.safetensors")
    assert "transformer.wte.left_factor" in load_file(tmp_path / "model.safetensors")

    dense.tie_weights()
    assert dense.lm_head.weight is dense.transformer.wte.weight
    torch.testing.assert_close(dense(input_ids=tokens).logits, expected)
    dense.resize_token_embeddings(42)
    assert dense.lm_head.weight.shape == (42, 16)
    assert transformers.GPT2LMHeadModel._tied_weights_keys == declared, "other models of the class are not concerned"


def test_other_models_are_refused(tmp_path):
    with pytest.raises(TypeError, match="Net has no configuration of the transformers library"):
        save_pretrained(net_solution(), tmp_path)
    with pytest.raises(TypeError, match="is a GPT2LMHeadModel without low-rank layers; allowed are"):
        save_pretrained(gpt(), tmp_path)
    assert not list(tmp_path.glob("*.json"))
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        from_pretrained(transformers.BertModel, tmp_path)


class Finetuned(LightningModule):
    """What users write: the model's own loss of a batch with padding, whose labels are -100."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def validation_step(self, batch, batch_idx):
        return self.model(**batch).loss


def test_losses_of_the_library_are_known_for_every_text():
    ids, mask = torch.randint(40, (5, 8)), torch.ones(5, 8, dtype=torch.long)
    mask[1, 3:] = mask[4, 6:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    module = Finetuned(gpt()).eval()
    output = StepLoss()(module, batch)
    torch.testing.assert_close(output.loss.mean(), module.validation_step(batch, 0))
    tokens = (mask.sum(1) - 1).tolist()  # the first token of a text is not predicted
    for place in range(5):
        alone = {name: value[place : place + 1] for name, value in batch.items()}
        expected = module.validation_step(alone, 0) * tokens[place] / (sum(tokens) / 5)
        torch.testing.assert_close(output.loss[place], expected, rtol=1e-4, atol=1e-5)
    assert output.score.shape == (5,)
