"""Documents -> rows of T tokens: ids, labels, and which document each column belongs to.

    isolated (the default)    ids        a a a E b b b b E c E . .     E = EOS, . = padding
                              documents  0 0 0 0 1 1 1 1 1 2 2 . .     no document sees another; positions restart
                              labels     - a a E - b b b E - E - -     - = -100, no loss: the first token is predicted
                                                                       from nothing, padding is nothing
    plain (the paper's)       ids        a a a E b b b b E c E d d     documents joined in order and cut every T;
                              documents  0 0 0 0 0 0 0 0 0 0 0 0 0     all of a row see one another

`labels[t]` is `ids[t]` or -100: the model, not the data, shifts by one. T = length - virtual_tokens, because the model
itself puts an adapter's virtual tokens before each row. The report counts what is cut, padded or left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minipeft.data.encoded import Array, Encoded, Example, as_arrays
from minipeft.data.rows import Documents, Rows, cut_each, fill_rows, join
from minipeft.data.tokens import Tokenizer
from minipeft.documents import IGNORED, PADDING, derive_seed
from minipeft.errors import InputError, check_fields, check_items, check_methods, check_value, format_value, option

LENGTH = 1024  # tokens of a row, as in the paper
LOSS_MASKS = ("all", "response")
MOST = 2**20  # rows of a batch, and tokens of a row


@dataclass(frozen=True)
class PackConfig:
    """How examples become rows."""

    length: int | None = option(
        None, "tokens of a row, virtual tokens included; default 1024 or the context", least=1, limit=MOST
    )
    batch: int = option(1, "rows of a batch", least=1, limit=MOST)
    isolate: bool = option(
        True, "documents of a row do not see each other; without it they are joined, as in the paper"
    )
    loss_mask: str = option("all", "tokens that the loss is taken on", choices=LOSS_MASKS, aliases=("loss",))

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Batch:
    """Rows for one micro-batch, all int64 [B, T]; `labels` are aligned with `ids`, `documents` as in documents.py."""

    ids: Tensor
    labels: Tensor
    documents: Tensor

    def __repr__(self) -> str:
        shape = lambda value: list(value.shape) if isinstance(value, Tensor) else value
        return f"Batch(ids {shape(self.ids)}, labels {shape(self.labels)}, documents {shape(self.documents)})"


@dataclass(frozen=True)
class PackReport:
    """Where the tokens went: tokens_in = tokens_out + tokens_cut + tokens_left_out, and rows x T = tokens_out + padded.

    `targets` are the supervised tokens. Cut documents lose their end; those without a target are left out, and so are
    rows of plain packing without one. `fill` is tokens_out / (rows x T).
    """

    documents: int
    tokens_in: int
    tokens_out: int
    targets: int
    documents_cut: int
    tokens_cut: int
    left_out: int
    tokens_left_out: int
    rows: int
    batches: int
    padded: int
    fill: float
    virtual_tokens: int

    def __str__(self) -> str:
        said = f"{self.documents:,} documents of {self.tokens_in:,} tokens"
        lines = [
            f"{said} -> {self.rows:,} rows in {self.batches:,} batches, {self.fill:.1%} full",
            f"{self.tokens_out:,} tokens kept, {self.targets:,} of them with a loss; {self.padded:,} padded",
        ]
        if self.documents_cut:
            lines.append(
                f"{self.documents_cut:,} documents were too long: {self.tokens_cut:,} tokens cut off their ends"
            )
        if self.left_out:
            lines.append(f"{self.left_out:,} without a supervised token left out ({self.tokens_left_out:,} tokens)")
        if self.virtual_tokens:
            lines.append(f"{self.virtual_tokens} positions of each row are reserved for virtual tokens")
        return "\n".join(lines)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))


class Batches:
    """All batches of a training: `batches[i]` is a function of i >= 0 alone, so that training can go on from any step.

    Epoch i // len(batches) goes through all rows once, in an order drawn from (seed, epoch), or in their own order
    where `seed` is None. The last batch of an epoch may hold fewer rows. Iterating gives the first epoch.
    """

    def __init__(
        self,
        documents: Documents,
        rows: Rows,
        *,
        batch: int,
        width: int,
        pad: int,
        seed: int | None,
        report: PackReport,
    ):
        self.documents, self.rows = documents, rows
        self.batch, self.width, self.pad, self.seed = batch, width, pad, seed
        self.report = report

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch)

    def __repr__(self) -> str:
        shape = f"{len(self):,} batches of {self.batch:,} rows of {self.width:,} tokens"
        return f"Batches({shape}, {100 * self.report.fill:.1f} % full)"

    def __iter__(self) -> Iterator[Batch]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Batch:
        if number < 0:
            raise IndexError(f"batches are counted from 0, not {number}")
        epoch, place = divmod(number, len(self))
        order = draw_order(len(self.rows), self.seed, epoch)[place * self.batch : (place + 1) * self.batch]
        return self.batch_of([self.rows[row] for row in order.tolist()])

    def batch_of(self, rows: list[Array]) -> Batch:
        """Put each row's documents side by side and pad on the right."""
        shape = (len(rows), self.width)
        ids, labels, owners = (np.full(shape, filling) for filling in (self.pad, IGNORED, PADDING))  # [B, T] int64
        for row, numbers in enumerate(rows):
            column = 0
            for place, number in enumerate(numbers.tolist()):
                tokens, targets = self.documents[number]
                end = column + len(tokens)
                ids[row, column:end], labels[row, column:end], owners[row, column:end] = tokens, targets, place
                column = end
        return Batch(*map(torch.from_numpy, (ids, labels, owners)))


