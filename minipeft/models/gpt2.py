"""GPT-2 (Radford et al. 2019): the decoder of the GPT-2 and CodeGPT checkpoints, with Hugging Face's module names.

    x = wte[ids] + wpe[positions]                      learned positions
    x = x + attn(ln_1(x));  x = x + mlp(ln_2(x))       pre-norm residual blocks
    logits = lm_head(ln_f(x))                          the head is usually the embedding itself (tied)

Hugging Face keeps the four linears of a block transposed ("Conv1D"); they are turned once at load (`TRANSPOSED`), so
that every linear here is an nn.Linear with weight [out, in].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.errors import InputError
from minipeft.models.attention import Cache, Layout, attend, lay_out, run_block
from minipeft.models.config import ACTIVATIONS, WIDEST, at_least, choice, fraction, positive

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


@dataclass(frozen=True)
class GPT2Config:
    """The fields of a GPT-2 config.json that change what is computed; names and defaults are Hugging Face's."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # None: 4 * n_embd
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    model_type = "gpt2"
    architecture = "GPT2LMHeadModel"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_layer"):
            at_least(self, name, 1)
        for name in ("n_embd", "n_head", *(["n_inner"] if self.n_inner is not None else [])):
            at_least(self, name, 1, WIDEST)
        if self.n_embd % self.n_head:
            raise InputError(f"{self.n_head} does not divide n_embd {self.n_embd}", where="n_head")
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            fraction(self, name)
        positive(self, "layer_norm_epsilon")
        choice(self, "activation_function", ACTIVATIONS)

    # What generation, planning and adapters ask of any family.
    @property
    def layers(self) -> int:
        return self.n_layer

    @property
    def width(self) -> int:
        return self.n_embd

    @property
    def heads(self) -> int:
        return self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_head

    @property
    def head_width(self) -> int:
        return self.n_embd // self.n_head

    @property
    def context(self) -> int:
        return self.n_positions

    @staticmethod
    def from_json(given: Mapping[str, object]) -> dict[str, object]:
        """The fields of config.json that are this class's; refuses those whose effect is not implemented."""
        for name in ("reorder_and_upcast_attn", "add_cross_attention"):
            if given.get(name):
                raise InputError("true is not supported", where=name)
        return dict(given)


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
        self.prefix: Any = None  # a slot for learned keys and values
        self.beside: Any = None  # a slot for what is added to the product: a gated prefix

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
            y = y + self.beside(q, self.scale)
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


class GPT2(nn.Module):
    """The decoder with its language-model head. `prompt` and each attention's `prefix` are slots that adapters fill."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
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
        self.source: str | None = None  # the folder or hub id that it was loaded from
        self.prompt: Any = None
        self.adapter: Any = None  # the config of what fills the slots; kept here, never read here
        self.virtual_tokens = 0  # columns that the prefix or the prompt takes
        self.windowed = False
        self.activation_checkpointing = False  # activation checkpointing, one block at a time
        self.tie()

    def tie(self) -> None:
        """Make head and embedding one Parameter, where the config says so; loading with assign=True parts them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embedding.weight

    @property
    def embedding(self) -> nn.Embedding:
        return self.transformer["wte"]  # type: ignore[return-value]

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer["h"]  # type: ignore[return-value]

    def initialize(self, generator: torch.Generator) -> None:
        """Draw fresh weights as GPT-2 did: N(0, 0.02), the residual projections divided by sqrt(2 * layers)."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif ".ln_" in name:
                nn.init.ones_(p)
            else:
                shrink = (2 * self.config.n_layer) ** -0.5 if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(p, std=self.config.initializer_range * shrink, generator=generator)

    def new_cache(self, rows: int, length: int) -> Cache:
        """A decode cache for `rows` rows of `length` tokens, with room for the learned columns."""
        c, weight = self.config, self.embedding.weight
        return Cache(c.n_layer, rows, c.n_head, length + self.virtual_tokens, c.head_width, weight.dtype, weight.device)

    def hidden(self, ids: Tensor, documents: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """ids [B, T] -> what the head reads [B, T, C]; `documents` [B, T] as in attention.py.

        Raises:
            InputError: a position lies beyond the table of n_positions, or documents do not fit the ids.
        """
        layout = lay_out(
            documents,
            ids,
            cache,
            virtual_tokens=self.virtual_tokens,
            prompted=self.prompt is not None,
            dtype=self.embedding.weight.dtype,
        )
        self.check_positions(layout)
        x = self.embedding(ids)  # [B, T, C]
        if self.prompt is not None and layout.first:
            x = self.prompt(x)  # [B, P + T, C]
        x = self.transformer["drop"](x + self.transformer["wpe"](layout.positions))  # [B, P + T, C]
        for block in self.blocks:
            x = run_block(block, self.activation_checkpointing and self.training, x, layout, cache)
        return self.transformer["ln_f"](x[:, -ids.shape[1] :])  # [B, T, C]

    def check_positions(self, layout: Layout) -> None:
        """Refuse a position beyond the table. Looked up on the device only when the row is long enough to overrun."""
        if layout.positions.is_meta:
            return  # there are no values to look at
        limit = self.config.n_positions
        columns = layout.positions.shape[1] if layout.mask is None else layout.mask.shape[-1]
        if columns + self.virtual_tokens > limit and int(layout.positions.max()) >= limit:
            raise InputError(
                f"the longest reaches position {int(layout.positions.max())}, but this model has n_positions={limit}"
                + (f", of which the adapter takes {self.virtual_tokens}" if self.virtual_tokens else ""),
                where="documents",
                hint=f"cut each document to {limit - self.virtual_tokens} tokens",
            )

    def forward(self, ids: Tensor, documents: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """ids [B, T] -> logits [B, T, V] of the next token."""
        return self.lm_head(self.hidden(ids, documents, cache))
