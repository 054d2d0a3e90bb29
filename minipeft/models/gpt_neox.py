"""GPT-NeoX (Black et al. 2022) and Pythia (Biderman et al. 2023): attention and MLP side by side, each with its norm.

    x = x + dense(attention(ln_1(x))) + dense_4h_to_h(gelu(dense_h_to_4h(ln_2(x))))

One linear computes q, k and v, laid out head by head: [q_0 k_0 v_0 q_1 k_1 v_1 ...]. Rotary embeddings rotate the first
quarter of each head. The files name the LM head embed_out.
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
class GPTNeoXConfig(LlamaConfig):
    """Llama's fields with GPT-NeoX's defaults and spelling."""

    vocab_size: int = count(50432)
    hidden_size: int = width(6144)
    intermediate_size: int = width(24576)
    num_hidden_layers: int = count(44)
    num_attention_heads: int = width(64)
    hidden_act: str = option("gelu", choices=ACTIVATIONS)
    rms_norm_eps: float = option(1e-5, above=0)
    attention_bias: bool = True
    partial_rotary_factor: float = option(0.25, above=0, most=1)
    use_parallel_residual: bool = True
    residual_dropout: float = dropout(0.0)

    model_type = "gpt_neox"
    architecture = "GPTNeoXForCausalLM"
    spelling: ClassVar[Mapping[str, str]] = {
        "rms_norm_eps": "layer_norm_eps", "rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct",
        "residual_dropout": "hidden_dropout",
    }  # fmt: skip
    fixed: ClassVar[Mapping[str, object]] = {"mlp_bias": False, "head_dim": None, "num_key_value_heads": None}
    plain_mlp_bias = True

    @property
    def embedding_dropout(self) -> float:  # type: ignore[override]
        return self.residual_dropout


class NeoXAttention(Attention):
    """Attention with one linear for queries, keys and values."""

    def add_linears(self, config: Any) -> None:
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.attention_bias)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.query_key_value(x).unflatten(2, (-1, 3, self.head_width))  # [B, T, H, 3, D]
        q, k, v = qkv.permute(3, 0, 2, 1, 4).unbind()  # each [B, H, T, D]
        return q, k, v

    def output(self, y: Tensor) -> Tensor:
        return self.dense(y)


class NeoXMLP(PlainMLP):
    names = ("dense_h_to_4h", "dense_4h_to_h")


class NeoXBlock(Block):
    """Attention and MLP side by side, or one after the other."""

    attention_class = NeoXAttention
    mlp_class = NeoXMLP
    norm_class = nn.LayerNorm

    def __init__(self, config: Any, layer: int):
        super().__init__(config, layer)
        self.attention = self.self_attn
        del self.self_attn
        self.parallel = config.use_parallel_residual

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None) -> Tensor:
        heard = self.drop(self.attention(self.input_layernorm(x), layout, cache))  # [B, T, C]
        if not self.parallel:
            heard = heard + x
        y = self.drop(self.mlp(self.post_attention_layernorm(x if self.parallel else heard))) + heard  # [B, T, C]
        return y + x if self.parallel else y


class GPTNeoX(Llama):
    """Parallel blocks with fused projections."""

    block = NeoXBlock


GPTNeoX.record = FAMILY = Family(
    name="gpt_neox",
    config=GPTNeoXConfig,
    decoder=GPTNeoX,
    default_targets={"lora": ("query_key_value",), "ia3": ("query_key_value", "dense_4h_to_h"),
                     "ia3_feedforward": ("dense_4h_to_h",)},
    embedding="gpt_neox.embed_in",
    blocks="gpt_neox.layers",
    norm="gpt_neox.final_layer_norm",
    buffers=(".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
    renamed={"embed_out.weight": "lm_head.weight"},
)  # fmt: skip
