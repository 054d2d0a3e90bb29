"""The decode cache: keys and values of all columns so far, so that a new token computes one column."""

from __future__ import annotations

import torch
from torch import Tensor

from minipeft.documents import PADDING
from minipeft.errors import InputError


class Cache:
    """Keys and values of all layers, preallocated; `documents` holds the owner of each column.

    Allocated as zeros, not `empty`: an unwritten column is masked, but 0 * NaN would still be NaN.
    """

    def __init__(
        self, layers: int, rows: int, heads: int, length: int, width: int, dtype: torch.dtype, device: torch.device
    ):
        self.keys = torch.zeros(layers, rows, heads, length, width, dtype=dtype, device=device)  # [L, B, K, S, D]
        self.values = torch.zeros_like(self.keys)  # [L, B, K, S, D]
        self.documents = torch.full((rows, length), PADDING, device=device)  # [B, S]
        self.start = 0  # first column of this call
        self.length = 0  # columns in use

    def open(self, documents: Tensor) -> Tensor:
        """Append columns of `documents` [B, n]; returns the documents of all columns in use [B, S].

        Raises:
            InputError: another number of rows than the cache has, or no room for the columns.
        """
        room = self.documents.shape[1]
        if documents.shape[0] != self.documents.shape[0] or self.length + documents.shape[1] > room:
            raise InputError(
                f"{documents.shape[0]} rows of {self.length} + {documents.shape[1]} columns do not fit in one of "
                f"{self.documents.shape[0]} rows and {room} columns",
                where="cache",
                hint="make it with model.new_cache(rows, length)",
            )
        self.start, self.length = self.length, self.length + documents.shape[1]
        self.documents[:, self.start : self.length] = documents
        return self.documents[:, : self.length]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write this call's keys and values [B, K, n, D]; returns views of all columns in use [B, K, S, D]."""
        self.keys[layer, :, :, self.start : self.length] = k
        self.values[layer, :, :, self.start : self.length] = v
        return self.keys[layer, :, :, : self.length], self.values[layer, :, :, : self.length]

    def keep_rows(self, rows: list[int]) -> None:
        """Keep these rows, in this order, and drop the others."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.documents = self.documents[rows]


class RaggedCache(Cache):
    """A cache of rows without padding: row b's columns are 0 ... lengths[b] - 1, and its next token has the next one.

    `fill` takes a row's prompt from a cache of its own; after it, each call appends one token to every row.
    """

    def __init__(
        self, layers: int, rows: int, heads: int, length: int, width: int, dtype: torch.dtype, device: torch.device
    ):
        super().__init__(layers, rows, heads, length, width, dtype, device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)  # [B]

    def fill(self, row: int, prompt: Cache) -> None:
        """Copy the columns of a prompt that was computed alone, in a cache of one row."""
        n = prompt.length
        self.keys[:, row, :, :n], self.values[:, row, :, :n] = prompt.keys[:, 0, :, :n], prompt.values[:, 0, :, :n]
        self.lengths[row] = n
        self.length = max(self.length, n)

    def advance(self) -> list[int]:
        """Make room for a token of each row; returns the rows' lengths with it.

        Raises:
            InputError: a row is full.
        """
        if self.length == self.keys.shape[3]:
            raise InputError(f"a row of {self.length} columns is full", where="cache", hint="Make it longer")
        self.lengths, self.length = self.lengths + 1, self.length + 1
        lengths: list[int] = self.lengths.tolist()
        return lengths

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write this call's keys and values [B, K, 1, D]; returns the whole rows [B, K, S, D], of which
        `lengths` columns are in use."""
        rows, columns = torch.arange(len(self.lengths), device=k.device), self.lengths - 1  # [B], [B]
        self.keys[layer, rows, :, columns] = k[:, :, 0]
        self.values[layer, rows, :, columns] = v[:, :, 0]
        return self.keys[layer], self.values[layer]

    def keep_rows(self, rows: list[int]) -> None:
        super().keep_rows(rows)
        self.lengths = self.lengths[rows]
