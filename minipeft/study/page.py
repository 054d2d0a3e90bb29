"""report.html: one file that asks for nothing, readable without script, without colour, on a phone, light and dark.

Every text that a model, a file or an error brought passes `text`. A policy in the page's head refuses every request and
every script but the one below, by its hash, should anything slip through.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minipeft.metrics.text import is_exact, is_repeated, is_valid_python
from minipeft.study.charts import PATTERNS, Bar, Curve, Line, bars, by_rate, dumbbells, losses
from minipeft.study.prefix_experiment import MEANING, Grid, several_seeds, tables
from minipeft.study.presets import FIRST_LINE, ZERO_SHOT
from minipeft.study.table import Group, bleu, few, flagged, names, shown

LONGEST_ANSWER = 400  # characters shown of an answer
MOST_QUESTIONS = 500
MOST_BYTES = 700_000  # of answers; the page stays under a megabyte
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
SCRIPT = """
const form = document.getElementById("filter"), said = document.getElementById("said");
const all = [...document.querySelectorAll("details[data-marks]")];
function show() {
  const words = form.words.value.toLowerCase(), mark = form.mark.value, cell = form.cell.value;
  let left = 0;
  for (const one of all) {
    const marks = one.dataset.marks.split(" ");
    const fits = !mark || marks.some(m => cell === "" ? m.endsWith(":" + mark) : m === cell + ":" + mark);
    one.hidden = !(fits && one.textContent.toLowerCase().includes(words));
    left += !one.hidden;
  }
  said.textContent = left + " of " + all.length + " shown";
}
if (form) { form.hidden = false; form.addEventListener("input", show);
  form.addEventListener("submit", e => e.preventDefault()); show(); }
"""


@dataclass(frozen=True)
class Answered:
    """A cell's name and the rows of its predictions.jsonl."""

    name: str
    rows: Sequence[dict[str, Any]]


def text(value: object) -> str:
    """A text as HTML shows it: nothing in it is markup, control characters are visible."""
    whole = str(value).encode("utf-8", "backslashreplace").decode()
    seen = "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in whole)
    return html.escape(seen)


def page(
    results: dict[str, Any], said: Sequence[str], notes: Sequence[str], runs: Sequence[Curve], cells: Sequence[Answered]
) -> str:
    """The whole page."""
    groups: list[Group] = results["groups"]
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    where = ", ".join(f"{name} {value}" for name, value in results["environment"].items() if value is not None)
    parts = [
        f"<h1>{text(heading(results))}</h1>",
        f"<p>{text(' '.join(said))}</p>",
        table(groups, "scores"),
        section(
            "Scores",
            score_bars(groups),
            "Bars are BLEU, lines their 95 % intervals over questions. Solid: tuned. "
            "Striped: the untrained model. Outlined: answers that need no model.",
        ),
        *(section(f"Prefixes after {grid.steps} steps", grid_table(grid), MEANING) for grid in tables(groups)),
        *(
            section(
                f"Held-out loss after {steps} steps",
                loss_bars(rows),
                "Bars are nats per token, lines one standard deviation over seeds to both sides.",
            )
            for steps, rows in several_seeds(results).items()
        ),
        section("To know before using a number", flag_list(groups)),
        section("What it took, and what the answers are like", table(groups, "rest")),
        section(
            "Loss",
            losses(runs),
            "Line: training loss, averaged over neighbouring steps. Circles: loss on pairs "
            "held out of training, in nats per token. All panels have one scale.",
        ),
        section(
            "CodeBLEU, and what its package makes of nothing",
            codebleu(groups),
            f"{notes[-1]} Circle: strict. Square: the package. Numbers: strict / package.",
        ),
        browser(cells),
        "<h2>How this was made</h2>",
        *(f"<p>{text(note)}</p>" for note in notes[:-1]),
        f'<p class="command"><code>{text(results["command"])}</code></p><p class="soft">{text(where)}</p>',
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>minipeft study: {text(results['preset'])}</title><style>{STYLE}</style></head>\n<body>{PATTERNS}"
        + "\n".join(part for part in parts if part)
        + f"\n<script>{SCRIPT}</script></body></html>\n"
    )


