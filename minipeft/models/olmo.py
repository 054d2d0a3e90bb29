"""OLMo 2 (Walsh et al. 2025) and OLMo 3 (Olmo Team 2025): Llama with the norms after attention and MLP, not before.

    x = x + post_attention_layernorm(attention(x))       q = RMSNorm(q), k = RMSNorm(k) over all heads at once, [H * D]
    x = x + post_feedforward_layernorm(mlp(x))           before the heads are split and rotated

Norm weights and rotary tables multiply in float32, and one cast follows. OLMo 3 has a window on three of four layers;
its YaRN stretches the full ones alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minipeft.errors import InputError, option
from minipeft.models.attention import project
from minipeft.models.cache import Cache
from minipeft.models.config import count
from minipeft.models.family import Family
from minipeft.models.layered import TwoRopesConfig
from minipeft.models.layout import Layout, Rotary
from minipeft.models.llama import TARGETS, Attention, Block, Llama, LlamaConfig, RMSNorm


@dataclass(frozen=True)
class Olmo2Config(LlamaConfig):
    """Llama's fields with OLMo's defaults."""

    vocab_size: int = count(50304)
    rms_norm_eps: float = option(1e-5, above=0)

    model_type = "olmo2"
    architecture = "Olmo2ForCausalLM"
    fixed: ClassVar[Mapping[str, object]] = {"mlp_bias": False}


@dataclass(frozen=True)
class Olmo3Config(TwoRopesConfig):
    """OLMo 2's fields, with sliding windows and rotary settings by layer."""

    vocab_size: int = count(50304)
    rms_norm_eps: float = option(1e-5, above=0)
    rope_theta: float = option(500000.0, above=0)
    rope_local_base_freq: float = option(500000.0, above=0)

    model_type = "olmo3"
    architecture = "Olmo3ForCausalLM"
    fixed: ClassVar[Mapping[str, object]] = {"mlp_bias": False}

    def slides(self, layer: int) -> bool:
        return (layer + 1) % 4 != 0

    @classmethod
    def from_json(cls, given: Mapping[str, object]) -> dict[str, object]:
        theta = given.get("rope_theta", cls.rope_theta)
        if not given.get("rope_parameters") and theta != cls.rope_theta:
            problem = f"{theta!r} is not supported ({cls.rope_theta}): transformers 5 applies it to full layers only"
            raise InputError(problem, where="rope_theta")
        return super().from_json(given)


class OlmoNorm(RMSNorm):
    """RMSNorm whose weight multiplies before the cast."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * self.scale(x)).to(x.dtype)  # [..., C]


class OlmoAttention(Attention):
    """Attention with RMSNorm over the whole query and key projections."""

    def add_linears(self, config: Any) -> None:
        super().add_linears(config)
        self.q_norm = OlmoNorm(self.q_proj.out_features, config.rms_norm_eps)
        self.k_norm = OlmoNorm(self.k_proj.out_features, config.rms_norm_eps)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = project(x, self.q_proj, self.k_proj, self.v_proj)
        return self.split(self.q_norm(q)), self.split(self.k_norm(k)), self.split(v)


class OlmoBlock(Block):
    """A post-norm residual block."""

    attention_class = OlmoAttention
    norm_class = OlmoNorm
    norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    post_feedforward_layernorm: nn.Module

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(x, layout, cache))  # [B, T, C]
        return x + self.post_feedforward_layernorm(self.mlp(x))  # [B, T, C]


class Olmo2(Llama):
    """Llama with norms behind attention and MLP."""

    block = OlmoBlock

    def rotations(self, positions: Tensor, dtype: torch.dtype) -> dict[str, Rotary]:
        return super().rotations(positions, torch.float32)


class Olmo3(Olmo2):
    """OLMo 2 with windows."""


Olmo2.record = OLMO2 = Family("olmo2", Olmo2Config, Olmo2, TARGETS)
Olmo3.record = OLMO3 = Family("olmo3", Olmo3Config, Olmo3, TARGETS)
