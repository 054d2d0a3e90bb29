"""The report's plots as HTML and inline SVG: rows of bars and intervals, their axis, and markers.

Widths are percentages and heights are pixels, so that a plot fits a phone without shrinking its text. Nothing depends
on colour alone: bars differ in pattern and points in shape, and each has its name beside it. Names and values are
HTML text, which wraps; no text overlaps a bar or an interval.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minipeft.errors import escape as escape_unprintable

STRIP = 26  # pixels: the height of a row's bar or interval
EDGE = 2.0  # percent of the width that stays free on each side of an interval plot
PATTERNS = (
    '<svg width="0" height="0" aria-hidden="true"><defs><pattern id="stripes" width="6" height="6" '
    'patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><rect width="6" height="6" class="stripe-back"/>'
    '<rect width="2.5" height="6" class="stripe"/></pattern></defs></svg>'
)
SHAPES = {  # of markers, around (0, 0)
    "circle": '<circle r="5"{}/>',
    "square": '<polygon points="-5,-5 5,-5 5,5 -5,5"{}/>',
    "triangle": '<polygon points="0,-6 6,5 -6,5"{}/>',
    "diamond": '<polygon points="0,-7 6,0 0,7 -6,0"{}/>',
    "cross": '<polygon points="-6,-2 -2,-2 -2,-6 2,-6 2,-2 6,-2 6,2 2,2 2,6 -2,6 -2,2 -6,2"{}/>',
    "bowtie": '<polygon points="-6,-6 6,6 6,-6 -6,6"{}/>',
}


@dataclass(frozen=True)
class Bar:
    """One bar: its name, value, interval, label, and kind: tuned (solid), untuned (striped), trivial (outlined)."""

    name: str
    value: float
    low: float
    high: float
    label: str
    kind: str


def escape(value: object) -> str:
    """Escape a text for HTML; control characters and bidirectional marks become visible."""
    pictures = "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in str(value))
    return html.escape(escape_unprintable(pictures, "\n\t"))


def draw_bars(rows: Sequence[Bar], title: str, mark: float | None = None, unit: str = "", scale: float = 1.0) -> str:
    """Draw bars from 0 with intervals; `mark`: a dashed line across all. The axis shows `scale` times a value."""
    most = max([row.high for row in rows] + [mark or 0.0, 1e-9])
    place = lambda value: max(0.0, 100 * value / most)
    found = []
    for row in rows:
        width, low, high = (f"{place(value):.2f}%" for value in (row.value, row.low, row.high))
        body = (
            f'<rect x="0" y="6" width="{width}" height="14" class="bar {row.kind}"/>'
            f'<line x1="{low}" x2="{high}" y1="13" y2="13" class="whisker"/>'
        )
        body += "".join(f'<line x1="{x}" x2="{x}" y1="8" y2="18" class="whisker"/>' for x in (low, high))
        found.append((row, body))
    marks = choose_ticks(0.0, scale * most)
    return draw_rows(found, title, [(tick / scale, f"{tick:g}") for tick in marks], place, mark, unit)


def draw_intervals(rows: Sequence[Bar], title: str, unit: str, scale: float = 1.0) -> str:
    """Draw a point and its interval for each row, on both sides of 0."""
    low, high = min(0.0, *(row.low for row in rows)), max(0.0, *(row.high for row in rows))
    span = (high - low) or 1.0
    place = lambda value: EDGE + (100 - 2 * EDGE) * (value - low) / span
    found = []
    for row in rows:
        left, right, at = (f"{place(value):.2f}%" for value in (row.low, row.high, row.value))
        body = f'<line x1="{left}" x2="{right}" y1="13" y2="13" class="interval"/>'
        body += "".join(f'<line x1="{x}" x2="{x}" y1="7" y2="19" class="interval"/>' for x in (left, right))
        body += put("square", "filled" if row.kind == "tuned" else "open", at, 13)
        found.append((row, body))
    marks = choose_ticks(scale * low, scale * high)
    labels = [(tick / scale, f"{tick:+g}" if tick else "0") for tick in marks]
    return draw_rows(found, title, labels, place, 0.0, unit, "zero")


def draw_rows(
    rows: Sequence[tuple[Bar, str]],
    title: str,
    labels: Sequence[tuple[float, str]],
    place: Callable[[float], float],
    mark: float | None,
    unit: str,
    line: str = "mark",
) -> str:
    """Draw rows of a name, a strip and a label over one axis; the labels repeat what the strips show."""
    grid = "".join(f'<line x1="{x}%" x2="{x}%" y1="0" y2="{STRIP}" class="grid"/>'
                   for x in (f"{place(value):.2f}" for value, _ in labels))  # fmt: skip
    if mark is not None:
        x = f"{place(mark):.2f}%"
        grid += f'<line x1="{x}" x2="{x}" y1="0" y2="{STRIP}" class="{line}"/>'
    parts = [
        f'<div class="row {row.kind}" role="listitem"><span class="name">{escape(row.name)}</span>'
        f'<svg class="strip" width="100%" height="{STRIP}" aria-hidden="true">{grid}{body}</svg>'
        f'<span class="value">{escape(row.label)}</span></div>'
        for row, body in rows
    ]
    texts = "".join(
        f'<text x="{place(value):.2f}%" y="14" text-anchor="{"start" if place(value) < 1 else "middle"}" class="tick">'
        f"{escape(label)}</text>"
        for value, label in labels
    )
    axis = f'<svg width="100%" height="18">{texts}</svg><p class="soft">{escape(unit)}</p>'
    drawn = f'<div class="row" aria-hidden="true"><div class="axis">{axis}</div></div>'
    return f'<div class="rows" role="list" aria-label="{escape(title)}">{"".join(parts)}{drawn}</div>'


def draw_pairs(rows: Sequence[tuple[str, float, float]], title: str, mark: tuple[float, str]) -> str:
    """Draw a filled circle and an open square, joined by a line, for each (name, strict, compat)."""
    most = max([max(strict, compat) for _, strict, compat in rows] + [mark[0]])
    place = lambda value: EDGE + (100 - 2 * EDGE) * value / most
    found = []
    for name, strict, compat in rows:
        a, b = f"{place(strict):.2f}%", f"{place(compat):.2f}%"
        body = f'<line x1="{a}" x2="{b}" y1="13" y2="13" class="whisker"/>'
        body += put("square", "open", b, 13) + put("circle", "filled", a, 13)
        found.append((Bar(name, strict, strict, compat, f"{strict:.3f} / {compat:.3f}", "pair"), body))
    labels = [(tick, f"{tick:g}") for tick in choose_ticks(0.0, most)]
    return draw_rows(found, title, labels, place, mark[0], f"CodeBLEU; dashed: {mark[1]}")


def put(shape: str, kind: str, x: str, y: float) -> str:
    """Place a marker at (x, y)."""
    return f'<svg x="{x}" y="{y:.1f}" overflow="visible">{draw_marker(shape, kind)}</svg>'


def draw_marker(shape: str, kind: str) -> str:
    return SHAPES[shape].format(f' class="{kind}"')


def choose_ticks(low: float, high: float) -> list[float]:
    """Choose two to five round numbers between low and high."""
    for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100):
        if (high - low) / step <= 5:
            return [round(number * step, 6) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return []


def choose_log_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Choose up to `most` round numbers between low and high, both positive, for a logarithmic axis.

    If 1, 2 and 5 times powers of ten give fewer than two, they are evenly spaced.
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        found = [digit * 10.0**power for power in powers for digit in digits if low <= digit * 10.0**power <= high]
        if len(found) <= most:
            break
    if len(found) < 2:
        return [tick for tick in choose_ticks(low, high) if tick > 0]
    return found[:: max(1, -(-len(found) // most))]


def shorten_number(number: float) -> str:
    """Format a number for an axis: 20k, 4M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g}{letter}"
    return f"{number:g}"


def wrap(body: str, height: int, title: str) -> str:
    """Wrap a body in an SVG with a title for screen readers."""
    return f'<svg role="img" width="100%" height="{height}" aria-label="{escape(title)}">{body}</svg>'
