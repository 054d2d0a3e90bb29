"""Prefix-tuning: trained keys and values in front of every attention (Li & Liang 2021).

    k, v = [prefix_k ; k], [prefix_v ; v]          in each layer, of P virtual tokens that every token may see

They are stored as in the decode cache (after rotary), one [K, P, D] per layer and K key/value heads. Initialized with
noise, P virtual tokens take most of the softmax mass from the text: a real 135M model's loss rises from 3.3 to 10.9
nats. Zero keys cost loss too: such a key has weight exp(0) in every softmax. Initialized with the keys and values of
real tokens (the default, "text"), the model starts exactly as if that text stood before the input.

With a gate (Zhang et al. 2023, LLaMA-Adapter) the text keeps its own softmax, and the prefix has a second one:

    y = softmax(q k^T) v + tanh(g) softmax(q prefix_k^T) prefix_v          g [H], one per head, 0 at first

so that nothing changes at step 0, and no position is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.adapters.method import Encoder, Recipe
from minipeft.adapters.reparam import Reparam, make_hidden
from minipeft.adapters.trainable import TrainableModule, check_trained_memory
from minipeft.adapters.virtual import (
    TASK_LINE,
    check_virtual_tokens,
    empty_slot,
    encode_text,
    encode_to_length,
    run_text,
)
from minipeft.errors import InputError, check_fields, option
from minipeft.models import Decoder
from minipeft.models.attention import product


@dataclass(frozen=True)
class PrefixConfig:
    """Number, init and parameterization of the virtual tokens.

    init: "text" (keys and values of `text`, repeated or cut to `length` tokens), "normal" (keys with the standard
    deviation of those of `text`, values 0), "peft" (N(0, 1), HF PEFT's default, for comparison).
    """

    length: int = option(20, "virtual tokens before each row", flag="virtual-tokens", least=1, limit=2**20)
    init: str = option("text", "initialization of the virtual tokens", choices=("text", "normal", "peft"))
    text: str = option(TASK_LINE, "text of the text init")
    reparam: int | None = option(None, "width of a reparameterization MLP", flag="reparam-width", least=1, limit=2**20)
    gate: bool = option(False, "add the prefix beside the text's attention, through a gate that starts at 0")
    freeze_first: bool = option(False, "keep the first virtual token, the attention sink, at its init")
    windowed: bool = option(False, "let a sliding window hide the virtual tokens, as HF does")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.freeze_first and self.length < 2:
            raise InputError("leaves nothing to train of a single virtual token", where="freeze_first")
        if self.gate and self.windowed:
            raise InputError("a gated prefix has its own softmax and no window", where="windowed")


class Prefix(TrainableModule):
    """One attention's trained keys and values.

    With an MLP, `key` and `value` are their fixed init; with `first` they exclude the first, fixed virtual token.
    """

    key: Tensor
    value: Tensor
    first: Tensor | None

    def __init__(self, key: Tensor, value: Tensor, mlp: Reparam | None = None, first: Tensor | None = None):
        super().__init__()
        self.mlp = mlp
        if mlp is None:
            self.key, self.value = nn.Parameter(key), nn.Parameter(value)  # [K, P, D], twice
        else:
            self.register_buffer("key", key)  # [K, P, D]
            self.register_buffer("value", value)  # [K, P, D]
        self.register_buffer("first", first)  # [2, K, 1, D]

    def key_value(self) -> tuple[Tensor, Tensor]:
        """Keys and values, two of [K, P, D]: with the MLP's output added, and the frozen first token put back."""
        key, value = self.key, self.value
        if self.mlp is not None:
            heads, length, width = key.shape
            added = self.mlp().view(length, 2, heads, width).permute(1, 2, 0, 3)  # [2, K, P, D]
            key, value = key + added[0], value + added[1]
        if self.first is not None:
            key, value = torch.cat([self.first[0], key], dim=1), torch.cat([self.first[1], value], dim=1)
        return key, value

    @torch.no_grad()
    def assign(self, key: Tensor, value: Tensor) -> None:
        """Set keys and values, two of [K, P, D], of a prefix without MLP."""
        assert self.mlp is None
        if self.first is not None:
            self.first.copy_(torch.stack([key[:, :1], value[:, :1]]))
            key, value = key[:, 1:], value[:, 1:]
        self.key.copy_(key)
        self.value.copy_(value)

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """[B, K, T, D] -> [B, K, P + T, D], twice"""
        key, value = (p.to(k.dtype).expand(k.shape[0], -1, -1, -1) for p in self.key_value())  # [B, K, P, D]
        return torch.cat([key, k], dim=2), torch.cat([value, v], dim=2)

    def extra_repr(self) -> str:
        heads, length, width = self.key.shape
        return f"kv_heads={heads}, virtual_tokens={length + (self.first is not None)}, head_width={width}"


class GatedPrefix(TrainableModule):
    """tanh(g) softmax(q prefix_k^T) prefix_v, added to the attention's output; 0 at first."""

    def __init__(self, prefix: Prefix, heads: int):
        super().__init__()
        self.prefix = prefix
        self.gate = nn.Parameter(torch.zeros(heads, device=prefix.key.device))  # g [H]

    def forward(self, q: Tensor, scale: float | None, cap: float | None = None) -> Tensor:
        """q [B, H, T, D], after rotary -> [B, T, H * D]"""
        k, v = (p.to(q.dtype).expand(q.shape[0], -1, -1, -1) for p in self.prefix.key_value())  # [B, K, P, D]
        y = product(q, k, v, None, False, 0.0, scale, cap)  # [B, H, T, D]
        y = y * torch.tanh(self.gate).to(y.dtype)[:, None, None]
        return y.transpose(1, 2).flatten(2)  # [B, T, H * D]


def make_initial_key_value(
    model: Decoder, config: PrefixConfig, tokenizer: Encoder | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Make the prefix's initial keys and values, two of [L, K, P, D] in float32.

    Raises:
        InputError: "text" or "normal" without a tokenizer, or with a text that is too short to measure.
    """
    c = model.config
    shape = (c.layers, c.kv_heads, config.length, c.head_width)
    if config.init == "peft":
        if config.reparam is not None:  # the MLP has a random last layer, and computes them alone
            return torch.zeros(shape), torch.zeros(shape)
        return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    if config.init == "text":
        keys, values = run_text(
            model, encode_to_length(config.text, config.length, tokenizer, "prefix"), config.windowed
        )
        return keys.float(), values.float()
    ids = encode_text(config.text, tokenizer, "prefix")
    if len(set(ids)) < 2:
        raise InputError(f"{config.text!r} has no two tokens to measure a spread from", where="text")
    spread = [(t.float().mean(dim=2, keepdim=True), t.float().std(dim=2, keepdim=True)) for t in run_text(model, ids)]
    drawn = [mean + std * torch.randn(shape, generator=generator).to(mean.device) for mean, std in spread]
    # values 0 add nothing to the output; with a zero gate too, both would have zero gradients for ever
    return drawn[0], drawn[1] if config.gate else torch.zeros_like(drawn[1])


def add_prefix(
    model: Decoder, config: PrefixConfig, tokenizer: Encoder | None, generator: torch.Generator
) -> list[str]:
    """Fill each attention's slot; returns the paths of the modules."""
    device, c = model.embedding.weight.device, model.config
    if not config.gate:  # a gated prefix takes no positions
        check_virtual_tokens(config.length, c.context)
    if device.type == "meta":
        keys = values = torch.empty(c.layers, c.kv_heads, config.length, c.head_width, device=device)
    else:
        keys, values = (t.to(device) for t in make_initial_key_value(model, config, tokenizer, generator))
    fixed = int(config.freeze_first)
    hidden, outputs = None, 2 * c.layers * c.kv_heads * c.head_width
    check_trained_memory(config.length * outputs, device, "length")
    if config.reparam is not None:
        hidden = make_hidden(config.length - fixed, c.width, config.reparam, outputs, device, generator)
    for attention, key, value in zip(list_attentions(model), keys, values):
        mlp = None if hidden is None else Reparam(hidden, 2 * c.kv_heads * c.head_width)
        if mlp is not None and config.init == "peft" and device.type != "meta":
            mlp.initialize(generator)
        first = torch.stack([key[:, :1], value[:, :1]]) if fixed else None  # [2, K, 1, D]
        prefix = Prefix(key[:, fixed:].clone(), value[:, fixed:].clone(), mlp, first)
        if config.gate:
            attention.beside = GatedPrefix(prefix, c.heads)
        else:
            attention.prefix = prefix
    if not config.gate:
        model.virtual_tokens, model.windowed = config.length, config.windowed
    kind = GatedPrefix if config.gate else Prefix
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


def list_attentions(model: Decoder) -> list[Any]:
    """List the attention of each block: the module with a prefix slot."""
    return [m for block in model.blocks for m in block.children() if hasattr(m, "prefix")]


def list_prefixes(model: Decoder) -> list[Prefix]:
    """List the prefix of each block, gated or not."""
    return [a.prefix if a.beside is None else a.beside.prefix for a in list_attentions(model)]


def remove_prefix(model: Decoder) -> None:
    """Empty the slots."""
    for attention in list_attentions(model):
        for slot in ("prefix", "beside"):
            empty_slot(attention, slot)
    model.virtual_tokens, model.windowed = 0, False


def prefix_recipe(config: PrefixConfig, parameters: int, family: str) -> Recipe:
    """A prefix's default training: the learning rate depends on the init; the pilot is LoRA's (lora.py).

    results/prefix-135m is that experiment again, whole (`minipeft study --preset prefix`).
    """
    if config.reparam is not None:
        return Recipe(1e-3, source="pilot: text init and MLP, 1.67 nats in three seeds")
    if config.gate:
        return Recipe(5e-3, source="P-tuning v2 (Liu et al. 2022); not measured with a gate")
    if config.init == "peft":
        return Recipe(3e-2, source="Weyssow et al. 2023; the best of four rates, though 60 steps end at 2.86 nats")
    return Recipe(3e-2, source="text init, 300 steps: 1.63 nats at 3e-2, 1.71 at the 5e-3 of P-tuning v2")
