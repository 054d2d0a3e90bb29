"""report.html: one self-contained file, readable without script, without colour, on a phone, light and dark.

The verdict comes first, then the plot of the effects and six columns; the other columns are one click away, each with
its meaning. Every text from a model, a file or an error passes `escape`. As a second line of defence, a content
security policy blocks every request, and every script but page.js, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from minipeft.files import read_text
from minipeft.study import ranking, rates_report
from minipeft.study.browser import Answered, browse
from minipeft.study.cells import FIRST_LINE, ZERO_SHOT
from minipeft.study.charts import PATTERNS, Bar, draw_bars, draw_intervals, draw_pairs, escape
from minipeft.study.curves import MOST_TOGETHER, Curve, Line, Point, draw_by_rate, draw_cost, draw_legend, draw_losses
from minipeft.study.prefix_experiment import MEANING, Grid, find_several_seeds, make_grids
from minipeft.study.rows import Group, Results
from minipeft.study.table import (
    Column,
    choose_columns,
    choose_main_columns,
    group_by_flag,
    join_names,
    name_groups,
    name_method,
    name_reference,
    show_bleu_with_interval,
    show_difference,
)

HERE = Path(__file__).parent
ARTEFACT = (0.25, "the codebleu package's score of an empty answer, 0.25")
KINDS = {"tuned": "Tuned", "untuned": "Untrained model", "trivial": "Baselines without a model"}
COSTS = {  # field of a group's training -> title, unit, divisor
    "trainable": ("trained parameters", "trainable parameters", 1.0),
    "train_seconds": ("time", "seconds of training", 1.0),
    "peak_memory_bytes": ("memory", "GB of peak memory, weights included", 1e9),
}


def draw_page(
    results: Results,
    summary: Sequence[str],
    notes: Sequence[str],
    curves: Sequence[Curve],
    cells: Sequence[Answered],
    packed: tuple[str, str] = ("", ""),
) -> str:
    """Render the page. `packed`: the explorer of packed rows, and its caption."""
    files = ("page", "explorer") if packed[0] else ("page",)
    style, script = ("".join(read_text(HERE / f"{name}.{kind}") for name in files) for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>minipeft study: {escape(results.preset)}</title><style>{style}</style></head>\n<body>{PATTERNS}<main>"
        + "\n".join(part for part in make_sections(results, summary, notes, curves, cells, packed) if part)
        + f"</main>\n<script>{script}</script></body></html>\n"
    )


def make_sections(
    results: Results,
    summary: Sequence[str],
    notes: Sequence[str],
    curves: Sequence[Curve],
    cells: Sequence[Answered],
    packed: tuple[str, str],
) -> list[str]:
    """Render the sections of the page, in order; "" for one with nothing to show."""
    groups = results.groups
    environment = ", ".join(f"{name} {value}" for name, value in results.environment.items() if value is not None)
    over_seeds = "Bars: nats per token. Lines: plus and minus one standard deviation over seeds."
    losses = (
        "Thick with markers: held-out loss. Thin: training loss, smoothed."
        if 1 < len(curves) <= MOST_TOGETHER
        else "Markers: held-out loss. Thin: training loss, smoothed. All panels share one scale."
    )
    return [
        f"<h1>{escape(make_heading(results))}</h1>",
        f'<p class="verdict">{escape(summary[0])}</p><p>{escape(" ".join(summary[1:]))}</p>',
        draw_effects(groups),
        draw_table(groups, choose_main_columns(groups), "main"),
        draw_all_columns(groups),
        make_section("Cost against quality", draw_costs(groups), "Lines: 95 % intervals. Dashed: the best baseline."),
        make_section("Loss", draw_losses(curves), losses),
        *(make_section(title, draw_text_table(rows), meaning) for title, meaning, rows in list_tables(results)),
        *(make_section(f"Prefixes after {grid.steps} steps", draw_grid(grid), MEANING) for grid in make_grids(groups)),
        *(
            make_section(f"Held-out loss after {steps} steps", draw_seeds(rows), over_seeds)
            for steps, rows in find_several_seeds(results).items()
        ),
        make_section("Caveats", draw_flags(groups)),
        make_section("Packed rows", *packed),
        fold("BLEU of all rows", draw_scores(groups), "Solid: tuned. Striped: untrained. Outlined: baseline."),
        fold(
            "CodeBLEU: strict and the package's",
            draw_codebleu(groups),
            f"{notes[-1]} Circle: strict. Square: the package. Numbers: strict / package.",
        ),
        "<h2>Method</h2>",
        *(f"<p>{escape(note)}</p>" for note in notes[:-1]),
        f'<p class="command"><code>{escape(results.command)}</code></p><p class="soft">{escape(environment)}</p>',
        browse(cells),
    ]


def list_tables(results: Results) -> list[tuple[str, str, list[list[str]]]]:
    """The tables beside the main one: title, meaning, and rows, header first."""
    return ranking.list_tables(results) + rates_report.list_tables(results)


def make_heading(results: Results) -> str:
    """Write the heading: which models and data are compared."""
    models = list(dict.fromkeys(group.model for group in results.groups if group.model))
    what = f"{len(models)} models" if len(models) > 1 else "the demo model" if models == ["demo"] else models[0]
    source = results.data.source
    data = "the demo pairs" if source == "demo" else source.rstrip("/").rsplit("/", 1)[-1]
    return f"Fine-tuning methods compared: {what} on {data}"


def make_section(title: str, body: str, caption: str = "") -> str:
    """Render a heading, its caption and its body; "" where the body is empty."""
    return f'<h2>{escape(title)}</h2><p class="soft note">{escape(caption)}</p>{body}' if body else ""


def fold(title: str, body: str, caption: str) -> str:
    """Render a collapsed section."""
    if not body:
        return ""
    return (
        f'<details class="columns"><summary>{escape(title)}</summary><p class="soft note">{escape(caption)}</p>{body}'
        "</details>"
    )


def classify_group(group: Group) -> str:
    """Classify a group as one of KINDS."""
    return "trivial" if not group.model else "untuned" if group.method in (ZERO_SHOT, FIRST_LINE) else "tuned"


def draw_effects(groups: Sequence[Group]) -> str:
    """Draw each group's effect, tuned groups first."""
    rows = [
        Bar(name, group.effect.value, group.effect.low, group.effect.high, show_difference(group.effect),
            classify_group(group))
        for name, group in zip(name_groups(groups), groups)
        if group.effect is not None and group.method != FIRST_LINE
    ]  # fmt: skip
    rows.sort(key=lambda row: (row.kind != "tuned", -row.value))
    unit = f"BLEU difference to {name_reference(groups)!r}, with 95 % interval"
    return draw_intervals(rows, "Effect of each method on BLEU", unit, 100) if rows else ""


