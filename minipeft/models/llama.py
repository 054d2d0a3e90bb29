"""Llama (Touvron et al. 2023): the decoder of the Llama and CodeLlama checkpoints, with Hugging Face's module names.

    x = x + o_proj(attention(q, k, v))     q, k rotated by their position; K <= H key/value heads (grouped queries)
    x = x + down_proj(silu(gate_proj(n)) * up_proj(n))        n = RMSNorm(x)
    logits = lm_head(norm(x))

Rotary positions (Su et al. 2021), in the half-split layout of Hugging Face's files: a head's first half holds the real
parts and its second half the imaginary parts of D/2 complex numbers; position p turns number i by p / theta^(2i/D).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.errors import InputError
from minipeft.models.attention import Cache, Layout, attend, lay_out, project, run_block
from minipeft.models.config import ACTIVATIONS, WIDEST, at_least, choice, divides, fraction, positive

Rotary = tuple[Tensor, Tensor]
ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of a Llama config.json that change what is computed; names and defaults are Hugging Face's."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: as many as attention heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # None, or {"rope_type": "linear" | "llama3", "factor": ..., ...}
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    model_type = "llama"
    architecture = "LlamaForCausalLM"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_hidden_layers", "max_position_embeddings"):
            at_least(self, name, 1)
        given = ("num_key_value_heads", "head_dim")
        optional = [name for name in given if getattr(self, name) is not None]
        for name in ("hidden_size", "intermediate_size", "num_attention_heads", *optional):
            at_least(self, name, 1, WIDEST)
        if self.head_dim is None:
            divides(self, "num_attention_heads", "hidden_size")
        if self.num_key_value_heads is not None:
            divides(self, "num_key_value_heads", "num_attention_heads")
        if self.head_width % 2:
            raise InputError(f"{self.head_width} must be even and >= 2: rotary positions turn pairs", where="head_dim")
        fraction(self, "attention_dropout")
        positive(self, "rms_norm_eps")
        positive(self, "rope_theta")
        choice(self, "hidden_act", ACTIVATIONS)
        check_rope(self.rope_scaling)

    @property
    def layers(self) -> int:
        return self.num_hidden_layers

    @property
    def width(self) -> int:
        return self.hidden_size

    @property
    def heads(self) -> int:
        return self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self) -> int:
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_attention_heads

    @property
    def context(self) -> int:
        return self.max_position_embeddings

    @staticmethod
    def from_json(given: Mapping[str, object]) -> dict[str, object]:
        """The fields of config.json, with rotary settings as transformers 4 or 5 writes them made one.

        4: rope_theta beside rope_scaling {"type" or "rope_type": ..., "factor": ...}
        5: rope_parameters {"rope_theta": ..., "rope_type": ..., "factor": ...}
        """
        fields = dict(given)
        rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise InputError(f"{rope!r} is not an object", where="rope_scaling")
        rope = dict(rope)
        fields["rope_theta"] = rope.pop("rope_theta", given.get("rope_theta", 10000.0))
        partial = rope.pop("partial_rotary_factor", given.get("partial_rotary_factor", 1.0))
        if partial not in (None, 1.0):
            raise InputError(f"{partial!r} is not supported (1.0)", where="partial_rotary_factor")
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        rope.pop("type", None)
        fields["rope_scaling"] = None if kind == "default" else {"rope_type": kind, **rope}
        return fields


def check_rope(scaling: dict | None) -> None:
    """Refuse a rotary scaling that is not one of ROPE_FIELDS, or that lacks a field or holds a wrong one."""
    if scaling is None:
        return
    kind = scaling.get("rope_type")
    if not isinstance(kind, str) or kind not in ROPE_FIELDS:
        raise InputError(f"rope type {kind!r} is not supported ({', '.join(ROPE_FIELDS)})", where="rope_scaling")
    for name in ROPE_FIELDS[kind]:
        value = scaling.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise InputError(f"{value!r} must be a finite number > 0", where=f"rope_scaling.{name}")
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise InputError("must be above low_freq_factor", where="rope_scaling.high_freq_factor")


def frequencies(config: LlamaConfig, device: torch.device) -> Tensor:
    """Angle per position of each of the D/2 pairs, theta^(-2i/D), stretched as `rope_scaling` asks. [D / 2], float32

    linear: all divided by factor (Chen et al. 2023). llama3 (Llama 3.1): wavelengths beyond the trained context are
    divided by factor, short ones are kept, those between are blended.
    """
    pairs = torch.arange(0, config.head_width, 2, dtype=torch.int64, device=device).float()
    turn = 1.0 / config.rope_theta ** (pairs / config.head_width)  # [D / 2]
    scaling = config.rope_scaling
    if scaling is None:
        return turn
    if scaling["rope_type"] == "linear":
        return turn / scaling["factor"]
    low, high, trained = (scaling[name] for name in ROPE_FIELDS["llama3"][1:])
    wavelength = 2 * math.pi / turn
    blend = ((trained / wavelength - low) / (high - low)).clamp(0, 1)  # 0: long waves, 1: short waves
    return (1 - blend) * turn / scaling["factor"] + blend * turn


def rotation(config: LlamaConfig, positions: Tensor, dtype: torch.dtype) -> Rotary:
    """Cosine and sine of each position's angles, both halves alike. [B, T] -> two of [B, 1, T, D]"""
    angles = positions[..., None].float() * frequencies(config, positions.device)  # [B, T, D / 2]
    angles = torch.cat([angles, angles], dim=-1)[:, None]  # [B, 1, T, D]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """(re + i im) * (cos + i sin), with re the first half of each head and im the second. [B, H, T, D] -> same"""
    cos, sin = rotary
    re, im = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-im, re], dim=-1) * sin


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019), the mean in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(x.dtype)  # [B, T, C]

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key/value heads."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_width = config.head_width
        self.dropout = config.attention_dropout
        bias, inner = config.attention_bias, config.heads * config.head_width
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, config.kv_heads * config.head_width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, config.kv_heads * config.head_width, bias=bias)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=bias)
        self.prefix: Any = None  # a slot for learned keys and values
        self.beside: Any = None  # a slot for what is added to the product: a gated prefix

    def forward(self, x: Tensor, layout: Layout, rotary: Rotary, cache: Cache | None) -> Tensor:
        projected = project(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p.unflatten(2, (-1, self.head_width)).transpose(1, 2) for p in projected)  # [B, H or K, T, D]
        q, k = rotate(q, rotary), rotate(k, rotary)
        if self.prefix is not None and layout.first:
            k, v = self.prefix(k, v)  # [B, K, P + T, D]
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # [B, K, S, D]
        y = attend(q, k, v, layout, dropout=self.dropout if self.training else 0.0)  # [B, T, H * D]
        if self.beside is not None:
            y = y + self.beside(q, None)
        return self.o_proj(y)  # [B, T, C]


