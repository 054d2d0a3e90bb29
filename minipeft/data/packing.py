"""Documents -> rows of T tokens: ids, labels, and which document each column belongs to.

    isolated (the default)    ids        a a a E b b b b E c E . .     E = EOS, . = padding
                              documents  0 0 0 0 1 1 1 1 1 2 2 . .     nobody sees another document; positions restart
                              labels     - a a E - b b b E - E - -     - = -100, no loss: the first token is predicted
                                                                       from nothing, padding is nothing
    plain (the paper's)       ids        a a a E b b b b E c E d d     documents joined in order and cut every T;
                              documents  0 0 0 0 0 0 0 0 0 0 0 0 0     all of a row see one another
    one document a row        ids        a a a E .                     no packing; padded to the longest of the batch
                                         b b b b E

`labels[t]` is `ids[t]` or -100: the model, not the data, shifts by one. T = length - virtual_tokens, because the model
puts an adapter's virtual tokens before each row itself. What is cut, padded or left out is counted in the report.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minipeft.data.examples import Example
from minipeft.data.tokens import Tokenizer
from minipeft.errors import InputError
from minipeft.models.attention import PADDING

IGNORED = -100  # a label without loss, as torch's cross_entropy has it

Document = tuple[list[int], list[int]]  # ids and labels, of one length


@dataclass(frozen=True)
class Batch:
    """Rows for one micro-batch, all int64 [B, T]; `labels` are aligned with `ids`, `documents` are as in the essay."""

    ids: Tensor
    labels: Tensor
    documents: Tensor


@dataclass(frozen=True)
class PackReport:
    """Where the tokens went: tokens_in = tokens_out + tokens_cut + tokens_left_out, and rows x T = tokens_out + padded.

    `targets` are the tokens that a loss is taken on. Cut documents lose their end; those left out hold no target, so
    that nothing could be learned from them (a row of plain packing without a target is left out likewise).
    With one document a row `padded` and `fill` are those of the first epoch. `fill` is tokens_out per cell.
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
            lines.append(f"{self.left_out:,} without a token to learn from left out ({self.tokens_left_out:,} tokens)")
        if self.virtual_tokens:
            lines.append(f"{self.virtual_tokens} positions of each row are left to virtual tokens")
        return "\n".join(lines)


