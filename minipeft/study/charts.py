"""The report's plots as inline SVG: no library, no script, no request.

Widths are percentages and heights are pixels, so that a plot fits a phone without its text shrinking. Nothing depends
on colour alone: kinds of bars differ in their pattern, points in their shape, and each has its name beside it.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from minipeft.errors import escape as escape_unprintable

ROW = 44  # pixels: a bar with its line of text
PATTERNS = (
    '<svg width="0" height="0" aria-hidden="true"><defs><pattern id="stripes" width="6" height="6" '
    'patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><rect width="6" height="6" class="stripe-back"/>'
    '<rect width="2.5" height="6" class="stripe"/></pattern></defs></svg>'
)


@dataclass(frozen=True)
class Bar:
    """One bar: its name, value, interval, label, and kind: tuned (solid), untuned (striped), trivial (outlined)."""

    name: str
    value: float
    low: float
    high: float
    label: str
    kind: str


@dataclass(frozen=True)
class Curve:
    """The losses of one training run: (step, nats) of each training step, and on held-out pairs."""

    name: str
    train: Sequence[tuple[float, float]]
    held_out: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """One init: its held-out loss at each learning rate (None: not run), and its marker's shape, open or filled."""

    name: str
    losses: Sequence[float | None]
    shape: str  # circle, square, triangle
    filled: bool

    def marker(self) -> str:
        """The shape around (0, 0)."""
        kind = "filled" if self.filled else "open"
        if self.shape == "circle":
            return f'<circle r="5" class="{kind}"/>'
        points = "-5,-5 5,-5 5,5 -5,5" if self.shape == "square" else "0,-6 6,5 -6,5"
        return f'<polygon points="{points}" class="{kind}"/>'


def escape(value: object) -> str:
    """A text as HTML shows it: nothing in it is markup; control characters and marks of direction are visible."""
    pictures = "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in str(value))
    return html.escape(escape_unprintable(pictures, "\n\t"))


def draw_bars(rows: Sequence[Bar], title: str, mark: tuple[float, str] | None = None) -> str:
    """Horizontal bars with intervals; `mark`: a line across all of them, and its label."""
    most = max([row.high for row in rows] + [mark[0] if mark else 0.0, 1e-9]) * 1.02
    top, parts = (22 if mark else 4), []
    for number, row in enumerate(rows):
        y = top + number * ROW
        name, label = escape(row.name), escape(row.label)
        parts.append(
            f'<text x="0" y="{y + 15}">{name}</text><text x="100%" y="{y + 15}" text-anchor="end" class="value">{label}'
            f'</text><rect x="0" y="{y + 21}" width="{percent(row.value, most)}" height="14" class="{row.kind}"/>'
            f'<line x1="{percent(row.low, most)}" x2="{percent(row.high, most)}" y1="{y + 28}" y2="{y + 28}" '
            'class="whisker"/>'
        )
        for end in (row.low, row.high):
            x = percent(end, most)
            parts.append(f'<line x1="{x}" x2="{x}" y1="{y + 23}" y2="{y + 33}" class="whisker"/>')
    height = top + len(rows) * ROW
    if mark:
        parts.append(draw_mark(mark[0] / most, mark[1], height))
    return wrap("".join(parts), height, title)


def draw_pairs(rows: Sequence[tuple[str, float, float]], title: str, mark: tuple[float, str]) -> str:
    """For each (name, strict, compat) a filled circle and an open square, joined by a line."""
    most = max([max(strict, compat) for _, strict, compat in rows] + [mark[0]]) * 1.05
    parts = []
    for number, (name, strict, compat) in enumerate(rows):
        y = 22 + number * ROW
        a, b = percent(strict, most), percent(compat, most)
        parts.append(
            f'<text x="0" y="{y + 15}">{escape(name)}</text>'
            f'<text x="100%" y="{y + 15}" text-anchor="end" class="value">{strict:.3f} / {compat:.3f}'
            "</text>"
            f'<line x1="{a}" x2="{b}" y1="{y + 28}" y2="{y + 28}" class="whisker"/>'
            f'<svg x="{b}" y="{y + 28}" overflow="visible"><rect x="-5" y="-5" width="10" height="10" class="open"/>'
            "</svg>"
            f'<circle cx="{a}" cy="{y + 28}" r="5" class="filled"/>'
        )
    height = 22 + len(rows) * ROW
    return wrap("".join(parts) + draw_mark(mark[0] / most, mark[1], height), height, title)


def draw_losses(curves: Sequence[Curve]) -> str:
    """A panel for each training run, all on one scale: the training loss as a line, the held-out loss as circles."""
    points = [loss for curve in curves for _, loss in (*smooth(curve.train), *curve.held_out)]
    if not points:
        return ""
    low, high = min(points), max(points)
    pad = 0.06 * (high - low) or 0.1
    return '<div class="panels">' + "".join(draw_panel(curve, low - pad, high + pad) for curve in curves) + "</div>"


