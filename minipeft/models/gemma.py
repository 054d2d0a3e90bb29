"""Gemma (Gemma Team 2024), Gemma 2 (2024) and the text models of Gemma 3 (2025).

Gemma      Llama with x = sqrt(C) * embed(ids), RMSNorm(x) * (1 + weight), and a tanh GELU in the MLP
Gemma 2    norms on both sides: x = x + norm(attention(norm(x))); x = x + norm(mlp(norm(x))); scores scaled by
           query_pre_attn_scalar^-1/2; c tanh(s / c) of scores (c = 50) and logits (c = 30); a window on every
           other layer
Gemma 3    no c by default, q and k normalized per head as in Qwen 3, five of six layers with a window and a
           rotary base of their own
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minipeft.errors import InputError, option
from minipeft.models.cache import Cache
from minipeft.models.config import ACTIVATIONS, alias, count, width
from minipeft.models.family import Family
from minipeft.models.layered import LayeredConfig, TwoRopesConfig
from minipeft.models.layout import Layout
from minipeft.models.llama import Block, Llama, LlamaConfig, RMSNorm
from minipeft.models.qwen import TARGETS, NormedHeads


@dataclass(frozen=True)
class GemmaConfig(LlamaConfig):
    """Llama's fields with Gemma's defaults."""

    vocab_size: int = count(256000)
    hidden_size: int = width(3072)
    intermediate_size: int = width(24576)
    num_hidden_layers: int = count(28)
    num_attention_heads: int = width(16)
    num_key_value_heads: int | None = width(16)
    head_dim: int | None = width(256)
    hidden_act: str = option("gelu_pytorch_tanh", choices=ACTIVATIONS)
    max_position_embeddings: int = count(8192)
    tie_word_embeddings: bool = True

    model_type = "gemma"
    architecture = "GemmaForCausalLM"
    fixed: ClassVar[Mapping[str, object]] = {"mlp_bias": False}

    @classmethod
    def from_json(cls, given: Mapping[str, object]) -> dict[str, object]:
        """As Llama's; old files write "gelu" and mean its tanh form."""
        refuse_both_ways(given)
        fields = super().from_json(given)
        return {**fields, "hidden_act": "gelu_pytorch_tanh"} if fields.get("hidden_act") == "gelu" else fields


def refuse_both_ways(given: Mapping[str, object]) -> None:
    if given.get("use_bidirectional_attention"):
        raise InputError("true is not supported", where="use_bidirectional_attention")


@dataclass(frozen=True)
class Gemma2Config(LayeredConfig):
    """Gemma's fields, with sliding windows and soft caps."""

    vocab_size: int = count(256000)
    hidden_size: int = width(2304)
    intermediate_size: int = width(9216)
    num_hidden_layers: int = count(26)
    num_attention_heads: int = width(8)
    num_key_value_heads: int | None = width(4)
    head_dim: int | None = width(256)
    hidden_act: str = option("gelu_pytorch_tanh", choices=ACTIVATIONS)
    max_position_embeddings: int = count(8192)
    tie_word_embeddings: bool = True
    query_pre_attn_scalar: float = option(256, above=0)
    final_logit_softcapping: float | None = option(30.0, above=0)
    attn_logit_softcapping: float | None = option(50.0, above=0)

    model_type = "gemma2"
    architecture = "Gemma2ForCausalLM"
    spelling: ClassVar[Mapping[str, str]] = {"hidden_act": "hidden_activation"}
    fixed: ClassVar[Mapping[str, object]] = {"mlp_bias": False}
    attention_cap = alias("attn_logit_softcapping")

    @property
    def attention_scale(self) -> float:  # type: ignore[override]
        return float(self.query_pre_attn_scalar**-0.5)

    def slides(self, layer: int) -> bool:
        return layer % 2 == 0

    @classmethod
    def from_json(cls, given: Mapping[str, object]) -> dict[str, object]:
        refuse_both_ways(given)
        return super().from_json(given)


@dataclass(frozen=True)
class Gemma3Config(Gemma2Config, TwoRopesConfig):
    """Gemma 2's fields, and the pattern of the layers; a cap of the scores would have no effect in transformers."""

    vocab_size: int = count(262208)
    max_position_embeddings: int = count(131072)
    rope_theta: float = option(1000000.0, above=0)
    final_logit_softcapping: float | None = option(None, above=0)
    attn_logit_softcapping: float | None = option(None, above=0)
    sliding_window_pattern: int = count(6)

    model_type = "gemma3_text"
    architecture = "Gemma3ForCausalLM"
    fixed: ClassVar[Mapping[str, object]] = {"mlp_bias": False, "attn_logit_softcapping": None}

    def slides(self, layer: int) -> bool:
        return (layer + 1) % self.sliding_window_pattern != 0


class GemmaNorm(RMSNorm):
    """RMSNorm with 1 + weight, multiplied before the cast."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.scale(x) * (1.0 + self.weight.float())).to(x.dtype)  # [..., C]


class GemmaBlock(Block):
    norm_class = GemmaNorm


class Gemma(Llama):
    """Llama with scaled embeddings and norms 1 + weight; a prompt joins the scaled embeddings."""

    block: type[Block] = GemmaBlock
    norm_init = 0.0

    def look_up(self, ids: Tensor) -> Tensor:
        """sqrt(C) * embed(ids), the factor rounded to the weights' dtype."""
        x = super().look_up(ids)
        return x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype, device=x.device)  # [..., C]


class Gemma2Block(GemmaBlock):
    """A residual block with norms on both sides."""

    norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    pre_feedforward_layernorm: nn.Module
    post_feedforward_layernorm: nn.Module

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), layout, cache))  # [B, T, C]
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))  # [B, T, C]


class Gemma2(Gemma):
    """Gemma with norms on both sides, windows and caps."""

    block = Gemma2Block

    def __init__(self, config: Any):
        super().__init__(config)
        self.logit_cap = config.final_logit_softcapping


class GemmaNormedHeads(NormedHeads):
    norm_class = GemmaNorm


class Gemma3Block(Gemma2Block):
    attention_class = GemmaNormedHeads


class Gemma3(Gemma2):
    """Gemma 2 with normalized queries and keys."""

    block = Gemma3Block


Gemma.record = GEMMA = Family("gemma", GemmaConfig, Gemma, TARGETS)
Gemma2.record = GEMMA2 = Family("gemma2", Gemma2Config, Gemma2, TARGETS)
Gemma3.record = GEMMA3 = Family("gemma3_text", Gemma3Config, Gemma3, TARGETS)