def heading(results: dict[str, Any]) -> str:
    """What was compared."""
    models = list(dict.fromkeys(group["model"] for group in results["groups"] if group["model"]))
    what = f"{len(models)} models" if len(models) > 1 else "the demo model" if models == ["demo"] else models[0]
    source = results["data"]["source"]
    data = "the demo pairs" if source == "demo" else source.rstrip("/").rsplit("/", 1)[-1]
    return f"Ways of tuning compared: {what} on {data}"


def section(title: str, body: str, caption: str = "") -> str:
    """A heading, what stands under it, and what to know to read it; nothing where the body is empty."""
    return f'<h2>{text(title)}</h2><p class="soft">{text(caption)}</p>{body}' if body else ""


def table(groups: Sequence[Group], part: str) -> str:
    """One part of the columns, in a box that scrolls by itself where it is wider than the screen."""
    columns = [column for column in shown(groups) if column.part == part]
    head = "".join(f'<th title="{text(c.meaning)}" scope="col">{text(c.title)}</th>' for c in columns)
    rows = []
    for name, group in zip(names(groups), groups):
        if group["error"] is not None and part == "rest":
            continue
        if group["error"] is None and part == "scores" and group.get("bleu") is None:
            continue  # nothing was asked of it
        cells = "".join(f"<td>{text(column.show(group))}</td>" for column in columns)
        if group["error"] is not None:
            cells = f'<td class="failed" colspan="{len(columns)}">failed: {text(group["error"])}</td>'
        kind = "" if group["model"] else ' class="trivial"'
        rows.append(f'<tr{kind}><th scope="row">{text(name)}</th>{cells}</tr>')
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr><th></th>{head}</tr></thead><tbody>'
        f"{''.join(rows)}</tbody></table></div>"
    )


SHAPES = {"peft": "triangle", "normal": "square", "text": "circle"}  # of a prefix's start; filled: with the network


