"""Who sees whom in a packed row.

    visible = column_k <= column_q  and  ( (document_k == document_q and within the window)  or  document_k == VIRTUAL )

    a row with P = 2 virtual tokens,         keys  V V 0 0 0 1 1 .      (V = VIRTUAL, . = PADDING)
    two documents and one pad          query 0     # # #
                                             0     # # # #
                                             0     # # # # #
                                             1     # #       #
                                             1     # #       # #
                                             .     # #           #

`documents` and `positions` are [B, S], of all key columns; the queries are the last `queries` = T of them. Within the
window means position_q - position_k < window; None is no window. A window does not hide virtual tokens, unless
`windowed`. Return a bool mask [B, 1, T, S], True where the query may look. Sources: Vaswani et al. 2017, section 3.2.3
(causal); Beltagy et al. 2020 (window).
"""

from __future__ import annotations

import torch
from torch import Tensor

from minipeft.documents import PADDING, VIRTUAL, positions_in
from minipeft.tour.exercises.judging import require_close, require_dtype
from minipeft.tour.exercises.record import Answer, Exercise

EXERCISE = Exercise(
    solution="minipeft.documents.visible",
    hints=(
        "Make three masks [B, T, S] or of shapes that broadcast to it: causal, own document, virtual.",
        "documents[:, -T:, None] == documents[:, None, :] compares each query with each key.",
        "With a window: own = own & near, and virtual = virtual & near only if windowed. At the end [:, None].",
    ),
)


def look_in_loops(documents: Tensor, positions: Tensor, queries: int, window: int | None, windowed: bool) -> Tensor:
    """The rule for one pair of columns at a time."""
    rows, columns = documents.shape
    mask = torch.zeros(rows, 1, queries, columns, dtype=torch.bool)
    for b in range(rows):
        for t in range(queries):
            q = columns - queries + t
            for k in range(q + 1):
                near = window is None or int(positions[b, q] - positions[b, k]) < window
                if documents[b, k] == VIRTUAL:
                    mask[b, 0, t, k] = near or not windowed
                else:
                    mask[b, 0, t, k] = near and bool(documents[b, k] == documents[b, q])
    return mask


def compare(visible: Answer, documents: Tensor, queries: int, window: int | None, windowed: bool) -> None:
    """Compare with the loops."""
    positions = positions_in(documents)
    mask = visible(documents, positions, queries, window, windowed)
    expected = look_in_loops(documents, positions, queries, window, windowed)
    require_dtype(mask, torch.bool, "the mask")
    what = f"the mask with queries={queries}, window={window}, windowed={windowed}"
    require_close(mask.int(), expected.int(), what, 0)


ROW = torch.tensor([[VIRTUAL, VIRTUAL, 0, 0, 0, 1, 1, PADDING]])


def check_drawing(visible: Answer) -> None:
    """The row that is drawn in the text, with its six queries."""
    compare(visible, ROW, 6, None, False)


def check_decoding(visible: Answer) -> None:
    """One query at the end, as in decoding; and all columns as queries."""
    compare(visible, ROW[:, :-1], 1, None, False)
    compare(visible, ROW, 8, None, False)


def check_window(visible: Answer) -> None:
    """A window hides what is far, but virtual tokens only if windowed."""
    for window in (1, 2, 3):
        for windowed in (False, True):
            compare(visible, ROW, 6, window, windowed)


def check_random_rows(visible: Answer) -> None:
    """Random rows of two, with and without a window."""
    generator = torch.Generator().manual_seed(0)
    for window in (None, 1, 3):
        documents = torch.randint(-2, 2, (2, 9), generator=generator)
        for windowed in (False, True):
            compare(visible, documents, 7, window, windowed)


def check_columns(visible: Answer) -> None:
    """The future is hidden by column, not by position: a column whose position is smaller stays hidden."""
    documents, positions = torch.zeros(1, 4, dtype=torch.int64), torch.tensor([[0, 1, 0, 1]])
    mask = visible(documents, positions, 4, None, False)
    require_close(mask.int(), torch.ones(4, 4).tril().int()[None, None], "the mask", 0)
