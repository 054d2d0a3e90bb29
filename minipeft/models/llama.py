"""Llama (Touvron et al. 2023): the decoder of the Llama and CodeLlama checkpoints, with Hugging Face's module names.

    x = x + o_proj(attention(q, k, v))     q, k rotated by their position; K <= H key/value heads (grouped queries)
    x = x + down_proj(silu(gate_proj(n)) * up_proj(n))        n = RMSNorm(x)
    logits = lm_head(norm(x))

Many families are variants of Llama. Such a family's file subclasses what differs:

    LlamaConfig   its fields; `spelling`, `fixed`; the settings of a block: `window`, `rope`, `attention_scale` ...
    Attention     `heads` (computes q, k, v) and `output`         Block   the norms and their places
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.errors import InputError, check_fields, format_value, option
from minipeft.models.attention import attend, project
from minipeft.models.cache import Cache
from minipeft.models.config import ACTIVATIONS, alias, check_divides, count, dropout, width
from minipeft.models.decoder import Decoder
from minipeft.models.family import Family
from minipeft.models.layout import Layout, Rotary
from minipeft.models.rotary import Rope, check_rope, make_rotation, rotate


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of a Llama config.json that change the computation; names and defaults are Hugging Face's."""

    vocab_size: int = count(32000)
    hidden_size: int = width(4096)
    intermediate_size: int = width(11008)
    num_hidden_layers: int = count(32)
    num_attention_heads: int = width(32)
    num_key_value_heads: int | None = width(None)  # None: as many as attention heads
    head_dim: int | None = width(None)  # None: hidden_size / num_attention_heads
    hidden_act: str = option("silu", choices=ACTIVATIONS)
    max_position_embeddings: int = count(2048)
    rms_norm_eps: float = option(1e-6, above=0)
    rope_theta: float = option(10000.0, above=0)
    rope_scaling: dict | None = None  # None, or {"rope_type": "linear" | ..., "factor": ..., ...} as in rotary.py
    attention_bias: bool = False
    attention_dropout: float = dropout(0.0)
    mlp_bias: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    model_type = "llama"
    architecture = "LlamaForCausalLM"
    spelling: ClassVar[Mapping[str, str]] = {}  # field -> its key in the family's config.json, where that differs
    fixed: ClassVar[Mapping[str, object]] = {}  # fields that the family's config.json cannot set

    # The settings of a block: constants here, fields or properties in the families that differ.
    attention_scale = None  # of the scores; None: head_width ** -0.5
    attention_cap = None  # c of c tanh(score / c)
    residual_dropout = 0.0  # factor of both residual branches
    embedding_dropout = 0.0
    partial_rotary_factor = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.head_dim is None:
            check_divides(self, "num_attention_heads", "hidden_size")
        if self.num_key_value_heads is not None:
            check_divides(self, "num_key_value_heads", "num_attention_heads")
        for rope in self.ropes().values():
            check_rope(rope, self.head_width)

    layers = alias("num_hidden_layers")
    width = alias("hidden_size")
    heads = alias("num_attention_heads")

    @property
    def context(self) -> int:
        """The largest number of positions; LongRoPE's short factors hold within the pretraining context."""
        if self.rope_scaling is not None and self.rope_scaling["rope_type"] == "longrope":
            return int(min(self.max_position_embeddings, self.rope_scaling["original_max_position_embeddings"]))
        return self.max_position_embeddings

    @property
    def output_bias(self) -> bool:
        """Whether attention's output projection has a bias."""
        return self.attention_bias

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self) -> int:
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_attention_heads

    def window(self, layer: int) -> int | None:
        """A block's sliding window in tokens, the query's own included; None: no window."""
        return None

    def rope(self, layer: int) -> str | None:
        """The name of a block's rotary setting, one of `ropes`; None: no rotary embedding."""
        return "default"

    def ropes(self) -> dict[str, Rope]:
        """The distinct rotary settings of the blocks, by name."""
        scaling, part = self.rope_scaling, self.partial_rotary_factor
        return {"default": Rope(float(self.rope_theta), self.max_position_embeddings, scaling, part)}

    @classmethod
    def from_json(cls, given: Mapping[str, object]) -> dict[str, object]:
        """Select the fields of config.json; the rotary settings of transformers 4 and 5 become one.

        4: rope_theta beside rope_scaling {"type" or "rope_type": ..., "factor": ...}
        5: rope_parameters {"rope_theta": ..., "rope_type": ..., "factor": ...}
        """
        fields = dict(given)
        for name, key in cls.spelling.items():
            fields.pop(name, None)
            if given.get(key) is not None:
                fields[name] = given[key]
        check_spellings(given)
        rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise InputError(f"{rope!r} is not an object", where="rope_scaling")
        rope = dict(rope)
        fields["rope_theta"] = rope.pop("rope_theta", fields.get("rope_theta", cls.rope_theta))
        partial = rope.pop("partial_rotary_factor", fields.get("partial_rotary_factor", cls.partial_rotary_factor))
        fields["partial_rotary_factor"] = cls.partial_rotary_factor if partial is None else partial
        if partial not in (None, 1.0) and "partial_rotary_factor" not in cls.__dataclass_fields__:
            raise InputError(f"{partial!r} is not supported (1.0)", where="partial_rotary_factor")
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        rope.pop("type", None)
        fields["rope_scaling"] = None if kind == "default" else {"rope_type": kind, **rope}
        return {**fields, **cls.fixed}

    def to_json(self) -> dict[str, object]:
        """The fields under config.json's keys, with rotary settings for both transformers 4 and 5."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in self.fixed]
        fields = {self.spelling.get(name, name): getattr(self, name) for name in names}
        made = {"num_key_value_heads": self.kv_heads, "head_dim": self.head_width}
        fields |= {name: value for name, value in made.items() if name not in self.fixed}
        rope = {"rope_theta": self.rope_theta, **(self.rope_scaling or {"rope_type": "default"})}
        if "partial_rotary_factor" in names:
            rope["partial_rotary_factor"] = self.partial_rotary_factor
        return {**fields, "rope_parameters": rope}


def check_spellings(given: Mapping[str, object]) -> None:
    """Refuse rotary settings that are given twice and disagree: two readers may choose differently.

    Raises:
        InputError: names the entry and both values.
    """
    new, old = given.get("rope_parameters"), given.get("rope_scaling")
    for where, rope in (("rope_parameters", new), ("rope_scaling", old)):
        named = {name: rope[name] for name in ("rope_type", "type") if name in rope} if isinstance(rope, dict) else {}
        if len(named) == 2 and named["rope_type"] != named["type"]:
            both = f"rope_type {format_value(named['rope_type'])} and type {format_value(named['type'])}"
            problem = f"{both} contradict each other"
            raise InputError(problem, where=where, hint="Remove the one that is wrong")
    if not (isinstance(new, dict) and new and isinstance(old, dict) and old):
        return
    of = lambda rope, name: rope.get(name, rope.get("type", "default") if name == "rope_type" else None)
    for name in ["rope_type", *sorted(set(new) & set(old) - {"type", "rope_type"})]:
        if of(new, name) != of(old, name):
            problem = f"{of(old, name)!r}, but rope_parameters has {of(new, name)!r}"
            raise InputError(problem, where=f"rope_scaling.{name}", hint="Remove the one that is wrong")


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019), the mean in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * self.scale(x).to(x.dtype)  # [B, T, C]

    def scale(self, x: Tensor) -> Tensor:
        """x / sqrt(mean(x^2) + eps), in float32."""
        wide = x.float()
        return wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key/value heads."""

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.layer, self.window, self.rope = layer, config.window(layer), config.rope(layer)
        self.head_width, self.scale, self.cap = config.head_width, config.attention_scale, config.attention_cap
        self.dropout = config.attention_dropout
        self.add_linears(config)
        self.prefix: Any = None  # slot for keys and values before the row's own
        self.beside: Any = None  # slot for an output added to attention's: a gated prefix

    def add_linears(self, config: Any) -> None:
        bias, inner = config.attention_bias, config.heads * config.head_width
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, config.kv_heads * config.head_width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, config.kv_heads * config.head_width, bias=bias)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=config.output_bias)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values before rotary. [B, T, C] -> [B, H, T, D] and two of [B, K, T, D]"""
        q, k, v = (self.split(p) for p in project(x, self.q_proj, self.k_proj, self.v_proj))
        return q, k, v

    def split(self, projected: Tensor) -> Tensor:
        """[B, T, H * D] -> [B, H, T, D]"""
        return projected.unflatten(2, (-1, self.head_width)).transpose(1, 2)

    def output(self, y: Tensor) -> Tensor:
        """[B, T, H * D] -> [B, T, C]"""
        return self.o_proj(y)

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None) -> Tensor:
        q, k, v = self.heads(x)  # [B, H or K, T, D]
        if self.rope is not None:
            rotary = layout.rotations[self.rope]
            q, k = rotate(q, rotary), rotate(k, rotary)
        if self.prefix is not None and layout.first:
            k, v = self.prefix(k, v)  # [B, K, P + T, D]
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # [B, K, S, D]
        dropout = self.dropout if self.training else 0.0
        y = attend(
            q, k, v, layout, window=self.window, dropout=dropout, scale=self.scale, cap=self.cap
        )  # [B, T, H * D]
        if self.beside is not None:
            y = y + self.beside(q, self.scale, self.cap)
        return self.output(y)  # [B, T, C]


class MLP(nn.Module):
    """down_proj(act(gate_proj(x)) * up_proj(x)) (SwiGLU, Shazeer 2020)"""

    def __init__(self, config: Any):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = project(x, self.gate_proj, self.up_proj)
        return self.down_proj(self.act(gate) * up)  # [B, T, C]


class Block(nn.Module):
    """One pre-norm residual block."""

    attention_class: type[nn.Module] = Attention
    mlp_class: type[nn.Module] = MLP
    norm_class: type[nn.Module] = RMSNorm
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.self_attn = self.attention_class(config, layer)
        self.mlp = self.mlp_class(config)
        for name in self.norms:
            self.add_module(name, self.norm_class(config.hidden_size, config.rms_norm_eps))
        self.dropout = config.residual_dropout

    def drop(self, y: Tensor) -> Tensor:
        return F.dropout(y, self.dropout) if self.dropout and self.training else y

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None) -> Tensor:
        x = x + self.drop(self.self_attn(self.input_layernorm(x), layout, cache))  # [B, T, C]
        return x + self.drop(self.mlp(self.post_attention_layernorm(x)))  # [B, T, C]


class Llama(Decoder):
    """Llama with its language-model head; also the base of the families that differ in their blocks."""

    record: Family
    block: type[Block] = Block
    norm_init = 1.0  # of a norm's weight

    def __init__(self, config: Any):
        super().__init__(config)
        embedding, blocks, norm = (
            path.split(".") for path in (self.family.embedding, self.family.blocks, self.family.norm)
        )
        parts = {
            embedding[1]: nn.Embedding(config.vocab_size, config.hidden_size),
            blocks[1]: nn.ModuleList(self.block(config, layer) for layer in range(config.num_hidden_layers)),
            norm[1]: self.block.norm_class(config.hidden_size, config.rms_norm_eps),
        }
        self.add_module(embedding[0], nn.ModuleDict(parts))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    @property
    def family(self) -> Family:
        return type(self).record

    def initialize(self, generator: torch.Generator) -> None:
        """Initialize the weights: N(0, initializer_range), norms 1, biases 0."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "norm" in name:
                nn.init.constant_(p, self.norm_init)
            else:
                nn.init.normal_(p, std=self.config.initializer_range, generator=generator)

    def check(self, layout: Layout) -> None:
        """Refuse positions from which LongRoPE would use other frequencies than for the keys already cached."""
        if self.config.context < self.config.max_position_embeddings:
            self.check_longest(layout, self.config.context, "original_max_position_embeddings")

    def embed(self, ids: Tensor, layout: Layout) -> Tensor:
        x, dropout = super().embed(ids, layout), self.config.embedding_dropout
        return F.dropout(x, dropout) if dropout and self.training else x

    def rotations(self, positions: Tensor, dtype: torch.dtype) -> dict[str, Rotary]:
        """The rotary tables, one for each distinct setting."""
        width = self.config.head_width
        return {name: make_rotation(rope, width, positions, dtype) for name, rope in self.config.ropes().items()}


TARGETS = {"lora": ("q_proj", "v_proj"), "ia3": ("k_proj", "v_proj", "down_proj"), "ia3_feedforward": ("down_proj",)}
Llama.record = FAMILY = Family("llama", LlamaConfig, Llama, TARGETS)
