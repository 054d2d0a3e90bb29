"""GPT-2 (Radford et al. 2019): the decoder of the GPT-2 and CodeGPT checkpoints, with Hugging Face's module names.

    x = wte[ids] + wpe[positions]                      learned positions
    x = x + attn(ln_1(x));  x = x + mlp(ln_2(x))       pre-norm residual blocks
    logits = lm_head(ln_f(x))                          the head is usually the embedding itself (tied)

Hugging Face's files hold the four linears of a block transposed ("Conv1D"); they are transposed once at load
(`FAMILY.transposed`), so that every linear here is an nn.Linear with weight [out, in].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.errors import InputError, check_fields, option
from minipeft.models.attention import attend
from minipeft.models.cache import Cache
from minipeft.models.config import ACTIVATIONS, alias, check_divides, count, dropout, width
from minipeft.models.decoder import Decoder
from minipeft.models.family import Family
from minipeft.models.layout import Layout


@dataclass(frozen=True)
class GPT2Config:
    """The fields of a GPT-2 config.json that change the computation; names and defaults are Hugging Face's."""

    vocab_size: int = count(50257)
    n_positions: int = count(1024)
    n_embd: int = width(768)
    n_layer: int = count(12)
    n_head: int = width(12)
    n_inner: int | None = width(None)  # None: 4 * n_embd
    activation_function: str = option("gelu_new", choices=ACTIVATIONS)
    resid_pdrop: float = dropout(0.1)
    embd_pdrop: float = dropout(0.1)
    attn_pdrop: float = dropout(0.1)
    layer_norm_epsilon: float = option(1e-5, above=0)
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    model_type = "gpt2"
    architecture = "GPT2LMHeadModel"

    def __post_init__(self) -> None:
        check_fields(self)
        check_divides(self, "n_head", "n_embd")

    # the properties that generation, planning and adapters read from any family
    layers = alias("n_layer")
    width = alias("n_embd")
    heads = alias("n_head")
    kv_heads = alias("n_head")
    context = alias("n_positions")

    @property
    def head_width(self) -> int:
        return self.n_embd // self.n_head

    def window(self, layer: int) -> int | None:
        return None

    @staticmethod
    def from_json(given: Mapping[str, object]) -> dict[str, object]:
        """Select this class's fields from config.json; a field whose effect is not implemented is refused.

        reorder_and_upcast_attn (scores in float32) changes rounding alone: the error of the product here is smaller.
        """
        if given.get("add_cross_attention"):
            raise InputError("true is not supported", where="add_cross_attention")
        return dict(given)

    def to_json(self) -> dict[str, object]:
        """The fields as config.json has them."""
        return dict(vars(self))


class Attention(nn.Module):
    """Causal self-attention, all three projections in one linear."""

    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        self.layer = layer
        self.heads = config.n_head
        self.dropout = config.attn_pdrop
        width = config.head_width if config.scale_attn_weights else 1
        self.scale = width**-0.5 / (layer + 1 if config.scale_attn_by_inverse_layer_idx else 1)
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)
        self.prefix: Any = None  # slot for keys and values before the row's own
        self.beside: Any = None  # slot for an output added to attention's: a gated prefix

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None) -> Tensor:
        qkv = self.c_attn(x).unflatten(2, (3, self.heads, -1))  # [B, T, 3, H, D]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # each [B, H, T, D]
        if self.prefix is not None and layout.first:
            k, v = self.prefix(k, v)  # [B, H, P + T, D]
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # [B, H, S, D]
        dropout = self.dropout if self.training else 0.0
        y = attend(q, k, v, layout, dropout=dropout, scale=self.scale)  # [B, T, C]
        if self.beside is not None:
            y = y + self.beside(q, self.scale, None)
        return self.resid_dropout(self.c_proj(y))  # [B, T, C]


class MLP(nn.Module):
    """c_proj(act(c_fc(x)))"""

    def __init__(self, config: GPT2Config):
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, inner)
        self.c_proj = nn.Linear(inner, config.n_embd)
        self.act = ACTIVATIONS[config.activation_function]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))  # [B, T, C]


class Block(nn.Module):
    """One pre-norm residual block."""

    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), layout, cache)  # [B, T, C]
        return x + self.mlp(self.ln_2(x))  # [B, T, C]


class GPT2(Decoder):
    """GPT-2 with its language-model head."""

    def __init__(self, config: GPT2Config):
        super().__init__(config)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.n_positions, config.n_embd),
                "drop": nn.Dropout(config.embd_pdrop),
                "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie()

    @property
    def family(self) -> Family:
        return FAMILY

    def initialize(self, generator: torch.Generator) -> None:
        """Initialize as GPT-2: N(0, 0.02), the residual projections divided by sqrt(2 * layers)."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif ".ln_" in name:
                nn.init.ones_(p)
            else:
                shrink = (2 * self.config.n_layer) ** -0.5 if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(p, std=self.config.initializer_range * shrink, generator=generator)

    def embed(self, ids: Tensor, layout: Layout) -> Tensor:
        """The prompt, then wte[ids]; plus wpe[positions], with dropout. [B, T] -> [B, T or P + T, C]"""
        x = super().embed(ids, layout) + self.transformer["wpe"](layout.positions)  # [B, T or P + T, C]
        return self.transformer["drop"](x)

    def check(self, layout: Layout) -> None:
        """Refuse a position beyond the position table."""
        self.check_longest(layout, self.config.n_positions, "n_positions")


FAMILY = Family(
    name="gpt2",
    config=GPT2Config,
    decoder=GPT2,
    default_targets={"lora": ("c_attn",), "ia3": ("c_attn", "mlp.c_proj"), "ia3_feedforward": ("mlp.c_proj",)},
    embedding="transformer.wte",
    blocks="transformer.h",
    norm="transformer.ln_f",
    layers_field="n_layer",
    transposed=("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"),
    optional_prefix="transformer.",
    buffers=(".attn.bias", ".attn.masked_bias"),
)
