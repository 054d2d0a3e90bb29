"""Pack documents into rows.

Rows have room for `width` tokens. Take the longest document first (of equal lengths the earlier one), and put each into
the first row that has room for it; where none has, open a new row. This is first-fit decreasing: it needs at most
11/9 of the fewest rows, and 2/3 of a row (Dósa 2007).

    sizes [3, 6, 4, 5, 2], width 8     order 1 (6), 3 (5), 2 (4), 0 (3), 4 (2)
                                       rows  [1, 4]  [3, 0]  [2]

Every size is between 1 and width. Return `Rows(members, starts)`, two int64 arrays of numpy: the numbers of the
documents, row by row, in the order in which they were put there; row i holds members[starts[i] : starts[i + 1]], so
that starts has one entry more than there are rows. A loop over documents and rows is right; the library's takes seconds
for a million documents.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from minipeft.tour.exercises.judging import require, require_equal
from minipeft.tour.exercises.record import Answer, Exercise

EXERCISE = Exercise(
    solution="minipeft.data.rows.fill_rows",
    hints=(
        "np.argsort(-sizes, kind='stable') is the order: stable keeps the earlier of two equal ones first.",
        "Keep a list of rows and the free room of each; for each document take the first row with free >= size.",
        "members = the rows joined; starts = 0 and the running sum of their lengths.",
    ),
)


def fill_in_loops(sizes: list[int], width: int) -> list[list[int]]:
    """First-fit decreasing, one document at a time."""
    rows: list[list[int]] = []
    for number in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        for row in rows:
            if sum(sizes[i] for i in row) + sizes[number] <= width:
                row.append(number)
                break
        else:
            rows.append([number])
    return rows


def compare(answer: Answer, sizes: list[int], width: int) -> None:
    """Compare with the loops."""
    packed = answer(np.array(sizes, dtype=np.int64), width)
    require(packed is not None, "the rows are None: does your function return them?")
    starts, members = [int(i) for i in packed.starts], [int(i) for i in packed.members]
    found = [members[start:stop] for start, stop in pairwise(starts)]
    require_equal(found, fill_in_loops(sizes, width), f"the rows of sizes {sizes} in width {width}")
    require(len(members) == len(sizes) and starts[-1] == len(sizes), "members has each document once")


def check_example(fill_rows: Answer) -> None:
    """The example of the text."""
    compare(fill_rows, [3, 6, 4, 5, 2], 8)


def check_equal_sizes(fill_rows: Answer) -> None:
    """Documents of one size, of the size of a row, and one alone."""
    for sizes, width in (([2] * 7, 5), ([4, 4, 4], 4), ([1], 9), ([3, 3, 3, 1, 1], 4)):
        compare(fill_rows, sizes, width)


def check_random(fill_rows: Answer) -> None:
    """300 random lists of documents."""
    draw = np.random.default_rng(0)
    for _ in range(300):
        width = int(draw.integers(3, 20))
        compare(fill_rows, [int(n) for n in draw.integers(1, width + 1, size=int(draw.integers(1, 25)))], width)