def draw_costs(groups: Sequence[Group]) -> str:
    """Draw BLEU over parameters, time and memory, a marker for each method."""
    named = [(name, g) for name, g in zip(name_groups(groups), groups) if g.is_tuned and g.scores is not None]
    methods = list(dict.fromkeys(group.method for _, group in named))
    if len(named) < 2 or len(methods) > MOST_TOGETHER:
        return ""
    panels = []
    for field, (title, unit, divisor) in COSTS.items():
        points = [
            Point(name, cost / divisor, 100 * (g.bleu or 0.0), 100 * g.scores.bleu_interval[0],
                  100 * g.scores.bleu_interval[1], methods.index(g.method))
            for name, g in named
            if g.scores is not None and (cost := getattr(g.training, field))
        ]  # fmt: skip
        panels += [draw_cost(points, title, unit, find_best_baseline(groups))] if points else []
    return f'{draw_legend([name_method(name) for name in methods])}<div class="panels">{"".join(panels)}</div>'


def find_best_baseline(groups: Sequence[Group]) -> float | None:
    """Find the best baseline's BLEU, times 100."""
    return max((100 * (g.bleu or 0.0) for g in groups if not g.model and g.scores is not None), default=None)


def draw_table(groups: Sequence[Group], columns: Sequence[Column], kind: str = "") -> str:
    """Render a table of these columns, their meanings below; tuned, untrained and baselines each in one tbody."""
    head = "".join(f'<th scope="col">{escape(column.title)}</th>' for column in columns)
    bodies = []
    for key, title in KINDS.items():
        mine = [(name, g) for name, g in zip(name_groups(groups), groups) if classify_group(g) == key]
        rows = [draw_row(name, group, columns) for name, group in mine]
        shown = [row for row in rows if row]
        if shown:
            first = f'<tr><th class="kind" scope="rowgroup" colspan="{len(columns) + 1}">{title}</th></tr>'
            bodies.append(f"<tbody>{first}{''.join(shown)}</tbody>")
    meanings = "".join(f"<li><b>{escape(c.title)}</b> {escape(c.meaning)}</li>" for c in columns)
    table = (
        f'<div class="scroll" tabindex="0"><table class="sortable {kind}"><thead><tr><th><span class="hidden">method'
        f"</span></th>{head}</tr></thead>{''.join(bodies)}</table></div>"
    )
    return f'{table}<ul class="meanings">{meanings}</ul>' if bodies else ""


