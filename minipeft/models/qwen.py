"""Qwen 2, 2.5 and 2.5-Coder (Yang et al. 2024) and Qwen 3 (Yang et al. 2025).

    Qwen 2    Llama with biases on q, k and v, never on o
    Qwen 3    Llama with q = RMSNorm(q), k = RMSNorm(k) over each head's D dimensions, before rotary

Their files set a `sliding_window` that applies only with `use_sliding_window`, from layer `max_window_layers` on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from minipeft.errors import option
from minipeft.models.config import count, width
from minipeft.models.family import Family
from minipeft.models.layered import LayeredConfig
from minipeft.models.llama import Attention, Block, Llama, RMSNorm

TARGETS = {"lora": ("q_proj", "v_proj"), "ia3": ("q_proj", "v_proj", "down_proj"), "ia3_feedforward": ("down_proj",)}
TUNED_NORMS = ("post_attention_layernorm",)


@dataclass(frozen=True)
class Qwen2Config(LayeredConfig):
    """Llama's fields with Qwen's defaults, and the window's."""

    vocab_size: int = count(151936)
    intermediate_size: int = width(22016)
    num_key_value_heads: int | None = width(32)
    max_position_embeddings: int = count(32768)
    use_sliding_window: bool = False
    max_window_layers: int = option(28, least=0)

    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"
    fixed: ClassVar[Mapping[str, object]] = {"attention_bias": True, "mlp_bias": False}

    @property
    def output_bias(self) -> bool:
        return False

    def slides(self, layer: int) -> bool:
        return self.use_sliding_window and layer >= self.max_window_layers

    def window(self, layer: int) -> int | None:
        return super().window(layer) if self.use_sliding_window else None


class Qwen2(Llama):
    """Llama with biases on queries, keys and values."""


@dataclass(frozen=True)
class Qwen3Config(Qwen2Config):
    """Qwen 2's fields; `attention_bias` sets the biases of q, k, v and o."""

    head_dim: int | None = width(128)

    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
    fixed: ClassVar[Mapping[str, object]] = {"mlp_bias": False}

    @property
    def output_bias(self) -> bool:
        return self.attention_bias


class NormedHeads(Attention):
    """Attention that normalizes each head's query and key before rotary."""

    norm_class: type[RMSNorm] = RMSNorm

    def add_linears(self, config: Any) -> None:
        super().add_linears(config)
        self.q_norm = self.norm_class(config.head_width, config.rms_norm_eps)
        self.k_norm = self.norm_class(config.head_width, config.rms_norm_eps)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads(x)
        return self.q_norm(q), self.k_norm(k), v


class Qwen3Block(Block):
    attention_class = NormedHeads


class Qwen3(Llama):
    """Llama with normalized queries and keys."""

    block = Qwen3Block


Qwen2.record = QWEN2 = Family("qwen2", Qwen2Config, Qwen2, TARGETS, tuned_norms=TUNED_NORMS)
Qwen3.record = QWEN3 = Family("qwen3", Qwen3Config, Qwen3, TARGETS, tuned_norms=TUNED_NORMS)
