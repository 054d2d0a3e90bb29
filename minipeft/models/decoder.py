"""The base class of all decoders: the slots that adapters fill, the forward pass, the loss, the decode cache.

    ids -> embed, [prompt] -> block 0 ... block L-1 -> norm -> hidden -> head -> logits
                                |
                                attention: [prefix] keys and values before the row's own, [beside] added to its output

A family's file defines its attention, MLP and block, builds them in `__init__` and calls `tie`. A family whose forward
pass differs overrides one of the small methods: `embed`, `rotations`, `check`, `logits`.
"""

from __future__ import annotations

import dataclasses
import html
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.documents import positions_in
from minipeft.errors import InputError, check_memory, check_value
from minipeft.models.attention import run_block
from minipeft.models.cache import Cache, RaggedCache
from minipeft.models.family import Family
from minipeft.models.layout import Layout, Rotary, check_rows, lay_out
from minipeft.models.loss import adapted_cross_entropy, cross_entropy, finish
from minipeft.models.products import linear

IMPORTED_BY = os.getpid()


def check_process() -> None:
    """Check that torch can compute in this process: fork does not copy OpenMP's threads, and a product would deadlock.

    Raises:
        InputError: the process was forked after the import, and torch uses several threads.
    """
    if os.getpid() != IMPORTED_BY and (threads := torch.get_num_threads()) > 1:
        hint = "Call torch.set_num_threads(1) in it, or start it with multiprocessing's method 'spawn'"
        raise InputError(
            f"was forked, and torch has {threads} threads, which fork does not copy", where="process", hint=hint
        )


