"""Phi-1, 1.5 and 2 (Gunasekar et al. 2023): attention and MLP side by side after one LayerNorm, biases everywhere.

    n = LayerNorm(x)        x = x + dense(attention(n)) + fc2(gelu(fc1(n)))        logits = W norm(x) + b

Rotary embeddings rotate the first half of each head (Phi-2: 0.4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from minipeft.errors import option
from minipeft.models.cache import Cache
from minipeft.models.config import ACTIVATIONS, count, dropout, width
from minipeft.models.family import Family
from minipeft.models.layout import Layout
from minipeft.models.llama import Attention, Block, Llama, LlamaConfig
from minipeft.models.starcoder2 import PlainMLP


@dataclass(frozen=True)
class PhiConfig(LlamaConfig):
    """Llama's fields with Phi's defaults and spelling."""

    vocab_size: int = count(51200)
    hidden_size: int = width(2048)
    intermediate_size: int = width(8192)
    num_hidden_layers: int = count(24)
    hidden_act: str = option("gelu_new", choices=ACTIVATIONS)
    rms_norm_eps: float = option(1e-5, above=0)
    partial_rotary_factor: float = option(0.5, above=0, most=1)
    qk_layernorm: bool = False
    residual_dropout: float = dropout(0.0)
    embedding_dropout: float = dropout(0.0)

    model_type = "phi"
    architecture = "PhiForCausalLM"
    spelling: ClassVar[Mapping[str, str]] = {
        "rms_norm_eps": "layer_norm_eps", "residual_dropout": "resid_pdrop", "embedding_dropout": "embd_pdrop",
    }  # fmt: skip
    fixed: ClassVar[Mapping[str, object]] = {"attention_bias": True, "mlp_bias": False, "head_dim": None}
    plain_mlp_bias = True


class PhiAttention(Attention):
    """Attention whose output projection is `dense`, and with an optional LayerNorm on each head's query and key."""

    def add_linears(self, config: Any) -> None:
        super().add_linears(config)
        self.dense = self.o_proj
        del self.o_proj
        self.normed = config.qk_layernorm
        if self.normed:
            self.q_layernorm = nn.LayerNorm(config.head_width, config.rms_norm_eps)
            self.k_layernorm = nn.LayerNorm(config.head_width, config.rms_norm_eps)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads(x)
        return (self.q_layernorm(q), self.k_layernorm(k), v) if self.normed else (q, k, v)

    def output(self, y: Tensor) -> Tensor:
        return self.dense(y)


class PhiMLP(PlainMLP):
    names = ("fc1", "fc2")


class PhiBlock(Block):
    """Attention and MLP read the same norm."""

    attention_class = PhiAttention
    mlp_class = PhiMLP
    norm_class = nn.LayerNorm
    norms = ("input_layernorm",)

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None) -> Tensor:
        n = self.input_layernorm(x)  # [B, T, C]
        return self.drop(self.self_attn(n, layout, cache)) + self.drop(self.mlp(n)) + x  # [B, T, C]


class Phi(Llama):
    """Parallel blocks, and a head with a bias."""

    block = PhiBlock

    def __init__(self, config: PhiConfig):
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.tie()


TARGETS = {"lora": ("q_proj", "v_proj", "fc1", "fc2"), "ia3": ("q_proj", "v_proj", "fc2"), "ia3_feedforward": ("fc2",)}
Phi.record = FAMILY = Family("phi", PhiConfig, Phi, TARGETS, norm="model.final_layernorm")