def pack(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    length: int = LENGTH,
    batch: int = 4,
    virtual_tokens: int = 0,
    seed: int = 0,
    loss_mask: str = "all",
    isolate: bool = True,
    shuffle: bool = True,
) -> Batches:
    """Pack examples into rows of `length - virtual_tokens` tokens, `batch` rows a batch.

    `virtual_tokens`: positions that the adapter takes from each row (`model.virtual_tokens`). `loss_mask`: supervise
    "all" tokens or the "response" only. `isolate`: no document sees another; without it they are joined in order, as
    in the paper. `shuffle`: in an order drawn from the seed, another in each epoch.

    Raises:
        InputError: an argument out of range, no examples, an id beyond the tokenizer's, or no token left to take a
            loss on.
    """
    check_value(length, int, {}, "length")
    config = PackConfig(length, batch, isolate, loss_mask)
    check_value(virtual_tokens, int, {"least": 0}, "virtual_tokens")
    check_value(seed, int, {"least": 0, "below": 2**63}, "seed")
    check_value(shuffle, bool, {}, "shuffle")
    width = measure_row(length, virtual_tokens)
    check_methods(tokenizer, ("size", "require_eos", "eos", "pad"), "Tokenizer", "tokenizer")
    check_examples(examples, tokenizer.size)
    encoded = as_arrays(examples)
    responses = config.loss_mask == "response" or encoded.trained is not None
    documents = cut_each(encoded, responses, width) if isolate else join(encoded, tokenizer, responses, width)
    targets = documents.count_targets()
    kept = documents.select(targets > 0)
    check_kept(encoded, kept)
    rows = fill_rows(kept.lengths, width) if isolate else Rows(np.arange(len(kept)), np.arange(len(kept) + 1))
    report = make_report(encoded, documents, kept, int(targets.sum()), len(rows), width, batch, virtual_tokens)
    order = seed if shuffle else None
    return Batches(kept, rows, batch=batch, width=width, pad=choose_padding(tokenizer), seed=order, report=report)


def check_examples(examples: Sequence[Example], size: int) -> None:
    """Check that there are examples, each of ids below `size`.

    Raises:
        InputError: names the first that is not.
    """
    if isinstance(examples, Encoded):
        if len(examples.ids) and not (examples.ids.min() >= 0 and examples.ids.max() < size):
            strange = examples.ids[(examples.ids < 0) | (examples.ids >= size)][0]
            raise InputError(f"id {strange} is not one of the tokenizer's {size:,}", where="examples")
        return
    for number, example in enumerate(check_items(examples, Example, "examples")):
        where, ids, prompt = f"example {number}", example.ids, example.prompt_tokens
        if not isinstance(ids, list) or not set(map(type, ids)) <= {int}:
            raise InputError(f"its ids must be a list of integers, not {format_value(ids, 60)}", where=where)
        if ids and not (min(ids) >= 0 and max(ids) < size):
            strange = next(i for i in ids if not 0 <= i < size)
            raise InputError(f"id {format_value(strange)} is not one of the tokenizer's {size:,}", where=where)
        check_value(prompt, int, {"least": 0}, f"{where}: prompt_tokens")
    if not len(examples):
        raise InputError("no examples to pack", where="examples")


def measure_row(length: int, virtual_tokens: int) -> int:
    """The tokens of a row that are left for documents.

    Raises:
        InputError: fewer than two, one to see and one to predict.
    """
    if length - virtual_tokens < 2:
        problem = f"{length} leaves {length - virtual_tokens} tokens beside {virtual_tokens} virtual tokens"
        raise InputError(problem, where="length")
    return length - virtual_tokens


def check_kept(encoded: Encoded, kept: Documents) -> None:
    """Refuse documents of which none has a supervised token.

    Raises:
        InputError: with the length of the longest.
    """
    if not len(kept):
        longest = int(encoded.lengths.max())
        raise InputError(
            f"no token is left to take a loss on (the longest of {len(encoded)} documents has {longest} tokens)",
            where="examples",
            hint="Raise length, or take the loss on all tokens",
        )


def make_report(
    encoded: Encoded,
    documents: Documents,
    kept: Documents,
    targets: int,
    rows: int,
    width: int,
    batch: int,
    virtual_tokens: int,
) -> PackReport:
    """Count the tokens that went into the rows, and those that did not."""
    tokens_in = int(encoded.lengths.sum())
    tokens_cut = tokens_in - int(documents.lengths.sum())
    tokens_out = int(kept.lengths.sum())
    return PackReport(
        documents=len(encoded),
        tokens_in=tokens_in,
        tokens_out=tokens_out,
        targets=targets,
        documents_cut=int((encoded.lengths > width).sum()) if tokens_cut else 0,
        tokens_cut=tokens_cut,
        left_out=len(documents) - len(kept),
        tokens_left_out=tokens_in - tokens_cut - tokens_out,
        rows=rows,
        batches=-(-rows // batch),
        padded=rows * width - tokens_out,
        fill=tokens_out / (rows * width),
        virtual_tokens=virtual_tokens,
    )


def choose_padding(tokenizer: Tokenizer) -> int:
    """The id in padding columns. No document sees it, so any id of the vocabulary works."""
    return next(token for token in (tokenizer.pad, tokenizer.eos, 0) if token is not None)


@lru_cache(maxsize=2)
def draw_order(count: int, seed: int | None, epoch: int) -> Tensor:
    """The numbers below `count`, shuffled for this epoch, or in order where `seed` is None."""
    if seed is None:
        return torch.arange(count)
    generator = torch.Generator().manual_seed(derive_seed("order", seed, epoch))
    return torch.randperm(count, generator=generator)