def draw_row(name: str, group: Group, columns: Sequence[Column]) -> str:
    """Render a row; "" where no column has a value."""
    texts = [column.show(group) for column in columns]
    if group.error is not None:
        cells = f'<td class="failed" colspan="{len(columns)}">failed: {escape(group.error)}</td>'
    elif any(texts):
        values = [column.value(group) for column in columns]
        data = ["" if value is None else f' data-v="{value:.6g}"' for value in values]
        cells = "".join(f"<td{at}>{dim_interval(text)}</td>" for at, text in zip(data, texts))
    else:
        return ""
    return f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'


def dim_interval(text: str) -> str:
    """Render a cell's text with its interval in small print."""
    value, bracket, rest = text.partition(" [")
    return f"{escape(value)} <small>[{escape(rest)}</small>" if bracket else escape(text)


def draw_all_columns(groups: Sequence[Group]) -> str:
    """Render all columns, collapsed: scores, answers, training."""
    parts = [draw_table(groups, choose_columns(groups, part)) for part in ("scores", "answers", "training")]
    number = len(choose_columns(groups))
    return f'<details class="columns"><summary>All {number} columns</summary>{"".join(parts)}</details>'


def frame(head: str, rows: str) -> str:
    """Wrap a table in a scrollable box."""
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


SHAPES = {"peft": "triangle", "normal": "square", "text": "circle"}  # of a prefix's init; filled: with the MLP


def draw_grid(grid: Grid) -> str:
    """Render a grid of the prefix experiment as a plot and a table."""
    lines = [
        Line(init, [g.dev_loss if g else None for g in found], SHAPES.get(init.split()[0], "circle"), "MLP" in init)
        for init, found in grid.rows
    ]
    title = "Held-out loss by learning rate and init"
    drawn = draw_by_rate(grid.rates, lines, [(loss, name) for name, loss in grid.others], title)
    return drawn + draw_text_table(grid.texts())


def draw_text_table(rows: Sequence[Sequence[str]]) -> str:
    """Render rows of text as a table, header first."""
    head, *rest = rows
    first = f'<th scope="col">{escape(head[0])}</th>' if head[0] else "<th></th>"
    heads = first + "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head[1:])
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rest
    )
    return frame(heads, body)


def draw_seeds(rows: Sequence[tuple[str, str, Group]]) -> str:
    """Draw the held-out loss of each group with several seeds."""
    found = []
    for name, label, group in rows:
        loss, spread = group.dev_loss, group.dev_loss_sd or 0.0
        found.append(Bar(name, loss, loss - spread, loss + spread, label, "tuned"))
    return draw_bars(found, "Held-out loss over seeds", unit="held-out loss, nats per supervised token")


def draw_scores(groups: Sequence[Group]) -> str:
    """Draw the BLEU of each group, and a line at the best baseline."""
    rows = []
    for name, group in zip(name_groups(groups), groups):
        if group.scores is not None and group.bleu is not None:
            low, high = group.scores.bleu_interval
            rows.append(Bar(name, group.bleu, low, high, show_bleu_with_interval(group), classify_group(group)))
    best = find_best_baseline(groups)
    if best is None:
        return ""
    unit = f"BLEU, with 95 % interval; dashed: the best baseline, {best:.1f}"
    return draw_bars(rows, "BLEU of each row", best / 100, unit, 100)


def draw_flags(groups: Sequence[Group]) -> str:
    """List failures and flags, each once, with their groups; CodeBLEU's artefact has its own plot."""
    found = [
        f"<li><b>{escape(join_names(who))}</b> {escape(flag)}</li>"
        for flag, who in group_by_flag(groups).items()
        if not flag.startswith("CodeBLEU artefact")
    ]
    return f'<ul class="flags">{"".join(found)}</ul>' if found else "<p>Nothing was flagged.</p>"


def draw_codebleu(groups: Sequence[Group]) -> str:
    """Draw both CodeBLEU totals of each group."""
    rows = [
        (name, group.scores["codebleu"] or 0.0, group.scores["codebleu_compat"] or 0.0)
        for name, group in zip(name_groups(groups), groups)
        if group.scores is not None and group.scores["codebleu"] is not None
    ]
    return draw_pairs(rows, "CodeBLEU: strict and the package's", ARTEFACT) if rows else ""
