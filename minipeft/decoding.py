"""The rows of a batch while they are decoded: padded together, or with bits that do not depend on one another.

`PaddedRows` puts prompts of different lengths side by side, padded on the left, and drops rows that have ended:

    (`.` = PADDING, 0 = the row's document,     . . 0 0 0 | 0 0 ...
    | = where answers begin)                    0 0 0 0 0 | 0 0 ...

A product of M rows may round differently from one of M', and so may attention with padding: the last bits of a row's
logits depend on the other rows. With `InvariantRows` they do not. Each prompt is prefilled alone, each row attends to
its own columns, and the products of a step always have eight rows; those that no prompt needs are copies of row 0:

    three prompts:   rows 0 1 2, and five copies of row 0           twenty: rows 0 ... 7, then 8 ... 15, then 16 ... 19

This assumes that a product gives a row the same bits in all eight places. It held on the CPUs that we tried, and
`check_places`, which compares the copies, refuses a machine where it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from minipeft.documents import PADDING
from minipeft.errors import InputError
from minipeft.models import Decoder
from minipeft.models.cache import RaggedCache
from minipeft.models.products import fast_products
from minipeft.sampling import choose

ROWS = 8  # of each product in batch-invariant decoding


class Rows(Protocol):
    """The rows of a batch: prefilled when they are made, then one token at a time."""

    def choose(self, draws: Tensor, temperature: float, top_p: float) -> Tensor:
        """Choose the next token of each row with its uniform random number. [B] -> [B]"""

    def advance(self, tokens: Tensor) -> None:
        """Append a token to each row. [B]"""

    def keep(self, rows: list[int]) -> None:
        """Keep these rows, in this order."""


def start_rows(model: Decoder, rows: Sequence[list[int]], filling: int, new_tokens: int, invariant: bool) -> Rows:
    """Prefill the rows of a batch, with room for their new tokens."""
    with fast_products():
        return InvariantRows(model, rows, new_tokens) if invariant else PaddedRows(model, rows, filling, new_tokens)


class PaddedRows:
    """Rows padded on the left with the id `filling`."""

    def __init__(self, model: Decoder, rows: Sequence[list[int]], filling: int, new_tokens: int):
        device = model.embedding.weight.device
        ids, documents = pad_left(rows, filling)
        self.model, self.cache = model, model.new_cache(len(rows), ids.shape[1] + new_tokens)
        self.hidden = model.hidden(ids.to(device), documents.to(device), self.cache)  # [B, T, C]

    def choose(self, draws: Tensor, temperature: float, top_p: float) -> Tensor:
        logits = self.model.logits(self.hidden[:, -1]).float()  # [B, V]
        return choose(logits, draws, temperature, top_p)

    def advance(self, tokens: Tensor) -> None:
        self.hidden = self.model.hidden(tokens[:, None], cache=self.cache)  # [B, 1, C]

    def keep(self, rows: list[int]) -> None:
        self.cache.keep_rows(rows)
        if hasattr(self.model.adapter, "keep"):  # a bank keeps the same rows
            self.model.adapter.keep(rows)


class InvariantRows:
    """Up to ROWS rows; the logits of each have the same bits as alone."""

    def __init__(self, model: Decoder, rows: Sequence[list[int]], new_tokens: int):
        assert 0 < len(rows) <= ROWS
        self.model, self.device = model, model.embedding.weight.device
        cache = model.new_cache(ROWS, max(map(len, rows)) + new_tokens, ragged=True)
        assert isinstance(cache, RaggedCache)
        self.cache, hidden = cache, []
        for place, row in enumerate(rows):
            prompt = model.new_cache(1, len(row))
            hidden.append(model.hidden(torch.tensor([row], device=self.device), cache=prompt)[:, -1:])  # [1, 1, C]
            for copy in (place, *(range(len(rows), ROWS) if place == 0 else ())):
                cache.fill(copy, prompt)
        self.places = list(range(len(rows)))  # of the rows that are still wanted, among the ROWS
        self.copies = list(range(len(rows), ROWS))  # the places of row 0's copies
        self.hidden = torch.cat([*hidden, *[hidden[0]] * len(self.copies)])  # [ROWS, 1, C]
        self.tokens = torch.zeros(ROWS, dtype=torch.long, device=self.device)

    def choose(self, draws: Tensor, temperature: float, top_p: float) -> Tensor:
        logits = self.model.logits(self.hidden[:, -1]).float()  # [ROWS, V]
        check_places(logits, self.copies)
        rows = [choose(logits[place, None], draw[None], temperature, top_p) for place, draw in zip(self.places, draws)]
        return torch.cat(rows)

    def advance(self, tokens: Tensor) -> None:
        self.tokens[self.places] = tokens  # a row that is no longer wanted repeats its last token
        self.tokens[self.copies] = self.tokens[0].clone()
        self.hidden = self.model.hidden(self.tokens[:, None], cache=self.cache)  # [ROWS, 1, C]

    def keep(self, rows: list[int]) -> None:
        self.places = [self.places[row] for row in rows]


def check_places(logits: Tensor, copies: list[int]) -> None:
    """Check that the logits of row 0's copies have its bits. [ROWS, V]

    Raises:
        InputError: a product gives a row other bits in another place.
    """
    if copies and not torch.equal(logits[copies], logits[:1].expand(len(copies), -1)):
        problem = "products on this machine give a row other bits in another place of a batch"
        raise InputError(problem, where="batch_invariant", hint="Give --batch 1 --no-pack instead: each prompt alone")


@torch.no_grad()
def probe_places(model: Decoder, prompt: list[int], steps: int = 2) -> None:
    """Decode a few tokens of one prompt in all places of a batch, and check that they have the same bits.

    Raises:
        InputError: as `check_places`.
    """
    rows = InvariantRows(model, [prompt], steps)
    for _ in range(steps):
        rows.advance(rows.choose(torch.zeros(1, device=rows.device), 0.0, 1.0))
    rows.choose(torch.zeros(1, device=rows.device), 0.0, 1.0)


def pad_left(rows: Sequence[list[int]], filling: int) -> tuple[Tensor, Tensor]:
    """Pad rows on the left; returns ids and documents, two of [B, T]. No token sees the padding."""
    width = max(map(len, rows))
    ids = torch.tensor([[filling] * (width - len(row)) + row for row in rows])
    documents = torch.tensor([[PADDING] * (width - len(row)) + [0] * len(row) for row in rows])
    return ids, documents
