"""Adapters of embedding and head: LoRA on an embedding, and trained rows of both (PEFT's trainable_token_indices).

    LoRA    x = W[ids] + s (A^T)[ids] B^T                A [r, V], B [C, r]; LoRA on the head is a LoRALinear
    rows    x = R[j] where ids = tokens[j], else W[ids]      R [n, C] trained: new tokens, while the others stay

A head computes h W^T with the same rows in place of W's. Where the base ties head and embedding, both use one R; LoRA
changes the table that is named and leaves the other: the two are then no longer one table, and merging unties them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.adapters.surgery import replace
from minipeft.adapters.trainable import TrainableModule
from minipeft.errors import InputError
from minipeft.models import Decoder
from minipeft.models.products import linear as base_product


class LoRAEmbedding(TrainableModule):
    """x = W[ids] + s (A^T)[ids] B^T; W is the Parameter of the embedding that it replaces."""

    weight: nn.Parameter

    adopted = ("weight",)

    def __init__(self, embedding: nn.Embedding, rank: int, alpha: float, scale: float):
        super().__init__()
        vocabulary, width = embedding.weight.shape
        make = lambda *shape: nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=embedding.weight.device))
        self.weight = cast(nn.Parameter, embedding.weight)
        self.lora_embedding_A, self.lora_embedding_B = make(rank, vocabulary), make(width, rank)  # [r, V], [C, r]
        self.rank, self.alpha, self.scale = rank, alpha, scale

    def initialize(self, init: str, generator: torch.Generator) -> None:
        """A = 0 and B ~ N(0, 1), as HF PEFT."""
        with torch.no_grad():
            self.lora_embedding_B.copy_(torch.randn(self.lora_embedding_B.shape, generator=generator))

    def forward(self, ids: Tensor) -> Tensor:
        update = F.embedding(ids, self.lora_embedding_A.t()) @ self.lora_embedding_B.t()  # [..., C]
        return (F.embedding(ids, self.weight) + self.scale * update).to(self.weight.dtype)  # [..., C]

    def merged_tensors(self) -> list[tuple[str, Tensor]]:
        """W + s (B A)^T, in float32. [V, C]"""
        update = (self.lora_embedding_B @ self.lora_embedding_A).t()  # [V, C]
        return [("weight", self.weight.float() + self.scale * update)]

    def plain(self) -> nn.Module:
        """An embedding with the base's weight."""
        return make_embedding(self.weight)

    def extra_repr(self) -> str:
        vocabulary, width = self.weight.shape
        return f"{vocabulary}, {width}, rank={self.rank}, alpha={self.alpha:g}, scale={self.scale:g}"


class TokenRows(TrainableModule):
    """A table with trained rows R for some tokens; W is the base's Parameter. The two tables of a tie share `rows`."""

    weight: nn.Parameter
    place: Tensor
    tokens: Tensor

    def __init__(self, module: nn.Module, tokens: Sequence[int], rows: nn.Parameter | None = None):
        super().__init__()
        self.weight = weight = cast(nn.Parameter, module.weight)
        self.register_buffer("tokens", torch.tensor(tokens, device=weight.device), persistent=False)  # [n]
        place = torch.full((len(weight),), -1, device=weight.device)
        place[self.tokens] = torch.arange(len(tokens), device=weight.device)
        self.register_buffer("place", place, persistent=False)  # [V]: a token's row of R, or -1
        self.token_rows = nn.Parameter(weight.detach()[self.tokens].float()) if rows is None else rows  # R [n, C]

    def merged_tensors(self) -> list[tuple[str, Tensor]]:
        """W with its trained rows, in float32. [V, C]"""
        return [("weight", self.weight.float().index_copy(0, self.tokens, self.token_rows))]

    def extra_repr(self) -> str:
        vocabulary, width = self.weight.shape
        return f"{vocabulary}, {width}, trained rows={len(self.tokens)}"


