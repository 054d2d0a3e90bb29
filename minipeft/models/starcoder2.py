"""StarCoder2 (Lozhkov et al. 2024): Llama with LayerNorm, biases everywhere and a plain MLP.

x = x + o_proj(attention(LayerNorm(x)))         x = x + c_proj(gelu_tanh(c_fc(LayerNorm(x))))
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
from minipeft.models.llama import Block, Llama


@dataclass(frozen=True)
class StarCoder2Config(LayeredConfig):
    """Llama's fields with StarCoder2's defaults and spelling; the window, if any, is on every layer."""

    vocab_size: int = count(49152)
    hidden_size: int = width(3072)
    intermediate_size: int = width(12288)
    num_hidden_layers: int = count(30)
    num_attention_heads: int = width(24)
    num_key_value_heads: int | None = width(2)
    hidden_act: str = option("gelu_pytorch_tanh", choices=ACTIVATIONS)
    max_position_embeddings: int = count(4096)
    rms_norm_eps: float = option(1e-5, above=0)
    attention_bias: bool = True
    initializer_range: float = 0.018042
    tie_word_embeddings: bool = True
    sliding_window: int | None = count(None)
    residual_dropout: float = dropout(0.0)
    embedding_dropout: float = dropout(0.0)

    model_type = "starcoder2"
    architecture = "Starcoder2ForCausalLM"
    spelling: ClassVar[Mapping[str, str]] = {"rms_norm_eps": "norm_epsilon", "attention_bias": "use_bias"}
    fixed: ClassVar[Mapping[str, object]] = {"mlp_bias": False, "layer_types": None}

    @property
    def plain_mlp_bias(self) -> bool:
        return self.attention_bias


class PlainMLP(nn.Module):
    """down(act(up(x))), the two linears under the family's names."""

    names = ("c_fc", "c_proj")

    def __init__(self, config: Any):
        super().__init__()
        up, down = self.names
        self.add_module(up, nn.Linear(config.hidden_size, config.intermediate_size, bias=config.plain_mlp_bias))
        self.add_module(down, nn.Linear(config.intermediate_size, config.hidden_size, bias=config.plain_mlp_bias))
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        up, down = (self.get_submodule(name) for name in self.names)
        y: Tensor = down(self.act(up(x)))  # [B, T, C]
        return y


class StarCoder2Block(Block):
    mlp_class = PlainMLP
    norm_class = nn.LayerNorm


class StarCoder2(Llama):
    """Llama with LayerNorm and a plain MLP."""

    block = StarCoder2Block


TARGETS = {"lora": ("q_proj", "v_proj"), "ia3": ("k_proj", "v_proj", "c_proj"), "ia3_feedforward": ("c_proj",)}
StarCoder2.record = FAMILY = Family("starcoder2", StarCoder2Config, StarCoder2, TARGETS)