def draw_panel(curve: Curve, low: float, high: float, height: int = 150) -> str:
    """The losses of one training run."""
    last = max([step for step, _ in (*curve.train, *curve.held_out)], default=1) or 1
    place = lambda step, loss: (100 * step / last, height * (high - loss) / (high - low))
    line = " ".join("{:.2f},{:.1f}".format(*place(*point)) for point in smooth(curve.train))
    grid = "".join(
        f'<line x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
        f'<text x="-8" y="{y + 4:.1f}" text-anchor="end" class="tick">{loss:g}</text>'
        for loss in ticks(low, high)
        for y in [place(0, loss)[1]]
    )
    circles = "".join(
        f'<circle cx="{x:.2f}%" cy="{y:.1f}" r="4" class="open"><title>step {step:g}: {loss:.3f}</title></circle>'
        for step, loss in curve.held_out
        for x, y in [place(step, loss)]
    )
    ends = f", held-out {curve.held_out[0][1]:.2f} → {curve.held_out[-1][1]:.2f}" if curve.held_out else ""
    body = (
        f'{grid}<svg viewBox="0 0 100 {height}" width="100%" height="{height}" preserveAspectRatio="none">'
        f'<polyline points="{line}" class="curve"/></svg>{circles}'
        f'<text x="100%" y="{height + 16}" text-anchor="end" class="tick">step {last:g}</text>'
    )
    title = escape(f"{curve.name}{ends}")
    return f'<div class="panel"><h3>{title}</h3>{wrap(body, height + 20, title)}</div>'


def draw_by_rate(
    rates: Sequence[float], lines: Sequence[Line], marks: Sequence[tuple[float, str]], title: str, height: int = 320
) -> str:
    """A line for each init over the learning rates, loss on a logarithmic scale; `marks`: what to compare with."""
    values = [loss for line in lines for loss in line.losses if loss is not None] + [loss for loss, _ in marks]
    low, high = math.log(min(values)) - 0.08, math.log(max(values)) + 0.08
    left = lambda place: 3 + 94 * place / max(1, len(rates) - 1)  # percent of the width
    down = lambda loss: height * (high - math.log(loss)) / (high - low)
    parts = [
        f'<line x1="0" x2="100%" y1="{down(loss):.1f}" y2="{down(loss):.1f}" class="grid"/>'
        f'<text x="-8" y="{down(loss) + 4:.1f}" text-anchor="end" class="tick">{loss:g}</text>'
        for loss in (1, 2, 3, 5, 8, 12)
        if low <= math.log(loss) <= high
    ]
    parts += [f'<line x1="0" x2="100%" y1="{down(m):.1f}" y2="{down(m):.1f}" class="mark"/>' for m, _ in marks]
    for line in lines:
        points = [(left(place), down(loss)) for place, loss in enumerate(line.losses) if loss is not None]
        path = " ".join(f"{x:.2f},{y:.1f}" for x, y in points)
        parts.append(
            f'<svg viewBox="0 0 100 {height}" width="100%" height="{height}" preserveAspectRatio="none">'
            f'<polyline points="{path}" class="curve"/></svg>'
        )
        parts += [f'<svg x="{x:.2f}%" y="{y:.1f}" overflow="visible">{line.marker()}</svg>' for x, y in points]
    parts += [
        f'<text x="{left(place):.2f}%" y="{height + 16}" text-anchor="middle" class="tick">{rate:g}</text>'
        for place, rate in enumerate(rates)
    ]
    legend = "".join(
        f'<li><svg width="14" height="14"><svg x="7" y="7" overflow="visible">{line.marker()}</svg></svg> '
        f"{escape(line.name)}</li>"
        for line in lines
    )
    if marks:
        names = ", ".join(escape(label) for _, label in sorted(marks, reverse=True))
        legend += f"<li>dashed, from top: {names}</li>"
    return f'<div class="panel">{wrap("".join(parts), height + 22, title)}<ul class="legend">{legend}</ul></div>'


def smooth(points: Sequence[tuple[float, float]], kept: int = 60) -> list[tuple[float, float]]:
    """The means of neighbouring points, at most `kept` of them."""
    size = max(1, -(-len(points) // kept))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def ticks(low: float, high: float) -> list[float]:
    """Two to five round numbers between low and high."""
    for step in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100):
        if (high - low) / step <= 5:
            first = int(low / step) + 1
            return [round(number * step, 6) for number in range(first, int(high / step) + 1)]
    return []


def draw_mark(share: float, label: str, height: int) -> str:
    """A dashed line down the whole plot, with its label at the top, on the side with room for it."""
    x, anchor, shift = f"{100 * share:.2f}%", "start" if share < 0.5 else "end", 4 if share < 0.5 else -4
    return (
        f'<line x1="{x}" x2="{x}" y1="4" y2="{height}" class="mark"/>'
        f'<text x="{x}" dx="{shift}" y="14" text-anchor="{anchor}" class="tick">{escape(label)}</text>'
    )


def percent(value: float, most: float) -> str:
    """A length as a percentage of the plot's width."""
    return f"{max(0.0, 100 * value / most):.2f}%"


def wrap(body: str, height: int, title: str) -> str:
    """An SVG with a title for screen readers."""
    return f'<svg role="img" width="100%" height="{height}" aria-label="{escape(title)}">{body}</svg>'
