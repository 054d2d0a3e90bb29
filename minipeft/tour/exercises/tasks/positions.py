"""Positions behind virtual tokens.

`documents` [B, S] says who owns each column: 0, 1, 2, ... a document; PADDING (-1) nobody; VIRTUAL (-2) a virtual
token. The position of a column follows from it:

    documents   V V 0 0 0 1 1 . .          V = VIRTUAL, . = PADDING;  P = 2 virtual tokens in this row
    positions   0 1 2 3 4 2 3 0 0

A run is consecutive columns of one owner, so that documents 0 0 1 1 0 hold three runs. Each run is counted anew: a run
of virtual tokens 0, 1, 2, ..., a document's from P, the number of VIRTUAL columns of its row. Padding stands at 0.

Return int64 [B, S]. Loops over rows and columns are right; the library does it without.
"""

from __future__ import annotations

import torch

from minipeft.documents import PADDING, VIRTUAL
from minipeft.tour.exercises.judging import require_close, require_equal
from minipeft.tour.exercises.record import Answer, Exercise

EXERCISE = Exercise(
    solution="minipeft.documents.positions_in",
    hints=(
        "With loops: keep the owner of the column before, and count from 0 where it differs.",
        "P is (documents == VIRTUAL).sum(dim=1), one number a row: rows of a batch may differ.",
        "Without loops: at each column that opens a run write its index, else 0; the running maximum (cummax) is the "
        "index at which the column's run began.",
    ),
)


def check_drawing(positions_in: Answer) -> None:
    """The row that is drawn in the text."""
    documents = torch.tensor([[VIRTUAL, VIRTUAL, 0, 0, 0, 1, 1, PADDING, PADDING]])
    require_close(positions_in(documents), torch.tensor([[0, 1, 2, 3, 4, 2, 3, 0, 0]]), "the positions", 0)


def check_plain(positions_in: Answer) -> None:
    """One document without virtual tokens: 0, 1, 2, ..."""
    require_close(positions_in(torch.zeros(2, 5, dtype=torch.int64)), torch.arange(5).expand(2, 5), "the positions", 0)


def check_left_padding(positions_in: Answer) -> None:
    """Padding on the left does not move a document, and rows differ."""
    documents = torch.tensor([[PADDING, PADDING, 0, 0], [VIRTUAL, 0, 0, 0], [0, 1, 1, 0]])
    expected = torch.tensor([[0, 0, 0, 1], [0, 1, 2, 3], [0, 0, 1, 0]])
    require_close(positions_in(documents), expected, "the positions", 0)


def check_random_rows(positions_in: Answer) -> None:
    """200 random rows, counted in loops."""
    generator = torch.Generator().manual_seed(0)
    documents = torch.randint(-2, 3, (200, 12), generator=generator)
    expected = []
    for row in documents.tolist():
        virtual, count, places = row.count(VIRTUAL), 0, []
        for column, owner in enumerate(row):
            count = count + 1 if column and owner == row[column - 1] else 0
            places.append(0 if owner == PADDING else count + (0 if owner == VIRTUAL else virtual))
        require_equal(positions_in(torch.tensor([row])).tolist(), [places], f"the positions in documents {row}")
        expected.append(places)
    require_close(positions_in(documents), torch.tensor(expected), "the positions of all rows together", 0)
