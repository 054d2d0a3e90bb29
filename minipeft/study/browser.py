"""The answers in the report: each question with its reference and every cell's answer, and a filter.

They are readable without script; the filter is shown by the script alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minipeft.metrics.text import is_exact, is_repeated, is_valid_python
from minipeft.study.charts import escape

LONGEST_ANSWER = 400  # characters shown of an answer
MOST_QUESTIONS = 500
MOST_BYTES = 700_000  # of answers; the page stays under a megabyte
MARKS = ("exact", "wrong", "invalid", "empty", "repeated", "cut off")
SCRIPT = """
const form = document.getElementById("filter"), shown = document.getElementById("shown");
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
  shown.textContent = left + " of " + all.length + " shown";
}
if (form) { form.hidden = false; form.addEventListener("input", show);
  form.addEventListener("submit", e => e.preventDefault()); show(); }
"""


@dataclass(frozen=True)
class Answered:
    """A cell's name and the rows of its predictions.jsonl."""

    name: str
    rows: Sequence[dict[str, Any]]


def browse(cells: Sequence[Answered]) -> str:
    """All questions, each folded, after the filter; "" where no cell answered."""
    if not cells:
        return ""
    number, size, parts = len(cells[0].rows), 0, []
    for place in range(min(number, MOST_QUESTIONS)):
        part = draw_question(cells, place)
        size += len(part.encode())
        if size > MOST_BYTES:
            break
        parts.append(part)
    cut = (
        ""
        if len(parts) == number
        else f"The first {len(parts)} of {number} pairs; each cell's predictions.jsonl holds all."
    )
    options = "".join(f'<option value="{place}">{escape(cell.name)}</option>' for place, cell in enumerate(cells))
    marks = "".join(f'<option value="{mark.replace(" ", "-")}">{mark}</option>' for mark in MARKS)
    return (
        f'<h2>Answers</h2><p class="soft">{escape(cut)}</p><form id="filter" hidden><input name="words" '
        'placeholder="search questions and answers" aria-label="search">'
        f'<select name="mark" aria-label="kind"><option value="">any answer</option>{marks}</select>'
        f'<select name="cell" aria-label="cell"><option value="">of any cell</option>{options}</select>'
        f'<span id="shown" class="soft"></span></form>{"".join(parts)}'
    )


def draw_question(cells: Sequence[Answered], place: int) -> str:
    """One question, folded; its first line names the cells with an exact match."""
    first = cells[0].rows[place]
    references = [first["reference"]] if isinstance(first["reference"], str) else first["reference"]
    found, answers, right = [], [], []
    for number, cell in enumerate(cells):
        row = cell.rows[place]
        marks = mark(row, references)
        found += [f"{number}:{mark.replace(' ', '-')}" for mark in marks]
        right += [cell.name] if "exact" in marks else []
        answer = row["prediction"][:LONGEST_ANSWER] + ("…" if len(row["prediction"]) > LONGEST_ANSWER else "")
        shown = ", ".join(mark for mark in marks if mark != "wrong")
        answers.append(
            f"<dt>{escape(cell.name)}{escape(f' ({shown})' if shown else '')}</dt><dd><pre>{escape(answer)}</pre></dd>"
        )
    exact = f' <span class="soft">exact: {escape(", ".join(right))}</span>' if right else ""
    return (
        f'<details data-marks="{" ".join(found)}"><summary>{escape(first["intent"])}{exact}</summary>'
        f'<dl class="reference"><dt>reference</dt><dd><pre>{escape(references[0])}</pre></dd></dl>'
        f"<dl>{''.join(answers)}</dl></details>"
    )


def mark(row: dict[str, Any], references: Sequence[str]) -> list[str]:
    """The MARKS that an answer bears."""
    answer = row["prediction"]
    if not answer.strip():
        return ["wrong", "empty"]
    found = ["exact" if is_exact(answer, references) else "wrong"]
    found += [] if is_valid_python(answer) else ["invalid"]
    found += ["repeated"] if is_repeated(answer) else []
    return found + (["cut off"] if row.get("ended") == "limit" else [])
