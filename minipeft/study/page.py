"""report.html: one self-contained file, readable without script, without colour, on a phone, light and dark.

Every text that a model, a file or an error brought passes `escape`. Should anything slip through, a policy in the
page's head refuses every request, and every script but the filter's (browser.py), by its hash.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence

from minipeft.study.browser import SCRIPT, Answered, browse
from minipeft.study.cells import FIRST_LINE, ZERO_SHOT
from minipeft.study.charts import PATTERNS, Bar, Curve, Line, draw_bars, draw_by_rate, draw_losses, draw_pairs, escape
from minipeft.study.prefix_experiment import MEANING, Grid, several_seeds, tables
from minipeft.study.rows import Group, Results
from minipeft.study.table import bleu, choose_columns, group_by_flag, join_names, name_groups

ARTEFACT = (0.25, "0.25: an empty answer, as the package counts")

STYLE = """
:root{color-scheme:light dark;--back:#fff;--ink:#1a1f26;--soft:#596271;--line:#d5dae1;--fill:#24629f;--card:#f6f8fa;
--warn:#8a4b00}
@media(prefers-color-scheme:dark){:root{--back:#13161a;--ink:#e5e9ee;--soft:#a0a9b5;--line:#363d47;--fill:#7cb1ea;
--card:#1b2026;--warn:#f0b26b}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1100px;padding:24px 16px 64px;background:var(--back);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 8px}h2{font-size:1.2rem;margin:40px 0 8px}
h3{font-size:.9rem;font-weight:600;margin:0 0 4px}
p{max-width:75ch;margin:8px 0}.soft,figcaption,.tick{color:var(--soft);fill:var(--soft)}
code,pre{font:13px/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere;
white-space:pre-wrap;margin:0}
.command{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:8px 12px}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:6px}
table{border-collapse:collapse;font-size:14px;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:6px 10px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
tr:last-child>*{border-bottom:0}
thead th{color:var(--soft);font-weight:600;vertical-align:bottom;white-space:normal;min-width:64px}
th:first-child{text-align:left;position:sticky;left:0;background:var(--back);font-weight:600}
td.failed{text-align:left;color:var(--warn);white-space:normal}tr.trivial>*{color:var(--soft);font-weight:400}
.flags{padding-left:20px}.flags li{margin:4px 0;overflow-wrap:anywhere}
svg{display:block;overflow:visible;fill:var(--ink);font:13px system-ui,sans-serif}
.value{font-variant-numeric:tabular-nums}
.tick{font-size:12px}.tuned,.filled{fill:var(--fill)}
.untuned{fill:url(#stripes);stroke:var(--fill);stroke-width:1.5}.stripe{fill:var(--fill)}.stripe-back{fill:var(--back)}
.trivial,.open{fill:var(--back);stroke:var(--soft);stroke-width:1.5}.open{stroke:var(--ink)}
.whisker{stroke:var(--ink);stroke-width:1.5}.grid{stroke:var(--line)}
.mark{stroke:var(--soft);stroke-dasharray:3 4}
.curve{fill:none;stroke:var(--fill);stroke-width:2;vector-effect:non-scaling-stroke}
.panel{padding-left:30px}.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(300px,100%),1fr));gap:24px}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;list-style:none;margin:4px 0 12px;padding:0;font-size:14px}
.legend svg{display:inline-block;vertical-align:-2px}
form{display:flex;flex-wrap:wrap;gap:8px;align-items:center;margin:8px 0}
form[hidden],[hidden]{display:none}
input,select{font:inherit;font-size:14px;padding:6px 8px;color:inherit;background:var(--card);
border:1px solid var(--line);border-radius:6px;max-width:100%}
input{flex:1 1 200px}
details{border-top:1px solid var(--line);padding:6px 0}summary{cursor:pointer;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:minmax(90px,190px) 1fr;gap:4px 12px;margin:8px 0 8px 16px}
dd pre{max-height:13em;overflow:auto}
dt{color:var(--soft);font-size:14px}dd{margin:0;min-width:0}.reference dd,.reference dt{font-weight:600}
@media(max-width:600px){dl{grid-template-columns:1fr;gap:0;margin-left:8px}dd{margin-bottom:8px}}
@media print{form{display:none}}
"""


def draw_page(
    results: Results, summary: Sequence[str], notes: Sequence[str], curves: Sequence[Curve], cells: Sequence[Answered]
) -> str:
    """The whole page."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>minipeft study: {escape(results.preset)}</title><style>{STYLE}</style></head>\n<body>{PATTERNS}"
        + "\n".join(part for part in sections(results, summary, notes, curves, cells) if part)
        + f"\n<script>{SCRIPT}</script></body></html>\n"
    )


