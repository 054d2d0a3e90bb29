"""The report's plots over two axes: losses over steps, held-out loss over learning rates, and quality over cost.

A method has the same colour, line and marker in every plot; a legend names it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minipeft.study.charts import SHAPES, choose_log_ticks, choose_ticks, draw_marker, escape, put, shorten_number, wrap

MOST_TOGETHER = len(SHAPES)  # curves in one plot; more are drawn in a panel each
Place = Callable[[float], float]


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
    shape: str
    filled: bool

    def marker(self) -> str:
        """The shape around (0, 0)."""
        return draw_marker(self.shape, "filled" if self.filled else "open")


@dataclass(frozen=True)
class Point:
    """One group in a plot of quality over cost: its name, cost, BLEU of 100 with interval, and number in the legend."""

    name: str
    cost: float
    value: float
    low: float
    high: float
    style: int


def draw_losses(curves: Sequence[Curve], height: int = 300) -> str:
    """Draw the losses of all runs on a logarithmic scale: training loss thin, held-out loss thick with markers."""
    points = [loss for curve in curves for _, loss in (*smooth(curve.train), *curve.held_out)]
    if not points:
        return ""
    low, high = 0.9 * max(min(points), 1e-4), 1.1 * max(points)
    if 1 < len(curves) <= MOST_TOGETHER:
        names = [f"{curve.name}{last_loss(curve)}" for curve in curves]
        return draw_legend(names) + draw_panel(list(enumerate(curves)), low, high, height, "")
    parts = [draw_panel([(0, curve)], low, high, height // 2, f"{curve.name}{last_loss(curve)}") for curve in curves]
    return f'<div class="panels">{"".join(parts)}</div>'


def last_loss(curve: Curve) -> str:
    return f": held-out {curve.held_out[-1][1]:.3f}" if curve.held_out else ""


def draw_panel(curves: Sequence[tuple[int, Curve]], low: float, high: float, height: int, title: str) -> str:
    """Draw losses over steps in one plot; each run comes with its number in the legend."""
    last = max((step for _, curve in curves for step, _ in (*curve.train, *curve.held_out)), default=1) or 1
    down = lambda loss: height * math.log(high / max(loss, low)) / math.log(high / low)
    across = lambda step: 100 * step / last
    body = draw_axis([(down(tick), f"{tick:g}") for tick in choose_log_ticks(low, high)])
    for style, curve in curves:
        body += draw_line(smooth(curve.train), across, down, height, f"faint s{style}")
        body += draw_line(curve.held_out, across, down, height, f"curve s{style}")
        for step, loss in curve.held_out:
            body += put(list(SHAPES)[style], f"m{style}", f"{across(step):.2f}%", down(loss))
    body += draw_base([(across(tick), f"{tick:g}") for tick in choose_ticks(0, last)], height)
    said = title or "Loss by step: " + "; ".join(f"{curve.name}{last_loss(curve)}" for _, curve in curves)
    head = f"<h3>{escape(title)}</h3>" if title else ""
    label = '<p class="soft">nats per supervised token (logarithmic), by step</p>'
    return f'<div class="panel">{head}{wrap(body, height + 20, said)}{label}</div>'


def draw_line(points: Sequence[tuple[float, float]], across: Place, down: Place, height: int, kind: str) -> str:
    """Draw a line whose stroke width does not scale with the plot."""
    path = " ".join(f"{across(x):.2f},{down(y):.1f}" for x, y in points)
    return (
        f'<svg viewBox="0 0 100 {height}" width="100%" height="{height}" preserveAspectRatio="none">'
        f'<polyline points="{path}" class="{kind}" fill="none"/></svg>'
    )


def draw_axis(labels: Sequence[tuple[float, str]]) -> str:
    """Draw the y axis: grid lines with labels on the left."""
    return "".join(
        f'<line x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
        f'<text x="-8" y="{y + 4:.1f}" text-anchor="end" class="tick">{escape(label)}</text>'
        for y, label in labels
    )


def draw_base(labels: Sequence[tuple[float, str]], height: int) -> str:
    """Draw the x axis with its labels."""
    texts = "".join(
        f'<line x1="{x:.2f}%" x2="{x:.2f}%" y1="{height}" y2="{height + 4}" class="grid"/>'
        f'<text x="{x:.2f}%" y="{height + 16}" text-anchor="middle" class="tick">{escape(label)}</text>'
        for x, label in labels
    )
    return f'<line x1="0" x2="100%" y1="{height}" y2="{height}" class="grid"/>{texts}'


def draw_legend(names: Sequence[str]) -> str:
    """Draw the legend: a line and a marker for each name."""
    entries = "".join(
        f'<li><svg width="34" height="14" aria-hidden="true"><line x1="0" x2="34" y1="7" y2="7" class="s{style}" '
        f'stroke-width="2"/><svg x="17" y="7" overflow="visible">{draw_marker(list(SHAPES)[style], f"m{style}")}</svg>'
        f"</svg> {escape(name)}</li>"
        for style, name in enumerate(names)
    )
    return f'<ul class="legend">{entries}</ul>'


def draw_cost(points: Sequence[Point], title: str, unit: str, mark: float | None, height: int = 200) -> str:
    """Draw BLEU over one cost, on a logarithmic axis beyond a factor of 5; `mark`: a dashed line."""
    costs = [point.cost for point in points]
    low, high = min(costs), max(costs)
    logarithmic = low > 0 and high > 5 * low
    change = math.log if logarithmic else float
    pad = 0.08 * (change(high) - change(low)) or abs(change(high)) * 0.1 or 1.0
    left, right = change(low) - pad, change(high) + pad
    across = lambda cost: 100 * (change(cost) - left) / (right - left)
    most = max([point.high for point in points] + [mark or 0.0, 1.0])
    down = lambda value: height * (1 - max(0.0, value) / (1.05 * most))
    body = draw_axis([(down(tick), f"{tick:g}") for tick in choose_ticks(0, most)])
    if mark is not None:
        body += f'<line x1="0" x2="100%" y1="{down(mark):.1f}" y2="{down(mark):.1f}" class="mark"/>'
    for point in points:
        x = f"{across(point.cost):.2f}%"
        body += f'<line x1="{x}" x2="{x}" y1="{down(point.low):.1f}" y2="{down(point.high):.1f}" class="whisker"/>'
        body += put(list(SHAPES)[point.style], f"m{point.style}", x, down(point.value))
    found = choose_log_ticks(math.exp(left), math.exp(right), 5) if logarithmic else choose_ticks(left, right)
    found = [tick for tick in found if across(tick) >= 0]
    body += draw_base([(across(tick), shorten_number(tick)) for tick in found], height)
    said = f"{title}: " + "; ".join(f"{point.name} {point.value:.1f} at {point.cost:.3g}" for point in points)
    label = f"{unit}, logarithmic" if logarithmic else unit
    plot = wrap(body, height + 20, said)
    return f'<div class="panel"><h3>BLEU by {escape(title)}</h3>{plot}<p class="soft">{escape(label)}</p></div>'


def draw_by_rate(
    rates: Sequence[float], lines: Sequence[Line], marks: Sequence[tuple[float, str]], title: str, height: int = 320
) -> str:
    """Draw a line for each init over the learning rates, loss on a logarithmic scale; `marks`: reference losses."""
    values = [loss for line in lines for loss in line.losses if loss is not None] + [loss for loss, _ in marks]
    low, high = math.log(min(values)) - 0.08, math.log(max(values)) + 0.08
    left = lambda place: 3 + 94 * place / max(1, len(rates) - 1)  # percent of the width
    down = lambda loss: height * (high - math.log(loss)) / (high - low)
    body = draw_axis([(down(tick), f"{tick:g}") for tick in choose_log_ticks(math.exp(low), math.exp(high))])
    body += "".join(f'<line x1="0" x2="100%" y1="{down(m):.1f}" y2="{down(m):.1f}" class="mark"/>' for m, _ in marks)
    for line in lines:
        points = [(float(place), loss) for place, loss in enumerate(line.losses) if loss is not None]
        body += draw_line(points, left, down, height, "curve")
        body += "".join(
            f'<svg x="{left(x):.2f}%" y="{down(y):.1f}" overflow="visible">{line.marker()}</svg>' for x, y in points
        )
    body += draw_base([(left(place), f"{rate:g}") for place, rate in enumerate(rates)], height)
    legend = "".join(
        f'<li><svg width="14" height="14"><svg x="7" y="7" overflow="visible">{line.marker()}</svg></svg> '
        f"{escape(line.name)}</li>"
        for line in lines
    )
    if marks:
        names = ", ".join(escape(label) for _, label in sorted(marks, reverse=True))
        legend += f"<li>dashed, from top: {names}</li>"
    label = '<p class="soft">held-out loss in nats per supervised token (logarithmic), by peak learning rate</p>'
    return f'<div class="panel">{wrap(body, height + 20, title)}{label}<ul class="legend">{legend}</ul></div>'


def smooth(points: Sequence[tuple[float, float]], kept: int = 60) -> list[tuple[float, float]]:
    """Average neighbouring points, to at most `kept`."""
    size = max(1, -(-len(points) // kept))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
