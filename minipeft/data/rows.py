"""Which documents fill which row: examples cut or joined into documents, and documents placed in rows of T tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from minipeft.data.encoded import Array, Encoded
from minipeft.data.tokens import Tokenizer
from minipeft.documents import IGNORED
from minipeft.errors import InputError

BLOCK = 8192  # documents whose targets are counted together


@dataclass(frozen=True)
class Documents:
    """Documents as stretches of the flat ids; nothing is copied before a batch is made.

    `responses`: supervise the tokens of `Encoded.supervised`; else all tokens but a document's first.
    """

    encoded: Encoded
    starts: Array  # [documents] int64
    lengths: Array  # [documents] int64
    responses: bool

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> tuple[Array, Array]:
        """A document's ids and labels, two of [tokens]."""
        start, size = int(self.starts[number]), int(self.lengths[number])
        ids = self.encoded.ids[start : start + size]
        return ids, np.where(self.find_targets(start, start + size), ids, IGNORED)

    def find_targets(self, start: int, stop: int) -> Array:
        """Whether each token of a document is supervised; the first never is. -> [tokens] bool"""
        if self.responses:
            bounds = self.encoded.starts
            first, last = int(np.searchsorted(bounds, start, "right")) - 1, int(np.searchsorted(bounds, stop, "left"))
            offset = int(bounds[first])
            found = self.encoded.supervised(first, last)[start - offset : stop - offset].copy()
        else:
            found = np.ones(stop - start, np.bool_)
        found[0] = False
        return found

    def count_targets(self) -> Array:
        """The supervised tokens of each document. -> [documents] int64"""
        if not self.responses:
            return self.lengths - 1
        counts = np.empty(len(self), np.int64)
        for begin in range(0, len(self), BLOCK):
            starts = self.starts[begin : begin + BLOCK]
            stops = starts + self.lengths[begin : begin + BLOCK]
            found = self.find_targets(int(starts[0]), int(stops[-1]))
            found[starts - starts[0]] = False
            edges = np.stack([starts, stops], axis=1).ravel() - starts[0]  # start, stop, start, stop, ...
            sums = np.add.reduceat(np.append(found, False), edges, dtype=np.int64)
            counts[begin : begin + BLOCK] = sums[::2]
        return counts

    def select(self, kept: Array) -> Documents:
        """The documents where `kept` is true."""
        return replace(self, starts=self.starts[kept], lengths=self.lengths[kept])


@dataclass(frozen=True)
class Rows:
    """The documents of each row, by number: row i holds members[starts[i] : starts[i + 1]]."""

    members: Array  # [documents] int64
    starts: Array  # [rows + 1] int64

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> Array:
        return self.members[self.starts[number] : self.starts[number + 1]]


def cut_each(encoded: Encoded, responses: bool, width: int) -> Documents:
    """Take each example as a document, truncated to `width` tokens."""
    return Documents(encoded, encoded.starts[encoded.chosen], np.minimum(encoded.lengths, width), responses)


def join(encoded: Encoded, tokenizer: Tokenizer, responses: bool, width: int) -> Documents:
    """All examples, each ended by EOS, as one text cut every `width` tokens; the tail is a shorter row."""
    eos, encoded = tokenizer.require_eos(), encoded.compact()
    unended = np.flatnonzero((encoded.ids[encoded.starts[1:] - 1] != eos) | (encoded.lengths == 0))
    if len(unended):
        raise InputError("must end with EOS, which separates joined documents", where=f"example {unended[0]}")
    cuts = np.arange(0, len(encoded.ids), width)
    return Documents(encoded, cuts, np.minimum(len(encoded.ids) - cuts, width), responses)


def fill_rows(sizes: Array, width: int) -> Rows:
    """Rows of documents: the longest document first, each into the first row that has room for it.

    Documents of one size are placed together: each row in turn takes as many as fit, which gives the same rows as one
    by one, because a row that was too full stays so. A million documents take seconds.
    """
    order = np.argsort(-np.asarray(sizes), kind="stable")
    ordered = np.asarray(sizes)[order]
    row_of = np.empty(len(order), np.int64)  # of the documents in that order
    free, used = np.full(len(order), width, np.int64), 0  # the room of each row; rows in use
    ends = np.flatnonzero(np.append(np.diff(ordered) != 0, True)) + 1
    for begin, end in zip([0, *ends[:-1].tolist()], ends.tolist()):
        size, many = int(ordered[begin]), end - begin
        more = -(-many // (width // size))  # new rows that suffice, were no other row to take any
        takes = free[: used + more] // size
        takes = np.diff(np.minimum(np.cumsum(takes), many), prepend=0)
        row_of[begin:end] = np.repeat(np.arange(used + more), takes)
        free[: used + more] -= takes * size
        used = max(used, int(row_of[end - 1]) + 1)
    grouped = np.argsort(row_of, kind="stable")
    return Rows(order[grouped], np.searchsorted(row_of[grouped], np.arange(used + 1)))
