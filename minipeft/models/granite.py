"""Granite 3 (IBM 2024), dense: Llama with four factors from muP (Yang et al. 2022).

x = embedding_multiplier * embed(ids)            scores = attention_multiplier * q k^T   instead of D^-1/2
x = x + residual_multiplier * f(norm(x))         logits = lm_head(norm(x)) / logits_scaling
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from minipeft.errors import option
from minipeft.models.cache import Cache
from minipeft.models.config import alias
from minipeft.models.family import Family
from minipeft.models.layout import Layout
from minipeft.models.llama import TARGETS, Block, Llama, LlamaConfig


@dataclass(frozen=True)
class GraniteConfig(LlamaConfig):
    """Llama's fields and the four factors."""

    embedding_multiplier: float = option(1.0, above=0)
    logits_scaling: float = option(1.0, above=0)
    residual_multiplier: float = option(1.0, above=0)
    attention_multiplier: float = option(1.0, above=0)

    model_type = "granite"
    architecture = "GraniteForCausalLM"
    attention_scale = alias("attention_multiplier")


class GraniteBlock(Block):
    """Llama's block, with each residual branch multiplied."""

    def __init__(self, config: Any, layer: int):
        super().__init__(config, layer)
        self.factor = config.residual_multiplier

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), layout, cache) * self.factor  # [B, T, C]
        return x + self.mlp(self.post_attention_layernorm(x)) * self.factor  # [B, T, C]


class Granite(Llama):
    """Llama with the four factors. A prompt is multiplied like the token embeddings, as in transformers."""

    block = GraniteBlock

    def __init__(self, config: GraniteConfig):
        super().__init__(config)
        self.logit_divisor = config.logits_scaling

    def embed(self, ids: Tensor, layout: Layout) -> Tensor:
        return super().embed(ids, layout) * self.config.embedding_multiplier  # [B, T or P + T, C]


Granite.record = FAMILY = Family("granite", GraniteConfig, Granite, TARGETS)
