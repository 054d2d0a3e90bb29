"""Documents -> rows of T tokens: ids, labels, and which document each column belongs to.

    isolated (the default)    ids        a a a E b b b b E c E . .     E = EOS, . = padding
                              documents  0 0 0 0 1 1 1 1 1 2 2 . .     nobody sees another document; positions restart
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

import torch
from torch import Tensor

from minipeft.data.examples import Example
from minipeft.data.tokens import Tokenizer
from minipeft.documents import IGNORED, PADDING, derived_seed
from minipeft.errors import InputError, check_fields, check_items, check_methods, check_value, option, shown

LENGTH = 1024  # tokens of a row, as in the paper
LOSS_MASKS = ("all", "response")
MOST = 2**20  # rows of a batch, and tokens of a row

Document = tuple[list[int], list[int]]  # ids and labels, of one length


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


class Batches:
    """All batches of a training: `batches[i]` is a function of i >= 0 alone, so that training can go on from any step.

    Epoch i // len(batches) goes through all rows once, in an order drawn from (seed, epoch), or in their own order
    where `seed` is None. The last batch of an epoch may hold fewer rows. Iterating gives the first epoch.
    """

    def __init__(
        self,
        documents: list[Document],
        rows: list[list[int]],
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

    def __iter__(self) -> Iterator[Batch]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Batch:
        if number < 0:
            raise IndexError(f"batches are counted from 0, not {number}")
        epoch, place = divmod(number, len(self))
        order = draw_order(len(self.rows), self.seed, epoch)[place * self.batch : (place + 1) * self.batch]
        return self.batch_of([self.rows[row] for row in order.tolist()])

    def batch_of(self, rows: list[list[int]]) -> Batch:
        """Put each row's documents side by side and pad on the right."""
        ids = [[token for d in row for token in self.documents[d][0]] for row in rows]
        labels = [[label for d in row for label in self.documents[d][1]] for row in rows]
        owners = [[place for place, d in enumerate(row) for _ in self.documents[d][0]] for row in rows]

        def pad(lists: list[list[int]], filling: int) -> Tensor:
            return torch.tensor([row + [filling] * (self.width - len(row)) for row in lists])  # [B, T]

        return Batch(pad(ids, self.pad), pad(labels, IGNORED), pad(owners, PADDING))


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
    width = row_width(length, virtual_tokens)
    check_methods(tokenizer, ("size", "require_eos", "eos", "pad"), "Tokenizer", "tokenizer")
    check_examples(examples, tokenizer.size)
    if isolate:
        documents = [document_of(example, config.loss_mask, width) for example in examples]
    else:
        documents = join(examples, tokenizer, config.loss_mask, width)
    kept = [document for document in documents if has_target(document)]
    rows = first_fit([len(ids) for ids, _ in kept], width) if isolate else [[number] for number in range(len(kept))]
    report = count(examples, documents, kept, len(rows), width, batch, virtual_tokens)
    order = seed if shuffle else None
    return Batches(kept, rows, batch=batch, width=width, pad=padding_of(tokenizer), seed=order, report=report)


def check_examples(examples: Sequence[Example], size: int) -> None:
    """Check that there are examples, each of ids below `size`.

    Raises:
        InputError: names the first that is not.
    """
    for number, example in enumerate(check_items(examples, Example, "examples")):
        where, ids, prompt = f"example {number}", example.ids, example.prompt_tokens
        if not isinstance(ids, list) or not set(map(type, ids)) <= {int}:
            raise InputError(f"its ids must be a list of integers, not {shown(ids, 60)}", where=where)
        if ids and not (min(ids) >= 0 and max(ids) < size):
            strange = next(i for i in ids if not 0 <= i < size)
            raise InputError(f"id {shown(strange)} is not one of the tokenizer's {size:,}", where=where)
        check_value(prompt, int, {"least": 0}, f"{where}: prompt_tokens")
    if not len(examples):
        raise InputError("no examples to pack", where="examples")


def row_width(length: int, virtual_tokens: int) -> int:
    """How many tokens of a row are left to documents.

    Raises:
        InputError: fewer than two, one to see and one to predict.
    """
    if length - virtual_tokens < 2:
        problem = f"{length} leaves {length - virtual_tokens} tokens beside {virtual_tokens} virtual tokens"
        raise InputError(problem, where="length")
    return length - virtual_tokens