class Batches:
    """The batches of a run: `batches[i]` is a function of i >= 0 alone, so that a run can go on from any step.

    Epoch i // len(batches) goes through all rows once, in an order drawn from (seed, epoch), or in their own order
    where `seed` is None. The last batch of an epoch may hold fewer rows. Iterating gives the first epoch.
    `width` None pads to the longest row of each batch.
    """

    def __init__(
        self,
        documents: list[Document],
        rows: list[list[int]],
        *,
        batch: int,
        width: int | None,
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
        order = ordered(len(self.rows), self.seed, epoch)[place * self.batch : (place + 1) * self.batch]
        return self.laid_out([self.rows[row] for row in order.tolist()])

    def laid_out(self, rows: list[list[int]]) -> Batch:
        """Put each row's documents side by side and pad on the right."""
        ids = [[token for d in row for token in self.documents[d][0]] for row in rows]
        labels = [[label for d in row for label in self.documents[d][1]] for row in rows]
        owners = [[place for place, d in enumerate(row) for _ in self.documents[d][0]] for row in rows]
        width = self.width or max(len(row) for row in ids)

        def square(lists: list[list[int]], filling: int) -> Tensor:
            return torch.tensor([row + [filling] * (width - len(row)) for row in lists])  # [B, T]

        return Batch(square(ids, self.pad), square(labels, IGNORED), square(owners, PADDING))

    @property
    def fingerprint(self) -> str:
        """The sha256 of all that decides `batches[i]`: a run may only be resumed on batches with the same one."""
        digest = hashlib.sha256(repr((self.batch, self.width, self.pad, self.seed)).encode())
        for numbers in (*(part for document in self.documents for part in document), *self.rows):
            digest.update(array("q", [len(numbers), *numbers]).tobytes())
        return digest.hexdigest()


def pack(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    length: int = 1024,
    batch: int = 4,
    virtual_tokens: int = 0,
    seed: int = 0,
    loss_mask: str = "all",
    isolate: bool = True,
    shuffle: bool = True,
) -> Batches:
    """Pack examples into rows of `length - virtual_tokens` tokens, `batch` rows a batch.

    `virtual_tokens`: positions that the adapter takes from each row (`model.virtual_tokens`). `loss_mask`: supervise
    "all" tokens or the "response" only. `isolate`: keep documents apart; without it they are joined in order, as the
    paper did.

    Raises:
        InputError: an argument out of range, no examples, or no token left to take a loss on.
    """
    width = check(examples, length, batch, virtual_tokens, seed, loss_mask)
    if isolate:
        documents = [document_of(example, loss_mask, width) for example in examples]
    else:
        documents = joined(examples, tokenizer, loss_mask, width)
    kept = [document for document in documents if learns(document)]
    rows = first_fit([len(ids) for ids, _ in kept], width) if isolate else [[number] for number in range(len(kept))]
    report = reported(examples, documents, kept, rows, len(rows) * width, batch, virtual_tokens)
    order = seed if shuffle else None
    return Batches(kept, rows, batch=batch, width=width, pad=padding_of(tokenizer), seed=order, report=report)


def rows_of_one(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    length: int = 1024,
    batch: int = 4,
    virtual_tokens: int = 0,
    seed: int = 0,
    loss_mask: str = "all",
    shuffle: bool = False,
) -> Batches:
    """Lay out one example a row, in their own order unless `shuffle`: for evaluation, or to train without packing.

    Arguments and errors as for `pack`; a batch is as wide as its longest document, at most `length - virtual_tokens`.
    """
    width = check(examples, length, batch, virtual_tokens, seed, loss_mask)
    documents = [document_of(example, loss_mask, width) for example in examples]
    kept = [document for document in documents if learns(document)]
    rows = [[number] for number in range(len(kept))]
    order = seed if shuffle else None
    sizes = [len(kept[number][0]) for number in ordered(len(kept), order, 0).tolist()]
    groups = [sizes[start : start + batch] for start in range(0, len(sizes), batch)]
    report = reported(examples, documents, kept, rows, sum(len(g) * max(g) for g in groups), batch, virtual_tokens)
    return Batches(kept, rows, batch=batch, width=None, pad=padding_of(tokenizer), seed=order, report=report)


def check(examples: Sequence[Example], length: int, batch: int, virtual_tokens: int, seed: int, loss_mask: str) -> int:
    """Check the arguments of `pack`; return how many tokens a row holds."""
    if not examples:
        raise InputError("no examples to pack", where="examples")
    if batch < 1:
        raise InputError(f"must be at least 1, is {batch}", where="batch")
    if virtual_tokens < 0:
        raise InputError(f"must be at least 0, is {virtual_tokens}", where="virtual_tokens")
    if not 0 <= seed < 2**63:
        raise InputError(f"must be from 0 to 2**63 - 1, is {seed}", where="seed")
    if loss_mask not in ("all", "response"):
        raise InputError(f"must be 'all' or 'response', is {loss_mask!r}", where="loss_mask")
    if length - virtual_tokens < 2:  # one token to see and one to predict
        raise InputError(
            f"{length} leaves {length - virtual_tokens} tokens beside {virtual_tokens} virtual tokens", where="length"
        )
    return length - virtual_tokens


def document_of(example: Example, loss_mask: str, width: int) -> Document:
    """An example's ids and labels, cut to `width`."""
    ids = example.ids[:width]
    silent = max(1, example.prompt_tokens if loss_mask == "response" else 0)  # the first token is never a label
    return ids, [IGNORED] * min(silent, len(ids)) + ids[silent:]


def joined(examples: Sequence[Example], tokenizer: Tokenizer, loss_mask: str, width: int) -> list[Document]:
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


def learns(document: Document) -> bool:
    """Whether a document holds a token to take a loss on."""
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


def reported(
    examples: Sequence[Example],
    documents: list[Document],
    kept: list[Document],
    rows: list[list[int]],
    cells: int,
    batch: int,
    virtual_tokens: int,
) -> PackReport:
    """Count what went into the rows, and what did not."""
    if not kept:
        longest = max(len(example.ids) for example in examples)
        raise InputError(
            f"no token is left to take a loss on (the longest of {len(examples)} documents has {longest} tokens)",
            where="examples",
            hint="Give more room (length), or take the loss on all tokens",
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
        rows=len(rows),
        batches=-(-len(rows) // batch),
        padded=cells - tokens_out,
        fill=tokens_out / cells,
        virtual_tokens=virtual_tokens,
    )


def padding_of(tokenizer: Tokenizer) -> int:
    """The id that padding columns hold. Nobody sees it, so any id of the vocabulary would do."""
    return next(token for token in (tokenizer.pad, tokenizer.eos, 0) if token is not None)


def ordered(count: int, seed: int | None, epoch: int) -> Tensor:
    """The numbers below `count`, shuffled for this epoch, or in order where `seed` is None."""
    if seed is None:
        return torch.arange(count)
    generator = torch.Generator().manual_seed(derived_seed("order", seed, epoch))
    return torch.randperm(count, generator=generator)


def derived_seed(*parts: int | str) -> int:
    """A seed below 2**63 for one purpose, from the run's seed and what the purpose is: the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
