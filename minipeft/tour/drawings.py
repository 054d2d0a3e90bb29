"""Drawings of the tour beside the study's plots: tokens in a row, matrices, bars of two kinds."""

from __future__ import annotations

from collections.abc import Sequence

from minipeft.documents import PADDING, VIRTUAL
from minipeft.study.charts import escape
from minipeft.study.explorer import name_owner, show_blanks
from minipeft.tour.values import Drawing

SIDE = 22  # of a matrix' cell


def sign_owner(owner: int) -> str:
    """The sign of a column's owner, as in documents.py."""
    return {PADDING: ".", VIRTUAL: "V"}.get(owner, str(owner))


def draw_tokens(texts: Sequence[str], owners: Sequence[int], words: str) -> Drawing:
    """Draw tokens one after the other, underlined in the colour of their document."""
    cells = "".join(
        f'<b class="{name_owner(owner)}">{escape(show_blanks(text))}</b>' for text, owner in zip(texts, owners)
    )
    return Drawing(f'<div class="cells">{cells}</div><p>{escape(words)}</p>', words)


def draw_row(owners: Sequence[int], words: str) -> Drawing:
    """Draw a packed row as one bar, a stretch for each document."""
    total, parts, at = len(owners), [], 0
    for place in range(1, total + 1):
        if place == total or owners[place] != owners[at]:
            x, width = 100 * at / total, 100 * (place - at) / total
            kind, sign = name_owner(owners[at]), sign_owner(owners[at])
            parts.append(f'<rect x="{x:.2f}%" width="{max(0.3, width - 0.4):.2f}%" y="26" height="18" class="{kind}"/>')
            parts.append(f'<text x="{x + width / 2:.2f}%" y="20" text-anchor="middle" class="tick">{sign}</text>')
            at = place
    svg = f'<svg width="100%" height="48" role="img" aria-label="{escape(words)}">{"".join(parts)}</svg>'
    return Drawing(f"{svg}<p>{escape(words)}</p>", words)


def draw_matrix(
    weights: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], kinds: Sequence[str], words: str
) -> Drawing:
    """Draw a matrix of values in [0, 1]: the darker a cell, the larger. `kinds`: the class of each column."""
    parts = [
        f'<text x="{SIDE * (c + 1.5):.0f}" y="15" text-anchor="middle" class="tick">{escape(text)}</text>'
        for c, text in enumerate(columns)
    ]
    for r, (name, line) in enumerate(zip(rows, weights)):
        y = SIDE * (r + 1)
        parts.append(f'<text x="15" y="{y + 15}" text-anchor="middle" class="tick">{escape(name)}</text>')
        for c, weight in enumerate(line):
            x = SIDE * (c + 1)
            parts.append(f'<rect x="{x}" y="{y}" width="{SIDE - 1}" height="{SIDE - 1}" class="dp" fill-opacity=".5"/>')
            if weight > 0.004:
                at = f'x="{x}" y="{y}" width="{SIDE - 1}" height="{SIDE - 1}"'
                parts.append(f'<rect {at} class="{kinds[c]}" fill-opacity="{weight:.2f}"/>')
    width, height = SIDE * (len(columns) + 1), SIDE * (len(rows) + 1)
    svg = (
        f'<svg viewBox="0 0 {width} {height}" style="width:100%;max-width:{1.4 * width:.0f}px" role="img" '
        f'aria-label="{escape(words)}">{"".join(parts)}</svg>'
    )
    return Drawing(f"{svg}<p>{escape(words)}</p>", words)