def grid_table(grid: Grid) -> str:
    """A grid of the prefix experiment, drawn and in numbers."""
    lines = [
        Line(start, [group["dev_loss"] if group else None for group in found], SHAPES[start.split()[0]], "MLP" in start)
        for start, found in grid.rows
    ]
    title = "Held-out loss by learning rate and start"
    drawn = by_rate(grid.rates, lines, [(loss, name) for name, loss in grid.others], title)
    head, *rows = grid.texts()
    heads = "<th></th>" + "".join(f'<th scope="col">{cell}</th>' for cell in head[1:])
    body = "".join(
        f'<tr><th scope="row">{text(row[0])}</th>{"".join(f"<td>{text(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return (
        f'{drawn}<div class="scroll" tabindex="0"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def loss_bars(rows: Sequence[tuple[str, str, Group]]) -> str:
    """The held-out loss of each thing that was trained with several seeds."""
    found = [
        Bar(
            name,
            group["dev_loss"],
            group["dev_loss"] - group["dev_loss_sd"],
            group["dev_loss"] + group["dev_loss_sd"],
            said,
            "tuned",
        )
        for name, said, group in rows
    ]
    return bars(found, "Held-out loss over seeds")


def score_bars(groups: Sequence[Group]) -> str:
    """BLEU of each group, and a line at the best that needs no model."""
    rows, trivial = [], []
    for name, group in zip(names(groups), groups):
        if group["error"] is not None or group.get("bleu") is None:
            continue
        kind = "trivial" if not group["model"] else "untuned" if group["method"] in (ZERO_SHOT, FIRST_LINE) else "tuned"
        low, high = group["bleu_interval"]
        rows.append(Bar(name, group["bleu"], low, high, f"{bleu(group)} [{100 * low:.1f}, {100 * high:.1f}]", kind))
        trivial += [group["bleu"]] if kind == "trivial" else []
    return bars(rows, "BLEU of each answerer", (max(trivial), "best without a model")) if trivial else ""


def flag_list(groups: Sequence[Group]) -> str:
    """Failures and flags, each said once."""
    found = [f"<li><b>{text(few(who))}</b> {text(said)}</li>" for said, who in flagged(groups).items()]
    return f'<ul class="flags">{"".join(found)}</ul>' if found else "<p>Nothing was flagged.</p>"


def codebleu(groups: Sequence[Group]) -> str:
    """Both totals of each group."""
    rows = [
        (name, group["codebleu"], group["codebleu_compat"])
        for name, group in zip(names(groups), groups)
        if group["error"] is None and group.get("codebleu") is not None
    ]
    return dumbbells(rows, "CodeBLEU, strict and as the package counts", ARTEFACT) if rows else ""


def browser(cells: Sequence[Answered]) -> str:
    """Each question with its reference and every cell's answer, folded; a filter where there is script."""
    if not cells:
        return ""
    number, size, parts = len(cells[0].rows), 0, []
    for place in range(min(number, MOST_QUESTIONS)):
        part = question(cells, place)
        size += len(part.encode())
        if size > MOST_BYTES:
            break
        parts.append(part)
    cut = (
        "" if len(parts) == number else f"The first {len(parts)} of {number}; all are in each cell's predictions.jsonl."
    )
    options = "".join(f'<option value="{place}">{text(cell.name)}</option>' for place, cell in enumerate(cells))
    marks = "".join(
        f'<option value="{m}">{m}</option>' for m in ("exact", "wrong", "invalid", "empty", "repeated", "cut")
    )
    return (
        f'<h2>Answers</h2><p class="soft">{text(cut)}</p><form id="filter" hidden><input name="words" '
        'placeholder="words in question or answers" aria-label="words">'
        f'<select name="mark" aria-label="kind"><option value="">all</option>{marks}</select>'
        f'<select name="cell" aria-label="by"><option value="">by any</option>{options}</select>'
        f'<span id="said" class="soft"></span></form>{"".join(parts)}'
    )


def question(cells: Sequence[Answered], place: int) -> str:
    """One question, folded: who was exact stands in its first line."""
    first = cells[0].rows[place]
    references = [first["reference"]] if isinstance(first["reference"], str) else first["reference"]
    found, answers, right = [], [], []
    for number, cell in enumerate(cells):
        row = cell.rows[place]
        marks = marks_of(row, references)
        found += [f"{number}:{mark}" for mark in marks]
        right += [cell.name] if "exact" in marks else []
        answer = row["prediction"][:LONGEST_ANSWER] + ("…" if len(row["prediction"]) > LONGEST_ANSWER else "")
        noted = ", ".join(mark for mark in marks if mark != "wrong")
        answers.append(
            f"<dt>{text(cell.name)}{text(f' ({noted})' if noted else '')}</dt><dd><pre>{text(answer)}</pre></dd>"
        )
    exact = f' <span class="soft">exact: {text(", ".join(right))}</span>' if right else ""
    return (
        f'<details data-marks="{" ".join(found)}"><summary>{text(first["intent"])}{exact}</summary>'
        f'<dl class="reference"><dt>reference</dt><dd><pre>{text(references[0])}</pre></dd></dl>'
        f"<dl>{''.join(answers)}</dl></details>"
    )


def marks_of(row: dict[str, Any], references: Sequence[str]) -> list[str]:
    """What an answer is, in words that the filter knows."""
    answer = row["prediction"]
    if not answer.strip():
        return ["wrong", "empty"]
    found = ["exact" if is_exact(answer, references) else "wrong"]
    found += [] if is_valid_python(answer) else ["invalid"]
    found += ["repeated"] if is_repeated(answer) else []
    return found + (["cut"] if row.get("ended") == "limit" else [])
