"""Prefix-tuning: learned keys and values in front of every attention (Li & Liang 2021).

    k, v = [prefix_k ; k], [prefix_v ; v]          in each layer, P learned columns that every token may see

The learned keys are stored as the cache would hold them (after rotary), one [K, P, D] per layer and K key/value heads.
Initialised with noise, P columns take softmax mass from the text and bury it: a real 135M model's loss rises from 3.3
to 10.9 nats. Even columns of zeros do: a key of 0 has weight exp(0) in every softmax. Initialised with the keys and
values of real tokens (the default, "text"), the model starts exactly as if that text stood before the input.

With a gate (Zhang et al. 2023, LLaMA-Adapter) the text keeps its own softmax, and the prefix is added beside it:

    y = softmax(q k^T) v + tanh(g) softmax(q prefix_k^T) prefix_v          g [H], one per head, 0 at the start

so that nothing changes at step 0, and no position is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minipeft.adapters.lora import keep_float32
from minipeft.adapters.reparam import Reparam, make_trunk
from minipeft.errors import InputError
from minipeft.models import Decoder
from minipeft.models.attention import VIRTUAL, product

TASK_LINE = "Generate Python code given a natural language instruction."
INITS = ("text", "normal", "peft")


class Encoder(Protocol):
    """What text init needs of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class PrefixConfig:
    """How many columns, how they start, and what they are made of while they train.

    init: "text" (keys and values of `text`, repeated or cut to `length` tokens), "normal" (keys spread as those of
    `text`, values 0), "peft" (N(0, 1), HF PEFT's default, for comparison).
    """

    length: int = 20
    init: str = "text"
    text: str = TASK_LINE
    reparam: int | None = None  # width of the network that makes the columns (reparam.py); None: a plain table
    gate: bool = False
    freeze_first: bool = False  # leave the first column, where attention rests, as it started
    windowed: bool = False  # whether a sliding window hides the columns, as HF's does

    def __post_init__(self) -> None:
        check_learned(self.length, self.init, INITS, self.reparam)
        check_booleans(self, ("gate", "freeze_first", "windowed"))
        if self.freeze_first and self.length < 2:
            raise InputError("leaves nothing to train of a single column", where="freeze_first")
        if self.gate and self.windowed:
            raise InputError("a gated prefix stands beside the text, in no window", where="windowed")


