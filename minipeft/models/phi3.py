"""Phi-3, 3.5, 4 and 4-mini (Abdin et al. 2024): Llama with fused projections.

    q, k, v  = qkv_proj(x) cut at H * D and (H + K) * D           gate, up = the halves of gate_up_proj(x)

The projections stay fused: one LoRA A serves all of qkv_proj, as in PEFT's files. Phi-4-mini rotates the first three
quarters of each head. LongRoPE is exact within the pretraining context (rotary.py); longer texts are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from minipeft.errors import option
from minipeft.models.config import ACTIVATIONS, count, dropout, width
from minipeft.models.family import Family
from minipeft.models.layered import LayeredConfig
from minipeft.models.llama import Attention, Block, Llama


@dataclass(frozen=True)
class Phi3Config(LayeredConfig):
    """Llama's fields with Phi's defaults; the window, if any, is on every layer."""

    vocab_size: int = count(32064)
    hidden_size: int = width(3072)
    intermediate_size: int = width(8192)
    max_position_embeddings: int = count(4096)
    original_max_position_embeddings: int = count(4096)
    rms_norm_eps: float = option(1e-5, above=0)
    partial_rotary_factor: float = option(1.0, above=0, most=1)
    sliding_window: int | None = count(None)
    residual_dropout: float = dropout(0.0)

    model_type = "phi3"
    architecture = "Phi3ForCausalLM"
    spelling: ClassVar[Mapping[str, str]] = {"residual_dropout": "resid_pdrop"}
    fixed: ClassVar[Mapping[str, object]] = {"attention_bias": False, "mlp_bias": False, "layer_types": None}

    @classmethod
    def from_json(cls, given: Mapping[str, object]) -> dict[str, object]:
        """As Llama; old files name longrope "su" or "yarn", and hold the pretraining context beside the scaling."""
        fields = super().from_json(given)
        scaling = fields["rope_scaling"]
        if isinstance(scaling, dict):
            kind = "longrope" if scaling["rope_type"] in ("su", "yarn") else scaling["rope_type"]
            trained = given.get("original_max_position_embeddings", cls.original_max_position_embeddings)
            fields["rope_scaling"] = {**scaling, "rope_type": kind, "original_max_position_embeddings": trained}
        return fields


class Phi3Attention(Attention):
    """Attention with one linear for queries, keys and values."""

    def add_linears(self, config: Any) -> None:
        self.widths = [config.heads * config.head_width, *[config.kv_heads * config.head_width] * 2]
        self.qkv_proj = nn.Linear(config.hidden_size, sum(self.widths), bias=False)
        self.o_proj = nn.Linear(self.widths[0], config.hidden_size, bias=False)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (self.split(part) for part in self.qkv_proj(x).split(self.widths, dim=-1))
        return q, k, v


class Phi3MLP(nn.Module):
    """down_proj(up * act(gate)), gate and up from one linear."""

    def __init__(self, config: Any):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * self.act(gate))  # [B, T, C]


class Phi3Block(Block):
    attention_class = Phi3Attention
    mlp_class = Phi3MLP


class Phi3(Llama):
    """Llama with fused projections."""

    block = Phi3Block


TARGETS = {"lora": ("qkv_proj",), "ia3": ("qkv_proj", "down_proj"), "ia3_feedforward": ("down_proj",)}
Phi3.record = FAMILY = Family("phi3", Phi3Config, Phi3, TARGETS)
