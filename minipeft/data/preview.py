"""The first rows of a data set as an HTML table, which a notebook shows."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from itertools import islice

SHOWN, LONGEST = 5, 100  # rows, and characters of a cell


def draw_rows(title: str, rows: Iterable[Mapping[str, str]]) -> str:
    """Render the first rows; the fields of the first are the columns."""
    first = list(islice(rows, SHOWN))
    columns = list(first[0]) if first else []
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "".join(
        f"<tr>{''.join(f'<td>{cut_cell(row.get(name, chr(0x2014)))}</td>' for name in columns)}</tr>" for row in first
    )
    return f"<p>{html.escape(title)}</p><table><tr>{head}</tr>{body}</table>"


def cut_cell(text: str) -> str:
    """A cell's text, cut to LONGEST characters and escaped."""
    return html.escape(text if len(text) <= LONGEST else f"{text[:LONGEST]}…")