class Decoder(nn.Module):
    """A decoder with its language-model head. `prompt` and each attention's `prefix` are slots that adapters fill."""

    lm_head: nn.Linear
    logit_divisor: float = 1.0
    logit_cap: float | None = None  # the c in c tanh(logit / c)

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.source: str | None = None  # the folder or hub id that it was loaded from
        self.prompt: Any = None  # slot for a module that puts P vectors before the embedded tokens
        self.adapter: Any = None  # the config of the adapter in the slots; this file stores it and never reads it
        self.adapters: Any = None  # the AdapterSet that the adapter belongs to; print shows it
        self.disabled: str | None = None  # the method that `disabled` has taken out; print shows it
        self.virtual_tokens = 0  # P of the prefix or the prompt
        self.windowed = False  # whether a sliding window hides virtual tokens
        self.activation_checkpointing = False  # recompute each block in backward
        self.windows = tuple(dict.fromkeys(config.window(layer) for layer in range(config.layers)))  # the distinct ones

    def extra_repr(self) -> str:
        """What print(model) says of adapters that are not in their slots."""
        adapters = "" if self.adapters is None else f"adapters: {self.adapters}"
        return ", ".join(filter(None, [adapters, f"{self.disabled} disabled" if self.disabled else ""]))

    def _repr_html_(self) -> str:
        """A line on its parameters, and its modules folded, for a notebook."""
        sizes = [(p.numel(), p.requires_grad) for p in self.parameters()]
        total, trained = sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)
        share = "all" if trained == total else f"{trained:,}" if trained else "none"
        weight, source = self.embedding.weight, f" from {self.source}" if self.source else ""
        kind = f"{str(weight.dtype).removeprefix('torch.')} on {weight.device}"
        line = f"{type(self).__name__}{source}: {total:,} parameters, {share} trained, {kind}"
        return f"<details><summary>{html.escape(line)}</summary><pre>{html.escape(repr(self))}</pre></details>"

    @property
    def family(self) -> Family:
        """The record of the family (models/family.py)."""
        raise NotImplementedError

    @property
    def embedding(self) -> nn.Embedding:
        return self.get_submodule(self.family.embedding)  # type: ignore[return-value]

    @property
    def blocks(self) -> nn.ModuleList:
        return self.get_submodule(self.family.blocks)  # type: ignore[return-value]

    @property
    def norm(self) -> nn.Module:
        return self.get_submodule(self.family.norm)

    def tie(self) -> None:
        """Make head and embedding one Parameter if the config ties them; loading with assign=True separates them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embedding.weight

    def initialize(self, generator: torch.Generator) -> None:
        """Initialize the weights."""
        raise NotImplementedError

    def new_cache(self, rows: int, length: int, *, ragged: bool = False) -> Cache:
        """A decode cache for `rows` rows of `length` tokens, with room for the virtual tokens; `ragged`: a RaggedCache.

        Raises:
            InputError: it would not fit in this machine's memory.
        """
        for name, number in (("rows", rows), ("length", length)):
            check_value(number, int, {"least": 1, "below": 2**31}, name)
        c, weight = self.config, self.embedding.weight
        columns = length + self.virtual_tokens
        if weight.device.type == "cpu":
            size = 2 * c.layers * rows * c.kv_heads * columns * c.head_width * weight.element_size()
            check_memory(size, f"a cache of {rows} x {columns}")
        kind = RaggedCache if ragged else Cache
        return kind(c.layers, rows, c.kv_heads, columns, c.head_width, weight.dtype, weight.device)

    def check(self, layout: Layout) -> None:
        """Refuse rows that this family does not support."""

    def check_longest(self, layout: Layout, limit: int, name: str) -> None:
        """Check that every position is below `limit`; positions are read from the device only if a row is long enough.

        Raises:
            InputError: a document, with the virtual tokens before it, is longer than `limit`.
        """
        if layout.positions.is_meta or layout.columns <= limit:  # on the meta device there are no values
            return
        if (largest := int(layout.positions.max())) >= limit:
            raise InputError(
                f"the longest reaches position {largest}, but this model has {name}={limit}"
                + (f", of which {self.virtual_tokens} are virtual tokens" if self.virtual_tokens else ""),
                where="documents",
                hint=f"cut each document to {limit - self.virtual_tokens} tokens",
            )

    def check_context(self, documents: Tensor) -> None:
        """Check that no document to train on, with the virtual tokens before it, is longer than the context.

        Raises:
            InputError: one is longer; rotary positions would silently exceed the pretrained range.
        """
        if documents.shape[1] + self.virtual_tokens <= (limit := self.config.context):
            return
        if (largest := int(positions_in(documents).max()) + self.virtual_tokens) >= limit:
            raise InputError(
                f"the longest reaches position {largest}, but the model's context is {limit}"
                + (f", of which {self.virtual_tokens} are virtual tokens" if self.virtual_tokens else ""),
                where="documents",
                hint="pack(length=..., virtual_tokens=model.virtual_tokens)",
            )

    def look_up(self, ids: Tensor) -> Tensor:
        """The token embeddings, on the scale at which a prompt's vectors join them. [...] -> [..., C]"""
        return self.embedding(ids)

    def embed(self, ids: Tensor, layout: Layout) -> Tensor:
        """The input of the first block: the prompt, then the embedded tokens. [B, T] -> [B, T or P + T, C]"""
        x = self.look_up(ids)  # [B, T, C]
        return self.prompt(x) if self.prompt is not None and layout.first else x

    def rotations(self, positions: Tensor, dtype: torch.dtype) -> Mapping[str, Rotary]:
        """The rotary tables at these positions, one for each distinct setting of the blocks; none in the base class."""
        return {}

    def hidden(self, ids: Tensor, documents: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """ids [B, T] -> hidden states after the last norm [B, T, C]; `documents` [B, T], None: one document a row.

        Raises:
            InputError: ids are not the vocabulary's, documents do not fit the ids, a position is beyond the model's
                table, the cache has no room.
        """
        if not torch.compiler.is_compiling():  # what depends on values and processes is checked in eager calls alone
            check_process()
            check_rows(self.config.vocab_size, ids, None, documents)
        layout = lay_out(
            documents,
            ids,
            cache,
            virtual_tokens=self.virtual_tokens,
            prompted=self.prompt is not None,
            windows=self.windows,
            windowed=self.windowed,
            dtype=self.embedding.weight.dtype,
        )
        self.check(layout)
        x = self.embed(ids, layout)  # [B, T or P + T, C]
        layout = dataclasses.replace(layout, rotations=self.rotations(layout.positions, x.dtype))
        for block in self.blocks:
            x = run_block(block, self.activation_checkpointing and self.training, x, layout, cache)
        return self.norm(x[:, -ids.shape[1] :])  # [B, T, C]

    def head_parts(self) -> tuple[Tensor, Tensor | None] | None:
        """The weight [V, C] and bias [V] that turn hidden states into logits; None: an adapter of the head (LoRA,
        trained rows) computes the product by itself."""
        head: Any = self.lm_head
        if isinstance(head, nn.Linear):
            return head.weight, head.bias
        return head.head_parts() if hasattr(head, "head_parts") else None

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., C] -> [..., V]"""
        parts = self.head_parts()
        made = self.lm_head(hidden) if parts is None else linear(hidden, *parts)  # [..., V]
        return finish(made, self.logit_divisor, self.logit_cap)

    def forward(self, ids: Tensor, documents: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """ids [B, T] -> logits [B, T, V] of the next token."""
        return self.logits(self.hidden(ids, documents, cache))

    def loss(self, ids: Tensor, labels: Tensor, documents: Tensor | None = None) -> Tensor:
        """Sum of the next-token losses in nats over the supervised tokens, in float32; the logits are formed in chunks.

        ids, labels and documents [B, T]. `labels[t]` is `ids[t]`, or -100 where there is no loss.

        Raises:
            InputError: as `hidden`, and for labels that are neither -100 nor an id of the vocabulary.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling:
            check_rows(self.config.vocab_size, ids, labels, documents)
        hidden, parts = self.hidden(ids, documents), self.head_parts()  # [B, T, C]
        if parts is None or compiling:
            return adapted_cross_entropy(hidden, self.logits, labels, len(self.lm_head.weight))
        return cross_entropy(hidden, parts[0], labels, parts[1], self.logit_divisor, self.logit_cap)