def document_of(example: Example, loss_mask: str, width: int) -> Document:
    """An example's ids and labels, cut to `width`."""
    ids = example.ids[:width]
    silent = max(1, example.prompt_tokens if loss_mask == "response" else 0)  # the first token is never a label
    return ids, [IGNORED] * min(silent, len(ids)) + ids[silent:]


def join(examples: Sequence[Example], tokenizer: Tokenizer, loss_mask: str, width: int) -> list[Document]:
    """All examples, each ended by EOS, as one text cut every `width` tokens; the tail is a shorter row."""
    eos = tokenizer.require_eos()
    for number, example in enumerate(examples):
        if example.ids[-1:] != [eos]:
            raise InputError("must end with EOS, which separates joined documents", where=f"example {number}")
    ids = [token for example in examples for token in example.ids]
    labels = list(ids)
    start = 0
    for example in examples:
        if loss_mask == "response":
            labels[start : start + example.prompt_tokens] = [IGNORED] * example.prompt_tokens
        start += len(example.ids)
    cuts = range(0, len(ids), width)
    return [(ids[cut : cut + width], [IGNORED, *labels[cut + 1 : cut + width]]) for cut in cuts]


def has_target(document: Document) -> bool:
    """Whether a document has a supervised token."""
    return any(label != IGNORED for label in document[1])


def first_fit(sizes: Sequence[int], width: int) -> list[list[int]]:
    """Rows of documents, by number: the longest document first, each into the first row that has room for it.

    `free` is a binary tree over the rows, written level by level: a node holds the most room that any row below it
    has. One walk down it finds the first row that fits: 100,000 documents take a second, not an hour.
    """
    leaves = 1 << (len(sizes) - 1).bit_length()  # as many rows as documents suffice
    free = [width] * (2 * leaves)  # node n has the children 2n and 2n + 1; the rows are the last `leaves` nodes
    rows: list[list[int]] = []
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        node = 1
        while node < leaves:
            node = 2 * node if free[2 * node] >= sizes[number] else 2 * node + 1
        if node - leaves == len(rows):
            rows.append([])
        rows[node - leaves].append(number)
        free[node] -= sizes[number]
        while node > 1:
            node //= 2
            free[node] = max(free[2 * node], free[2 * node + 1])
    return rows


def count(
    examples: Sequence[Example],
    documents: list[Document],
    kept: list[Document],
    rows: int,
    width: int,
    batch: int,
    virtual_tokens: int,
) -> PackReport:
    """Count what went into the rows, and what did not.

    Raises:
        InputError: nothing went into them.
    """
    if not kept:
        longest = max(len(example.ids) for example in examples)
        raise InputError(
            f"no token is left to take a loss on (the longest of {len(examples)} documents has {longest} tokens)",
            where="examples",
            hint="Raise length, or take the loss on all tokens",
        )
    tokens_in = sum(len(example.ids) for example in examples)
    tokens_cut = tokens_in - sum(len(ids) for ids, _ in documents)
    tokens_out = sum(len(ids) for ids, _ in kept)
    return PackReport(
        documents=len(examples),
        tokens_in=tokens_in,
        tokens_out=tokens_out,
        targets=sum(label != IGNORED for _, labels in kept for label in labels),
        documents_cut=sum(len(e.ids) > len(ids) for e, (ids, _) in zip(examples, documents)) if tokens_cut else 0,
        tokens_cut=tokens_cut,
        left_out=len(documents) - len(kept),
        tokens_left_out=tokens_in - tokens_cut - tokens_out,
        rows=rows,
        batches=-(-rows // batch),
        padded=rows * width - tokens_out,
        fill=tokens_out / (rows * width),
        virtual_tokens=virtual_tokens,
    )


def padding_of(tokenizer: Tokenizer) -> int:
    """The id that padding columns hold. No document sees it, so any id of the vocabulary would do."""
    return next(token for token in (tokenizer.pad, tokenizer.eos, 0) if token is not None)


def draw_order(count: int, seed: int | None, epoch: int) -> Tensor:
    """The numbers below `count`, shuffled for this epoch, or in order where `seed` is None."""
    if seed is None:
        return torch.arange(count)
    generator = torch.Generator().manual_seed(derived_seed("order", seed, epoch))
    return torch.randperm(count, generator=generator)
