"""Batch-invariant training: the documents of a step, each in a batch of its own.

A gradient sums over all rows of a batch, and a product of M rows may round differently from one of M': the bits of a
document's part in a step depend on its neighbours, on padding and on the length of a row. With `batch_invariant` each
document is a batch [1, n], whose loss and gradient have the same bits wherever it was packed. A step sums them in an
order that their content determines, and divides once, so that a set of documents has one gradient:

    gradient = (g(d_1) + g(d_2) + ... + g(d_k)) / supervised tokens        d_1 ... d_k ordered by sha256

The hash also seeds a document's dropout. Small products make training slower (docs/performance.md).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minipeft.data.packing import Batch
from minipeft.documents import PADDING, VIRTUAL
from minipeft.errors import InputError
from minipeft.models.loss import count_targets


@dataclass(frozen=True)
class Document:
    """A document as a batch [1, n]; equal documents are numbered: name = (sha256, 0), (sha256, 1), ..."""

    batch: Batch
    name: tuple[str, int]


def split_documents(batches: Sequence[Batch], where: str) -> list[Document]:
    """The documents of all batches in the order of their names; those without a supervised token are left out.

    Raises:
        InputError: a row's document is in two pieces, or has virtual tokens: it is not a run of columns.
    """
    found = [document for batch in batches for document in cut_rows(batch, where) if count_targets(document.labels)]
    seen: Counter[str] = Counter()
    named = []
    for document in found:
        digest = hashlib.sha256(document.ids.numpy().tobytes() + document.labels.numpy().tobytes()).hexdigest()
        named.append(Document(document, (digest, seen[digest])))
        seen[digest] += 1
    return sorted(named, key=lambda document: document.name)


def cut_rows(batch: Batch, where: str) -> list[Batch]:
    """Cut each row into its documents, and leave out padding. [B, T] -> [1, n] each

    Raises:
        InputError: as `split_documents`.
    """
    cut = []
    for ids, labels, documents in zip(batch.ids, batch.labels, batch.documents):  # [T] each
        owners, lengths = torch.unique_consecutive(documents.cpu(), return_counts=True)
        real = [owner for owner in owners.tolist() if owner != PADDING]
        if VIRTUAL in real or len(set(real)) < len(real):
            problem = "holds virtual tokens" if VIRTUAL in real else "holds a document in two pieces"
            raise InputError(f"a row {problem}, which batch_invariant cannot compute alone", where=where)
        parts = (t.cpu().long().split(lengths.tolist()) for t in (ids, labels))
        for owner, own_ids, own_labels in zip(owners.tolist(), *parts):
            if owner != PADDING:
                cut.append(Batch(own_ids[None], own_labels[None], torch.zeros_like(own_ids)[None]))
    return cut
