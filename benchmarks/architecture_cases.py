"""Architectures of timm, torchvision and transformers, small, with random weights, each with random inputs.

``compress`` is run over all of them by ``tests/test_architectures.py`` and by ``python -m benchmarks.architectures``.
Where a library offers it, depth and width are cut down, and images are as small as the network takes them: what is
wanted is every way in which their layers are built and called, not their size.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["BATCH", "CASES", "Case", "first_tensor"]

BATCH, CLASSES, VOCABULARY, TOKENS = 4, 10, 64, 12
Inputs = dict[str, Tensor]
Build = Callable[[Any], nn.Module]


@dataclass(frozen=True)
class Case:
    """An architecture.

    Attributes:
        library: the package that it comes from.
        name: what it is called there.
        make: a fresh model with weights that depend on torch's random state.
        inputs: arguments of its forward, for ``BATCH`` samples.
        fast: whether a solve takes so little time that it belongs to the default run of the tests.
        args: whether the inputs are given by position.
        exclude: layers that are left out because their width, which cannot be changed, would take minutes.
    """

    library: str
    name: str
    make: Callable[[], nn.Module] = field(repr=False)
    inputs: Callable[[], Inputs] = field(repr=False)
    fast: bool = False
    args: bool = False
    exclude: tuple[str, ...] = ()

    def call(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """The first output, such as logits or hidden states."""
        return first_tensor(model(*inputs.values()) if self.args else model(**inputs))


def first_tensor(output: Any) -> Tensor:
    """The first tensor with a batch in what a model returns: itself, or inside sequences, mappings and dataclasses."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output
    return first_tensor(next(value for value in values if value is not None))


def _images(size: int, channels: int = 3, name: str = "x") -> Callable[[], Inputs]:
    return lambda: {name: torch.randn(BATCH, channels, size, size)}


def _tokens(length: int = TOKENS, **more: Callable[[], Tensor]) -> Callable[[], Inputs]:
    def draw() -> Inputs:
        tokens = torch.randint(3, VOCABULARY, (BATCH, length))
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)} | {k: f() for k, f in more.items()}

    return draw


def _timm(name: str, size: int = 64, fast: bool = False, build: Build | None = None, **options: Any) -> Case:
    """``name`` is one of ``timm.list_models()``; ``build`` makes a smaller one of the kind from ``timm.models``."""

    def make() -> nn.Module:
        timm = importlib.import_module("timm")
        return build(timm.models) if build else timm.create_model(name, num_classes=CLASSES, **options)

    return Case("timm", name, make, _images(size), fast, args=True)


def _torchvision(
    name: str,
    size: int = 64,
    fast: bool = False,
    build: Build | None = None,
    exclude: tuple[str, ...] = (),
    **options: Any,
) -> Case:
    """``name`` is a function in ``torchvision.models`` or a module of it; ``build`` makes a smaller one of the kind."""

    def make() -> nn.Module:
        models = importlib.import_module("torchvision").models
        if build:
            return build(models)
        place, _, function = name.rpartition(".")
        weights = {"weights": None, "weights_backbone": None} if place == "segmentation" else {"weights": None}
        return getattr(getattr(models, place) if place else models, function)(num_classes=CLASSES, **weights, **options)

    inputs = _videos if name.startswith("video") else _images(size)
    return Case("torchvision", name, make, inputs, fast, args=True, exclude=exclude)


def _videos() -> Inputs:
    return {"x": torch.randn(BATCH, 3, 4, 32, 32)}


def _transformers(
    model: str,
    config: str,
    inputs: Callable[[], Inputs] | None = None,
    fast: bool = False,
    **options: Any,
) -> Case:
    """``model`` and ``config`` are names of classes in ``transformers``."""

    def make() -> nn.Module:
        library = importlib.import_module("transformers")
        return getattr(library, model)(getattr(library, config)(**options))

    return Case("transformers", model, make, inputs or _tokens(), fast)


_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "num_labels": CLASSES,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DECODER = {**_ENCODER, "num_key_value_heads": 1}
_LOOKING = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": CLASSES,
}
_SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


def _targets() -> Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, TOKENS))


def _pairs() -> Inputs:
    return {**_tokens()(), "pixel_values": torch.randn(BATCH, 3, 16, 16)}