class MLP(nn.Module):
    """down_proj(act(gate_proj(x)) * up_proj(x)) (SwiGLU, Shazeer 2020)"""

    def __init__(self, config: LlamaConfig):
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

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, layout: Layout, rotary: Rotary, cache: Cache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), layout, rotary, cache)  # [B, T, C]
        return x + self.mlp(self.post_attention_layernorm(x))  # [B, T, C]


class Llama(nn.Module):
    """The decoder with its language-model head. `prompt` and each attention's `prefix` are slots that adapters fill."""

    window: int | None = None  # Mistral's sliding window

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers)),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.source: str | None = None  # the folder or hub id that it was loaded from
        self.prompt: Any = None
        self.adapter: Any = None  # the config of what fills the slots; kept here, never read here
        self.virtual_tokens = 0  # columns that the prefix or the prompt takes
        self.windowed = False  # whether a sliding window hides them
        self.activation_checkpointing = False  # activation checkpointing, one block at a time
        self.tie()

    def tie(self) -> None:
        """Make head and embedding one Parameter, where the config says so; loading with assign=True parts them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embedding.weight

    @property
    def embedding(self) -> nn.Embedding:
        return self.model["embed_tokens"]  # type: ignore[return-value]

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model["layers"]  # type: ignore[return-value]

    def initialize(self, generator: torch.Generator) -> None:
        """Draw fresh weights: N(0, initializer_range), norms 1, biases 0."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "norm" in name:
                nn.init.ones_(p)
            else:
                nn.init.normal_(p, std=self.config.initializer_range, generator=generator)

    def new_cache(self, rows: int, length: int) -> Cache:
        """A decode cache for `rows` rows of `length` tokens, with room for the learned columns."""
        c, weight = self.config, self.embedding.weight
        return Cache(
            c.layers, rows, c.kv_heads, length + self.virtual_tokens, c.head_width, weight.dtype, weight.device
        )

    def hidden(self, ids: Tensor, documents: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """ids [B, T] -> what the head reads [B, T, C]; `documents` [B, T] as in attention.py.

        Raises:
            InputError: documents do not fit the ids, or the cache has no room.
        """
        layout = lay_out(
            documents,
            ids,
            cache,
            virtual_tokens=self.virtual_tokens,
            prompted=self.prompt is not None,
            window=self.window,
            windowed=self.windowed,
            dtype=self.embedding.weight.dtype,
        )
        x = self.embedding(ids)  # [B, T, C]
        if self.prompt is not None and layout.first:
            x = self.prompt(x)  # [B, P + T, C]
        rotary = rotation(self.config, layout.positions, x.dtype)
        for block in self.blocks:
            x = run_block(block, self.activation_checkpointing and self.training, x, layout, rotary, cache)
        return self.model["norm"](x[:, -ids.shape[1] :])  # [B, T, C]

    def forward(self, ids: Tensor, documents: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """ids [B, T] -> logits [B, T, V] of the next token."""
        return self.lm_head(self.hidden(ids, documents, cache))
