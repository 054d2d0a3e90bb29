"""Prefix-tuning: learned keys and values in front of every attention (Li & Liang 2021).

    k, v = [prefix_k ; k], [prefix_v ; v]          in each layer, P learned columns that every token may see

The learned keys are stored as the cache would hold them (after rotary), one [K, P, D] per layer and K key/value heads.
Initialised with noise, P columns take softmax mass from the text and bury it: a real 135M model's loss rises from 3.3
to 10.9 nats. Initialised with the keys and values of real tokens (the default, "text"), the model starts exactly as if
that text stood before the input, and training goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minipeft.adapters.lora import keep_float32
from minipeft.errors import InputError
from minipeft.models import Decoder
from minipeft.models.attention import SHARED

TASK_LINE = "Generate Python code given a natural language instruction."
INITS = ("text", "normal", "peft")


class Encoder(Protocol):
    """What text init needs of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class PrefixConfig:
    """How many columns, and how they start.

    init: "text" (keys and values of `text`, repeated or cut to `length` tokens), "normal" (keys spread as the model's
    own, values 0), "peft" (N(0, 1), HF PEFT's default, for comparison).
    """

    length: int = 20
    init: str = "text"
    text: str = TASK_LINE
    windowed: bool = False  # whether a sliding window hides the columns, as HF's does

    def __post_init__(self) -> None:
        check_learned(self.length, self.init, INITS)


def check_learned(length: int, init: str, known: tuple[str, ...]) -> None:
    """The checks that prefix and prompt share."""
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise InputError(f"{length!r} must be an integer >= 1", where="length")
    if init not in known:
        raise InputError(f"{init!r} is not known ({', '.join(known)})", where="init")


class Prefix(nn.Module):
    """One attention's learned columns."""

    def __init__(self, key: Tensor, value: Tensor):
        super().__init__()
        self.key = nn.Parameter(key)  # [K, P, D]
        self.value = nn.Parameter(value)  # [K, P, D]

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """[B, K, T, D] -> [B, K, P + T, D], twice"""
        key, value = (p.to(k.dtype).expand(k.shape[0], -1, -1, -1) for p in (self.key, self.value))  # [B, K, P, D]
        return torch.cat([key, k], dim=2), torch.cat([value, v], dim=2)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Prefix:
        """Stay float32 through casts of the model."""
        keep_float32(self, ("key", "value"), lambda: super(Prefix, self)._apply(fn, recurse))
        return self

    def extra_repr(self) -> str:
        return "kv_heads={}, columns={}, width={}".format(*self.key.shape)


def text_ids(text: str, length: int, tokenizer: Encoder | None, method: str) -> list[int]:
    """The ids of `text`, repeated or cut so that there are `length`; a BOS that the tokenizer adds stays first.

    Raises:
        InputError: there is no tokenizer, or no token in the text.
    """
    if tokenizer is None:
        hint = "add_adapter(model, config, tokenizer)"
        raise InputError("starting from text needs the tokenizer", where=f"{method} init", hint=hint)
    ids, again = tokenizer.encode(text), tokenizer.encode(text)
    bos = getattr(tokenizer, "bos", None)
    if again and again[0] == bos:
        again = again[1:]
    if not again:
        raise InputError(f"{text!r} has no tokens", where="text")
    while len(ids) < length:
        ids = ids + again
    return ids[:length]


def run_text(model: Decoder, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Keys and values of each layer for a text that everybody may see: the decode cache is the capture.

    -> two of [L, K, P, D], after rotary
    """
    device = model.embedding.weight.device
    row = torch.tensor([ids], device=device)  # [1, P]
    cache = model.new_cache(1, len(ids))
    was_training = model.training
    model.eval()
    with torch.no_grad():
        model.hidden(row, documents=torch.full_like(row, SHARED), cache=cache)
    model.train(was_training)
    return cache.keys[:, 0], cache.values[:, 0]


def initial(
    model: Decoder, config: PrefixConfig, tokenizer: Encoder | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The keys and values that the prefix starts from, two of [L, K, P, D] in float32.

    Raises:
        InputError: "text" or "normal" without a tokenizer.
    """
    c = model.config
    shape = (c.layers, c.kv_heads, config.length, c.head_width)
    if config.init == "peft":
        return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    keys, values = run_text(model, text_ids(config.text, config.length, tokenizer, "prefix"))
    if config.init == "text":
        return keys.float(), values.float()
    mean, spread = keys.float().mean(dim=2, keepdim=True), keys.float().std(dim=(1, 2, 3), keepdim=True)
    drawn = torch.randn(shape, generator=generator).to(keys.device)
    return mean + spread * drawn, torch.zeros_like(values, dtype=torch.float32)


def add_prefix(
    model: Decoder, config: PrefixConfig, tokenizer: Encoder | None, generator: torch.Generator
) -> list[str]:
    """Fill each attention's prefix slot; returns the paths of the modules."""
    weight = model.embedding.weight
    model.windowed = config.windowed
    if weight.is_meta:
        c = model.config
        keys = values = torch.empty(c.layers, c.kv_heads, config.length, c.head_width, device="meta")
    else:
        keys, values = (t.to(weight.device) for t in initial(model, config, tokenizer, generator))
    model.learned = config.length
    for attention, key, value in zip(attentions(model), keys, values):
        attention.prefix = Prefix(key.clone(), value.clone())
    return [name for name, module in model.named_modules() if isinstance(module, Prefix)]


def attentions(model: Decoder) -> list[Any]:
    """The attention module of each block: the one that has a prefix slot."""
    return [m for block in model.blocks for m in block.children() if hasattr(m, "prefix")]


def remove_prefix(model: Decoder) -> None:
    """Empty the slots."""
    for attention in attentions(model):
        attention.prefix = None
    model.learned, model.windowed = 0, False