_PIXELS = _images(16, name="pixel_values")
_PIXELS_64 = _images(64, name="pixel_values")
_TIMM = [
    _timm("test_resnet", fast=True),
    _timm("test_vit", 160, fast=True),
    _timm("test_efficientnet", fast=True),
    _timm("test_convnext", fast=True),
    _timm("test_nfnet", fast=True),
    _timm("test_byobnet"),
    _timm("test_maxvit", 160),
    _timm("test_mambaout"),
    _timm("resnext26ts"),
    _timm("resnest14d", channels=(16, 32, 64, 128)),
    _timm("res2net50_14w_8s", layers=(1, 1, 1, 1), channels=(16, 32, 64, 128)),
    _timm("skresnet18", layers=(1, 1, 1, 1), channels=(16, 32, 64, 128)),
    _timm("regnetx_002"),
    _timm("efficientnet_b0"),
    _timm("mobilenetv2_035"),
    _timm("mobilenetv3_small_050"),
    _timm("lcnet_035", fast=True),
    _timm("ghostnet_050"),
    _timm("hardcorenas_a"),
    _timm("rexnet_100"),
    _timm("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 16, 32, 64)),
    _timm("edgenext_xx_small"),
    _timm("mobilevit_xxs"),
    _timm("mobilevitv2_050"),
    _timm("vit_tiny_patch16_224", 32, img_size=32, patch_size=8, embed_dim=48, depth=2),
    _timm("deit_tiny_distilled_patch16_224", 32, img_size=32, patch_size=8, embed_dim=48, depth=2),
    _timm("beit_base_patch16_224", 32, img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4),
    _timm("eva02_tiny_patch14_224", 28, img_size=28, depth=2, embed_dim=48),
    _timm("swin_tiny_patch4_window7_224", 32, img_size=32, window_size=4, embed_dim=24, depths=(2, 2)),
    _timm("swinv2_tiny_window8_256", 32, img_size=32, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4)),
    _timm(
        "mixer_s32_224",
        32,
        build=lambda models: models.mlp_mixer.MlpMixer(CLASSES, img_size=32, patch_size=8, embed_dim=48, num_blocks=2),
    ),
    _timm(
        "resmlp_12_224",
        32,
        build=lambda models: models.mlp_mixer.MlpMixer(
            CLASSES,
            img_size=32,
            patch_size=8,
            embed_dim=48,
            num_blocks=2,
            mlp_ratio=4,
            block_layer=models.mlp_mixer.ResBlock,
            norm_layer=models.mlp_mixer.Affine,
        ),
    ),
    _timm(
        "gmlp_ti16_224",
        32,
        build=lambda models: models.mlp_mixer.MlpMixer(
            CLASSES,
            img_size=32,
            patch_size=8,
            embed_dim=48,
            num_blocks=2,
            mlp_ratio=6,
            block_layer=models.mlp_mixer.SpatialGatingBlock,
            mlp_layer=models.mlp_mixer.GatedMlp,
        ),
    ),
    _timm(
        "poolformer_s12",
        build=lambda models: models.metaformer.MetaFormer(
            num_classes=CLASSES,
            depths=(1, 1, 1, 1),
            dims=(16, 32, 48, 64),
            downsample_norm=None,
            mlp_act=nn.GELU,
            mlp_bias=True,
            norm_layers=models.metaformer.GroupNorm1,
            layer_scale_init_values=1e-5,
            res_scale_init_values=None,
            use_mlp_head=False,
        ),
    ),
    _timm("coat_lite_tiny", embed_dims=(16, 32, 48, 64), img_size=64),
    _timm("nf_resnet26", stem_chs=16, channels=(32, 64, 96, 128)),
    _timm("repvgg_a0"),
    _timm("dla46_c"),
    _timm("ese_vovnet19b_dw"),
    _timm("levit_128s", 64, img_size=64, embed_dim=(32, 48, 64), key_dim=8, num_heads=(2, 3, 4), depth=(1, 1, 1)),
    _timm("pit_ti_224", 64, img_size=64, depth=[1, 1, 1], base_dims=[8, 8, 8]),
    _timm("xcit_nano_12_p16_224", depth=2, embed_dim=32),
    _timm("cait_xxs24_224", 32, img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4),
    _timm("twins_svt_small", img_size=64, depths=(1, 1, 2, 1), embed_dims=(16, 32, 48, 64)),
    _timm("pvt_v2_b0", depths=(1, 1, 1, 1), embed_dims=(8, 16, 20, 32)),
    _timm("visformer_tiny", 64, img_size=64, embed_dim=48, init_channels=8, depth=(1, 1, 1)),
    _timm(
        "volo_d1_224",
        build=lambda models: models.volo.VOLO(
            layers=(1, 1, 1, 1), num_classes=CLASSES, img_size=64, embed_dims=(24, 48, 48, 48), num_heads=(2, 4, 4, 4)
        ),
    ),
    _timm(
        "focalnet_tiny_srf",
        build=lambda models: models.focalnet.FocalNet(num_classes=CLASSES, depths=(1, 1, 1, 1), embed_dim=16),
    ),
    _timm("fastvit_t8"),
    _timm("repvit_m0_9"),
    _timm("starnet_s1"),
    _timm("davit_tiny", 64, depths=(1, 1, 1, 1), embed_dims=(16, 32, 48, 64), num_heads=(1, 2, 3, 4)),
    _timm(
        "nest_tiny",
        32,
        build=lambda models: models.nest.Nest(
            num_classes=CLASSES, img_size=32, embed_dims=(24, 48, 48), num_heads=(2, 4, 4), depths=(1, 1, 1)
        ),
    ),
    _timm("tnt_s_patch16_224", 32, img_size=32, embed_dim=48, inner_dim=24, depth=2),
    _timm("convmixer_768_32", build=lambda models: models.convmixer.ConvMixer(dim=64, depth=2, num_classes=CLASSES)),
    _timm("convit_tiny", 32, img_size=32, patch_size=8, embed_dim=12, depth=3),
    _timm(
        "sequencer2d_s", 32, img_size=32, layers=(1, 1, 1, 1), embed_dims=(24, 48, 48, 48), hidden_sizes=(6, 12, 12, 12)
    ),
    _timm("efficientvit_b0"),
    _timm("efficientvit_m0", 224),
    _timm("tiny_vit_5m_224", depths=[1, 1, 1, 1], embed_dims=[16, 32, 48, 64], num_heads=[1, 2, 2, 4]),
    _timm("hiera_tiny_224", 64, img_size=64, stages=(1, 1, 1, 1), embed_dim=24),
    _timm(
        "caformer_s18",
        build=lambda models: models.metaformer.MetaFormer(
            num_classes=CLASSES,
            depths=(1, 1, 1, 1),
            dims=(16, 32, 64, 96),
            token_mixers=[models.metaformer.SepConv] * 2 + [models.metaformer.Attention] * 2,
            norm_layers=[models.metaformer.LayerNorm2dNoBias] * 2 + [models.metaformer.LayerNormNoBias] * 2,
        ),
    ),
]
_TORCHVISION = [
    _torchvision("alexnet", exclude=("classifier.*",)),
    _torchvision("resnet18", build=lambda models: models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], CLASSES)),
    _torchvision(
        "resnext50_32x4d",
        build=lambda models: models.ResNet(
            models.resnet.Bottleneck, [1, 1, 1, 1], CLASSES, groups=8, width_per_group=4
        ),
    ),
    _torchvision("vgg11_bn", 32, exclude=("classifier.*",)),
    _torchvision("squeezenet1_1", fast=True),
    _torchvision("densenet121", build=lambda models: models.DenseNet(8, (2, 2, 2, 2), 16, num_classes=CLASSES)),
    _torchvision("mobilenet_v2"),
    _torchvision("mobilenet_v3_small"),
    _torchvision("mnasnet0_5"),
    _torchvision("efficientnet_b0"),
    _torchvision("regnet_y_400mf"),
    _torchvision("shufflenet_v2_x0_5"),
    _torchvision("googlenet", aux_logits=True, init_weights=True),
    _torchvision("inception_v3", 96, aux_logits=True, init_weights=True),
    _torchvision(
        "convnext_tiny",
        build=lambda models: models.ConvNeXt(
            [models.convnext.CNBlockConfig(16, 32, 1), models.convnext.CNBlockConfig(32, None, 1)], num_classes=CLASSES
        ),
    ),
    _torchvision(
        "vit_b_16", 32, True, lambda models: models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=CLASSES)
    ),
    _torchvision(
        "swin_t", build=lambda models: models.SwinTransformer([2, 2], 16, [1, 1], [2, 4], [4, 4], num_classes=CLASSES)
    ),
    _torchvision(
        "maxvit_t",
        64,
        build=lambda models: models.MaxVit((64, 64), 16, 4, [16, 32], [1, 1], 8, 0.0, num_classes=CLASSES),
    ),
    _torchvision("video.mc3_18"),
    _torchvision("segmentation.deeplabv3_mobilenet_v3_large"),
    _torchvision("segmentation.lraspp_mobilenet_v3_large"),
    _torchvision(
        "segmentation.fcn_resnet50",
        build=lambda models: models.segmentation.fcn._fcn_resnet(
            models.ResNet(
                models.resnet.Bottleneck,
                [1, 1, 1, 1],
                groups=8,
                width_per_group=4,
                replace_stride_with_dilation=[False, True, True],
            ),
            CLASSES,
            None,
        ),
    ),
]
_TRANSFORMERS = [
    _transformers("BertForSequenceClassification", "BertConfig", fast=True, **_ENCODER),
    _transformers(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        vocab_size=VOCABULARY,
        dim=32,
        n_layers=2,
        n_heads=2,
        hidden_dim=64,
        num_labels=CLASSES,
    ),
    _transformers("RobertaForMaskedLM", "RobertaConfig", **_ENCODER),
    _transformers("AlbertForSequenceClassification", "AlbertConfig", fast=True, embedding_size=16, **_ENCODER),
    _transformers("ElectraForPreTraining", "ElectraConfig", embedding_size=16, **_ENCODER),
    _transformers(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        **_ENCODER,
    ),
    _transformers("MPNetForSequenceClassification", "MPNetConfig", **_ENCODER),
    _transformers("FNetForSequenceClassification", "FNetConfig", lambda: {"input_ids": _targets()}, **_ENCODER),
    _transformers("ModernBertForSequenceClassification", "ModernBertConfig", **_ENCODER),
    _transformers(
        "GPT2LMHeadModel",
        "GPT2Config",
        fast=True,
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=32,
    ),
    _transformers(
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=32,
    ),
    _transformers("GPTNeoXForCausalLM", "GPTNeoXConfig", **_ENCODER),
    _transformers(
        "GPTJForCausalLM",
        "GPTJConfig",
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=32,
        rotary_dim=8,
    ),
    _transformers(
        "OPTForCausalLM",
        "OPTConfig",
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=64,
        max_position_embeddings=32,
        word_embed_proj_dim=32,
    ),
    _transformers("LlamaForCausalLM", "LlamaConfig", fast=True, **_DECODER),
    _transformers("MistralForCausalLM", "MistralConfig", **_DECODER),
    _transformers("MixtralForCausalLM", "MixtralConfig", num_local_experts=2, **_DECODER),
    _transformers("Qwen2ForCausalLM", "Qwen2Config", **_DECODER),
    _transformers("Qwen3ForCausalLM", "Qwen3Config", head_dim=16, **_DECODER),
    _transformers(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        **_DECODER,
    ),
    _transformers("PhiForCausalLM", "PhiConfig", **_ENCODER),
    _transformers("Phi3ForCausalLM", "Phi3Config", **_DECODER),
    _transformers("GemmaForCausalLM", "GemmaConfig", head_dim=16, **_DECODER),
    _transformers("Gemma2ForCausalLM", "Gemma2Config", head_dim=16, **_DECODER),
    _transformers("BloomForCausalLM", "BloomConfig", vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=2),
    _transformers("FalconForCausalLM", "FalconConfig", **_ENCODER),
    _transformers(
        "MptForCausalLM", "MptConfig", vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=2, max_seq_len=32
    ),
    _transformers("StableLmForCausalLM", "StableLmConfig", **_DECODER),
    _transformers("OlmoForCausalLM", "OlmoConfig", **_DECODER),
    _transformers(
        "MambaForCausalLM",
        "MambaConfig",
        lambda: {"input_ids": _targets()},
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=4,
    ),
    _transformers(
        "RwkvForCausalLM",
        "RwkvConfig",
        lambda: {"input_ids": _targets()},
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        context_length=32,
        use_cache=False,
    ),
    _transformers(
        "XLNetForSequenceClassification",
        "XLNetConfig",
        vocab_size=VOCABULARY,
        d_model=32,
        n_layer=2,
        n_head=2,
        d_inner=64,
        num_labels=CLASSES,
    ),
    _transformers(
        "T5ForConditionalGeneration",
        "T5Config",
        _tokens(decoder_input_ids=_targets),
        fast=True,
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    ),
    _transformers("BartForConditionalGeneration", "BartConfig", _tokens(decoder_input_ids=_targets), **_SEQ2SEQ),
    _transformers("MarianMTModel", "MarianConfig", _tokens(decoder_input_ids=_targets), **_SEQ2SEQ),
    _transformers("ViTForImageClassification", "ViTConfig", _PIXELS, **_LOOKING),
    _transformers("DeiTForImageClassification", "DeiTConfig", _PIXELS, **_LOOKING),
    _transformers("BeitForImageClassification", "BeitConfig", _PIXELS, use_relative_position_bias=True, **_LOOKING),
    _transformers("Dinov2ForImageClassification", "Dinov2Config", _PIXELS, **_LOOKING),
    _transformers(
        "SwinForImageClassification",
        "SwinConfig",
        _images(32, name="pixel_values"),
        image_size=32,
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=4,
        num_labels=CLASSES,
    ),
    _transformers(
        "ConvNextV2ForImageClassification",
        "ConvNextV2Config",
        _PIXELS_64,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        num_labels=CLASSES,
    ),
    _transformers(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        _PIXELS_64,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=32,
        num_labels=CLASSES,
    ),
    _transformers(
        "MobileViTForImageClassification",
        "MobileViTConfig",
        _PIXELS_64,
        image_size=64,
        hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32],
        num_labels=CLASSES,
    ),
    _transformers(
        "ResNetForImageClassification",
        "ResNetConfig",
        _PIXELS_64,
        embedding_size=8,
        hidden_sizes=[16, 24, 32, 48],
        depths=[1, 1, 1, 1],
        num_labels=CLASSES,
    ),
    _transformers(
        "DPTForSemanticSegmentation",
        "DPTConfig",
        _PIXELS_64,
        **{**_LOOKING, "image_size": 64, "patch_size": 16, "num_hidden_layers": 4},
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 16, 16, 16],
        fusion_hidden_size=16,
        is_hybrid=False,
    ),
    _transformers(
        "CLIPModel",
        "CLIPConfig",
        _pairs,
        text_config={**_ENCODER, "projection_dim": 16},
        vision_config={**_LOOKING, "projection_dim": 16},
        projection_dim=16,
    ),
    _transformers("SiglipModel", "SiglipConfig", _pairs, text_config=_ENCODER, vision_config=_LOOKING),
    _transformers(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        lambda: {"input_features": torch.randn(BATCH, 8, 32), "decoder_input_ids": _targets()},
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=32,
        **_SEQ2SEQ,
    ),
    _transformers(
        "Wav2Vec2ForSequenceClassification",
        "Wav2Vec2Config",
        lambda: {"input_values": torch.randn(BATCH, 400)},
        conv_dim=[16, 16],
        conv_stride=[5, 4],
        conv_kernel=[10, 8],
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=16,
        **_ENCODER,
    ),
    _transformers(
        "HubertForSequenceClassification",
        "HubertConfig",
        lambda: {"input_values": torch.randn(BATCH, 400)},
        conv_dim=[16, 16],
        conv_stride=[5, 4],
        conv_kernel=[10, 8],
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=16,
        **_ENCODER,
    ),
    _transformers(
        "ASTForAudioClassification",
        "ASTConfig",
        lambda: {"input_values": torch.randn(BATCH, 32, 16)},
        **{**_LOOKING, "patch_size": 8},
        max_length=32,
        num_mel_bins=16,
    ),
    _transformers(
        "PatchTSTForPrediction",
        "PatchTSTConfig",
        lambda: {"past_values": torch.randn(BATCH, 32, 2)},
        num_input_channels=2,
        context_length=32,
        prediction_length=8,
        d_model=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=64,
        patch_length=4,
        patch_stride=4,
    ),
]

CASES = [*_TIMM, *_TORCHVISION, *_TRANSFORMERS]
