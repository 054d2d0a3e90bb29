"""Pad prompts on the left.

Prompts of different lengths are answered in one batch. Each new token is written behind the last column, so the prompts
must all end there: the padding stands on the left.

    rows [[5, 6, 7], [8]]      ids        5 6 7        documents   0 0 0        . = PADDING (-1), f = filling
                                          f f 8                    . . 0

Return ids and documents, two int64 tensors [B, T] with T the longest prompt. `documents` says that nobody owns the
padding, so that no token sees it and positions begin at the prompt. `filling` may be any id, also one that a prompt
holds: never decide by the id what is padding.
"""

from __future__ import annotations

import torch

from minipeft.documents import PADDING
from minipeft.tour.exercises.judging import require_close, require_dtype
from minipeft.tour.exercises.record import Answer, Exercise

EXERCISE = Exercise(
    solution="minipeft.decoding.pad_left",
    hints=("T is the longest of the rows' lengths.", "[filling] * (T - len(row)) + row is a row of ids."),
)


def check_example(pad_left: Answer) -> None:
    """The example of the text."""
    ids, documents = pad_left([[5, 6, 7], [8]], 3)
    require_close(ids, torch.tensor([[5, 6, 7], [3, 3, 8]]), "ids", 0)
    require_close(documents, torch.tensor([[0, 0, 0], [PADDING, PADDING, 0]]), "documents", 0)
    require_dtype(ids, torch.int64, "ids")
    require_dtype(documents, torch.int64, "documents")


def check_filling(pad_left: Answer) -> None:
    """A prompt that holds the filling keeps it."""
    ids, documents = pad_left([[3, 3], [1, 3, 3], [3]], 3)
    require_close(ids, torch.tensor([[3, 3, 3], [1, 3, 3], [3, 3, 3]]), "ids", 0)
    require_close(documents, torch.tensor([[PADDING, 0, 0], [0, 0, 0], [PADDING, PADDING, 0]]), "documents", 0)


def check_equal(pad_left: Answer) -> None:
    """Prompts of one length are not padded."""
    ids, documents = pad_left([[4, 2], [0, 9]], 7)
    require_close(ids, torch.tensor([[4, 2], [0, 9]]), "ids", 0)
    require_close(documents, torch.zeros(2, 2, dtype=torch.int64), "documents", 0)