class EmbeddingRows(TokenRows):
    """x = R[j] where ids = tokens[j], else W[ids]"""

    adopted = ("weight",)

    def forward(self, ids: Tensor) -> Tensor:
        place = self.place[ids]  # [...]
        own = self.token_rows.to(self.weight.dtype)[place.clamp(min=0)]  # [..., C]
        return torch.where(place[..., None] >= 0, own, F.embedding(ids, self.weight))  # [..., C]

    def plain(self) -> nn.Module:
        """An embedding with the base's weight."""
        return make_embedding(self.weight)


class HeadRows(TokenRows):
    """y = h W^T + b, with R for some rows of W."""

    adopted = ("weight", "bias")

    def __init__(self, module: nn.Linear, tokens: Sequence[int], rows: nn.Parameter | None = None):
        super().__init__(module, tokens, rows)
        self.bias = module.bias

    def forward(self, h: Tensor) -> Tensor:
        own = F.linear(h, self.token_rows.to(h.dtype), None if self.bias is None else self.bias[self.tokens])
        return base_product(h, self.weight, self.bias).index_copy(-1, self.tokens, own)  # [..., V]

    def plain(self) -> nn.Module:
        """A linear with the base's weight and bias."""
        out, width = self.weight.shape
        linear = nn.Linear(width, out, bias=self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear


def make_embedding(weight: nn.Parameter) -> nn.Embedding:
    """An nn.Embedding that holds this Parameter."""
    vocabulary, width = weight.shape
    embedding = nn.Embedding(vocabulary, width, device="meta")
    embedding.weight = weight
    return embedding


def plan_rows(model: Decoder, embedding: Sequence[int], head: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The tokens whose rows are trained, by the table's path; a tied head has the embedding's.

    Raises:
        InputError: a token is not in the vocabulary, or named twice.
    """
    tied = model.config.tie_word_embeddings
    planned = {}
    for path, where, tokens in (
        (model.family.embedding, "trainable_token_indices", embedding),
        ("lm_head", "head_token_indices", head or (embedding if tied else ())),
    ):
        if wrong := [token for token in tokens if not 0 <= token < model.config.vocab_size]:
            problem = f"there is no token {wrong[0]}: the vocabulary has {model.config.vocab_size}"
            raise InputError(problem, where=where)
        if len(set(tokens)) < len(tokens):
            raise InputError("names a token twice", where=where)
        if tokens:
            planned[path] = tuple(tokens)
    return planned


def add_rows(model: Decoder, embedding: Sequence[int], head: Sequence[int]) -> list[str]:
    """Put tables with trained rows in the place of embedding and head; returns their paths."""
    planned = plan_rows(model, embedding, head)
    path, rows = model.family.embedding, None
    if path in planned:
        table = EmbeddingRows(model.embedding, planned[path])
        replace(model, path, table.train(model.training))
        rows = table.token_rows if model.config.tie_word_embeddings and not head else None
    if "lm_head" in planned:
        replace(model, "lm_head", HeadRows(model.lm_head, planned["lm_head"], rows).train(model.training))
    return list(planned)


def find_table_layers(model: nn.Module) -> dict[str, LoRAEmbedding | TokenRows]:
    """The model's adapted tables by path, LoRA on the head excepted."""
    kinds = (LoRAEmbedding, TokenRows)
    return {path: module for path, module in model.named_modules() if isinstance(module, kinds)}


def describe_untied(model: Decoder) -> list[str]:
    """A note where the adapter changes one of two tied tables, or each by itself."""
    head, embedding = (getattr(m, "token_rows", m.weight) for m in (model.lm_head, model.embedding))
    changed = [
        path for path in (model.family.embedding, "lm_head") if getattr(model.get_submodule(path), "adopted", ())
    ]
    if not changed or not model.config.tie_word_embeddings or head is embedding is not model.embedding.weight:
        return []
    parts = " and ".join(changed)
    return [f"the base ties embedding and head; the adapter changes {parts} apart from it, and merging unties them"]