def check_learned(length: int, init: str, known: tuple[str, ...], reparam: int | None = None) -> None:
    """The checks that prefix and prompt share."""
    for name, number in (("length", length), ("reparam", 1 if reparam is None else reparam)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise InputError(f"{number!r} must be an integer >= 1", where=name)
    if not isinstance(init, str) or init not in known:
        raise InputError(f"{init!r} is not known ({', '.join(known)})", where="init")


def check_booleans(config: object, names: tuple[str, ...]) -> None:
    """Refuse a switch that is not true or false: "no" would count as true."""
    for name in names:
        if not isinstance(getattr(config, name), bool):
            raise InputError(f"{getattr(config, name)!r} must be true or false", where=name)


class Prefix(nn.Module):
    """One attention's learned columns.

    `key` and `value` are what is trained; with a network they are its fixed start, and with `first` they lack the
    first column, which is fixed too.
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

    def columns(self) -> tuple[Tensor, Tensor]:
        """Keys and values, two of [K, P, D]: the network folded in, the frozen column put back."""
        key, value = self.key, self.value
        if self.mlp is not None:
            heads, columns, width = key.shape
            added = self.mlp().view(columns, 2, heads, width).permute(1, 2, 0, 3)  # [2, K, P, D]
            key, value = key + added[0], value + added[1]
        if self.first is not None:
            key, value = torch.cat([self.first[0], key], dim=1), torch.cat([self.first[1], value], dim=1)
        return key, value

    @torch.no_grad()
    def assign(self, key: Tensor, value: Tensor) -> None:
        """Make these the columns, two of [K, P, D]; of a plain table only."""
        assert self.mlp is None
        if self.first is not None:
            self.first.copy_(torch.stack([key[:, :1], value[:, :1]]))
            key, value = key[:, 1:], value[:, 1:]
        self.key.copy_(key)
        self.value.copy_(value)

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """[B, K, T, D] -> [B, K, P + T, D], twice"""
        key, value = (p.to(k.dtype).expand(k.shape[0], -1, -1, -1) for p in self.columns())  # [B, K, P, D]
        return torch.cat([key, k], dim=2), torch.cat([value, v], dim=2)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Prefix:
        """Stay float32 through casts of the model."""
        names = ("key", "value") if self.first is None else ("key", "value", "first")
        keep_float32(self, names, lambda: super(Prefix, self)._apply(fn, recurse))
        return self

    def extra_repr(self) -> str:
        heads, columns, width = self.key.shape
        return f"kv_heads={heads}, columns={columns + (self.first is not None)}, width={width}"


class GatedPrefix(nn.Module):
    """tanh(g) softmax(q prefix_k^T) prefix_v: what the prefix adds to an attention's product, 0 at the start."""

    def __init__(self, prefix: Prefix, heads: int):
        super().__init__()
        self.prefix = prefix
        self.gate = nn.Parameter(torch.zeros(heads, device=prefix.key.device))  # g [H]

    def forward(self, q: Tensor, scale: float | None) -> Tensor:
        """q [B, H, T, D], after rotary -> [B, T, H * D]"""
        k, v = (p.to(q.dtype).expand(q.shape[0], -1, -1, -1) for p in self.prefix.columns())  # [B, K, P, D]
        y = product(q, k, v, None, False, 0.0, scale)  # [B, H, T, D]
        y = y * torch.tanh(self.gate).to(y.dtype)[:, None, None]
        return y.transpose(1, 2).flatten(2)  # [B, T, H * D]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GatedPrefix:
        """Stay float32 through casts of the model."""
        keep_float32(self, ("gate",), lambda: super(GatedPrefix, self)._apply(fn, recurse))
        return self


def encoded(text: str, tokenizer: Encoder | None, method: str) -> list[int]:
    """The ids of `text`, with a BOS where the tokenizer adds one.

    Raises:
        InputError: there is no tokenizer.
    """
    if tokenizer is None:
        hint = "add_adapter(model, config, tokenizer)"
        raise InputError("starting from text needs the tokenizer", where=f"{method} init", hint=hint)
    return tokenizer.encode(text)


def text_ids(text: str, length: int, tokenizer: Encoder | None, method: str) -> list[int]:
    """The ids of `text`, repeated or cut so that there are `length`; a BOS that the tokenizer adds stays first.

    Raises:
        InputError: there is no tokenizer, or no token in the text.
    """
    ids = encoded(text, tokenizer, method)
    again = ids[1:] if ids and ids[0] == getattr(tokenizer, "bos", None) else ids
    if not again:
        raise InputError(f"{text!r} has no tokens", where="text")
    while len(ids) < length:
        ids = ids + again
    return ids[:length]


def run_text(model: Decoder, ids: list[int], windowed: bool = False) -> tuple[Tensor, Tensor]:
    """Keys and values of each layer for a text that everybody may see: the decode cache is the capture.

    `windowed` as the prefix will be: whether a sliding window hides the text from itself. A model without adapter.
    -> two of [L, K, P, D], after rotary
    """
    device = model.embedding.weight.device
    row = torch.tensor([ids], device=device)  # [1, P]
    cache = model.new_cache(1, len(ids))
    was_training = model.training
    model.eval()
    model.windowed = windowed
    with torch.no_grad():
        model.hidden(row, documents=torch.full_like(row, VIRTUAL), cache=cache)
    model.train(was_training)
    model.windowed = False
    return cache.keys[:, 0], cache.values[:, 0]


def initial(
    model: Decoder, config: PrefixConfig, tokenizer: Encoder | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The keys and values that the prefix starts from, two of [L, K, P, D] in float32.

    Raises:
        InputError: "text" or "normal" without a tokenizer, or with a text that is too short to measure.
    """
    c = model.config
    shape = (c.layers, c.kv_heads, config.length, c.head_width)
    if config.init == "peft":
        if config.reparam is not None:  # the network has a random last layer, and makes the columns alone
            return torch.zeros(shape), torch.zeros(shape)
        return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    if config.init == "text":
        keys, values = run_text(model, text_ids(config.text, config.length, tokenizer, "prefix"), config.windowed)
        return keys.float(), values.float()
    ids = encoded(config.text, tokenizer, "prefix")
    if len(set(ids)) < 2:
        raise InputError(f"{config.text!r} has no two tokens to measure a spread from", where="text")
    spread = [(t.float().mean(dim=2, keepdim=True), t.float().std(dim=2, keepdim=True)) for t in run_text(model, ids)]
    drawn = [mean + std * torch.randn(shape, generator=generator).to(mean.device) for mean, std in spread]
    # values 0 leave the text's mean alone; behind a gate that is 0 as well, they could never be left
    return drawn[0], drawn[1] if config.gate else torch.zeros_like(drawn[1])


def add_prefix(
    model: Decoder, config: PrefixConfig, tokenizer: Encoder | None, generator: torch.Generator
) -> list[str]:
    """Fill each attention's slot; returns the paths of the modules."""
    device, c = model.embedding.weight.device, model.config
    check_room(config.length, c.context, config.gate)
    if device.type == "meta":
        keys = values = torch.empty(c.layers, c.kv_heads, config.length, c.head_width, device=device)
    else:
        keys, values = (t.to(device) for t in initial(model, config, tokenizer, generator))
    fixed = int(config.freeze_first)
    trunk = None
    if config.reparam is not None:
        trunk = make_trunk(config.length - fixed, c.width, config.reparam, device, generator)
    for attention, key, value in zip(attentions(model), keys, values):
        mlp = None if trunk is None else Reparam(trunk, 2 * c.kv_heads * c.head_width)
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


def check_room(length: int, context: int, gate: bool = False) -> None:
    """Refuse columns that leave no room for text in the model's context; a gated prefix takes none."""
    if not gate and length + 2 > context:  # one token to see and one to predict
        hint = f"take at most {context - 2} columns"
        raise InputError(f"{length} columns leave no room in a context of {context}", where="length", hint=hint)


def attentions(model: Decoder) -> list[Any]:
    """The attention module of each block: the one that has a prefix slot."""
    return [m for block in model.blocks for m in block.children() if hasattr(m, "prefix")]


def prefixes(model: Decoder) -> list[Prefix]:
    """The prefix of each block, gated or not."""
    return [a.prefix if a.beside is None else a.beside.prefix for a in attentions(model)]


def remove_prefix(model: Decoder) -> None:
    """Empty the slots."""
    for attention in attentions(model):
        for slot in ("prefix", "beside"):
            empty_slot(attention, slot)
    model.virtual_tokens, model.windowed = 0, False


def empty_slot(module: nn.Module, slot: str) -> None:
    """Put None where a module stood, as it was before: without `delattr`, print(model) would go on showing the slot."""
    if isinstance(getattr(module, slot), nn.Module):
        delattr(module, slot)
        setattr(module, slot, None)