def sections(
    results: Results, summary: Sequence[str], notes: Sequence[str], curves: Sequence[Curve], cells: Sequence[Answered]
) -> list[str]:
    """The parts of the page, in order; "" for one with nothing to show."""
    groups = results.groups
    environment = ", ".join(f"{name} {value}" for name, value in results.environment.items() if value is not None)
    bars = (
        "Bars: BLEU. Lines: 95 % intervals over questions. Solid: tuned. Striped: the untrained model. Outlined: "
        "baselines without a model."
    )
    over_seeds = "Bars: nats per token. Lines: one standard deviation over seeds to either side."
    panels = (
        "Line: training loss, averaged over neighbouring steps. Circles: held-out loss, in nats per token. All panels "
        "share one scale."
    )
    return [
        f"<h1>{escape(heading(results))}</h1>",
        f"<p>{escape(' '.join(summary))}</p>",
        draw_table(groups, "scores"),
        section("Scores", draw_scores(groups), bars),
        *(section(f"Prefixes after {grid.steps} steps", draw_grid(grid), MEANING) for grid in tables(groups)),
        *(
            section(f"Held-out loss after {steps} steps", draw_seeds(rows), over_seeds)
            for steps, rows in several_seeds(results).items()
        ),
        section("Before you use a number", draw_flags(groups)),
        section("Training, cost and answers", draw_table(groups, "details")),
        section("Loss", draw_losses(curves), panels),
        section(
            "CodeBLEU, strict and as the package counts",
            draw_codebleu(groups),
            f"{notes[-1]} Circle: strict. Square: the package. Numbers: strict / package.",
        ),
        browse(cells),
        "<h2>How this was made</h2>",
        *(f"<p>{escape(note)}</p>" for note in notes[:-1]),
        f'<p class="command"><code>{escape(results.command)}</code></p><p class="soft">{escape(environment)}</p>',
    ]


def heading(results: Results) -> str:
    """What was compared."""
    models = list(dict.fromkeys(group.model for group in results.groups if group.model))
    what = f"{len(models)} models" if len(models) > 1 else "the demo model" if models == ["demo"] else models[0]
    source = results.data.source
    data = "the demo pairs" if source == "demo" else source.rstrip("/").rsplit("/", 1)[-1]
    return f"Fine-tuning methods compared: {what} on {data}"


def section(title: str, body: str, caption: str = "") -> str:
    """A heading, its caption and its body; nothing where the body is empty."""
    return f'<h2>{escape(title)}</h2><p class="soft">{escape(caption)}</p>{body}' if body else ""


def draw_table(groups: Sequence[Group], part: str) -> str:
    """One table of the columns, in a box that scrolls by itself where it is wider than the screen."""
    columns = choose_columns(groups, part)
    head = "".join(f'<th title="{escape(c.meaning)}" scope="col">{escape(c.title)}</th>' for c in columns)
    rows = []
    for name, group in zip(name_groups(groups), groups):
        if part == "details" and group.error is not None:
            continue
        if part == "scores" and group.error is None and group.scores is None:
            continue  # it did not answer
        cells = "".join(f"<td>{escape(column.show(group))}</td>" for column in columns)
        if group.error is not None:
            cells = f'<td class="failed" colspan="{len(columns)}">failed: {escape(group.error)}</td>'
        kind = "" if group.model else ' class="trivial"'
        rows.append(f'<tr{kind}><th scope="row">{escape(name)}</th>{cells}</tr>')
    return frame(f"<th></th>{head}", "".join(rows))


def frame(head: str, rows: str) -> str:
    """A table in a box that scrolls."""
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


SHAPES = {"peft": "triangle", "normal": "square", "text": "circle"}  # of a prefix's init; filled: with the MLP


def draw_grid(grid: Grid) -> str:
    """A grid of the prefix experiment, as a plot and as a table."""
    lines = [
        Line(init, [g.dev_loss if g else None for g in found], SHAPES.get(init.split()[0], "circle"), "MLP" in init)
        for init, found in grid.rows
    ]
    title = "Held-out loss by learning rate and init"
    drawn = draw_by_rate(grid.rates, lines, [(loss, name) for name, loss in grid.others], title)
    head, *rows = grid.texts()
    heads = "<th></th>" + "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head[1:])
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return drawn + frame(heads, body)


def draw_seeds(rows: Sequence[tuple[str, str, Group]]) -> str:
    """The held-out loss of each group with several seeds."""
    found = []
    for name, label, group in rows:
        loss, spread = group.dev_loss, group.dev_loss_sd or 0.0
        found.append(Bar(name, loss, loss - spread, loss + spread, label, "tuned"))
    return draw_bars(found, "Held-out loss over seeds")


def draw_scores(groups: Sequence[Group]) -> str:
    """BLEU of each group, and a line at the best baseline."""
    rows, trivial = [], []
    for name, group in zip(name_groups(groups), groups):
        if group.scores is None or group.bleu is None:
            continue
        kind = "trivial" if not group.model else "untuned" if group.method in (ZERO_SHOT, FIRST_LINE) else "tuned"
        low, high = group.scores.bleu_interval
        rows.append(Bar(name, group.bleu, low, high, f"{bleu(group)} [{100 * low:.1f}, {100 * high:.1f}]", kind))
        trivial += [group.bleu] if kind == "trivial" else []
    return draw_bars(rows, "BLEU of each group", (max(trivial), "best baseline without a model")) if trivial else ""


def draw_flags(groups: Sequence[Group]) -> str:
    """Failures and flags, each once, with the groups that it applies to."""
    found = [f"<li><b>{escape(join_names(who))}</b> {escape(flag)}</li>" for flag, who in group_by_flag(groups).items()]
    return f'<ul class="flags">{"".join(found)}</ul>' if found else "<p>Nothing was flagged.</p>"


def draw_codebleu(groups: Sequence[Group]) -> str:
    """Both CodeBLEU totals of each group."""
    rows = [
        (name, group.scores["codebleu"] or 0.0, group.scores["codebleu_compat"] or 0.0)
        for name, group in zip(name_groups(groups), groups)
        if group.scores is not None
    ]
    return draw_pairs(rows, "CodeBLEU, strict and as the package counts", ARTEFACT) if rows else ""
