"""The answers section of the report: each question with its reference, every cell's answer, and a filter.

An answer is shown as a diff against the reference. The section is readable without JavaScript; page.js adds the filter
and the arrow keys.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from minipeft.metrics.text import is_exact, is_repeated, is_valid_python
from minipeft.study.charts import escape

LONGEST_ANSWER = 400  # characters shown of an answer
MOST_QUESTIONS = 500
MOST_BYTES = 700_000  # of answers; the page stays under a megabyte
LEGEND = (
    "Diff against the reference: <ins>added</ins>, <del>missing</del>; an answer with little in common is shown "
    "without a diff. Arrow keys move between questions. Not shown: the empty answer, print(x), the echoed question."
)
MARKS = ("exact", "passes", "wrong", "invalid", "empty", "repeated", "cut off")
LEAST_ALIKE = 0.3  # similarity ratio to the reference, below which no diff is shown


@dataclass(frozen=True)
class Answered:
    """A cell's name and the rows of its predictions.jsonl."""

    name: str
    rows: Sequence[dict[str, Any]]
    language: str = "python"  # of the references


def browse(cells: Sequence[Answered]) -> str:
    """Render all questions, each collapsed, after the filter; "" where no cell answered."""
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
        f'<h2>Answers</h2><p class="soft note">{LEGEND} {escape(cut)}</p>'
        '<form id="filter" hidden><label>Search questions and answers<input name="words" type="search"></label>'
        f'<label>Answers that are<select name="mark"><option value="">of any kind</option>{marks}</select></label>'
        f'<label>Given by<select name="cell"><option value="">any</option>{options}</select></label>'
        '<button type="button" name="fold" class="button">Open or close all shown</button>'
        '<button type="button" name="more" class="button">Show all that fit</button>'
        f'<span id="shown" class="soft" role="status"></span></form>{"".join(parts)}'
    )


def draw_question(cells: Sequence[Answered], place: int) -> str:
    """Render one question, collapsed; its summary line names the cells with an exact match."""
    first = cells[0].rows[place]
    references = [first["reference"]] if isinstance(first["reference"], str) else first["reference"]
    found, answers, right = [], [], []
    for number, cell in enumerate(cells):
        row = cell.rows[place]
        marks = mark(row, references, cell.language)
        found += [f"{number}:{mark.replace(' ', '-')}" for mark in marks]
        right += [cell.name] if "exact" in marks else []
        shown = ", ".join(mark for mark in marks if mark != "wrong")
        body = mark_difference(cut_long(row["prediction"]), cut_long(references[0]))
        answers.append(
            f"<dt>{escape(cell.name)}{escape(f' ({shown})' if shown else '')}</dt><dd><pre>{body}</pre></dd>"
        )
    exact = f' <span class="soft">exact: {escape(", ".join(right))}</span>' if right else ""
    return (
        f'<details data-marks="{" ".join(found)}"><summary>{escape(first["intent"])}{exact}</summary>'
        f'<dl class="reference"><dt>reference</dt><dd><pre>{escape(cut_long(references[0]))}</pre></dd></dl>'
        f"<dl>{''.join(answers)}</dl></details>"
    )


def cut_long(text: str) -> str:
    """Truncate a text to LONGEST_ANSWER characters."""
    return text if len(text) <= LONGEST_ANSWER else f"{text[:LONGEST_ANSWER]}…"


def mark_difference(answer: str, reference: str) -> str:
    """Render the answer as a diff: <ins> added, <del> missing; plain text where little is in common."""
    had, has = (re.findall(r"\w+|\s+|.", text, re.DOTALL) for text in (reference, answer))
    matcher = SequenceMatcher(None, had, has, autojunk=False)
    if answer == reference or matcher.ratio() < LEAST_ALIKE:
        return escape(answer)
    parts = []
    for kind, start, end, left, right in matcher.get_opcodes():
        lacking, more = escape("".join(had[start:end])), escape("".join(has[left:right]))
        parts += [more] if kind == "equal" else []
        parts += [f"<del>{lacking}</del>"] if lacking and kind != "equal" else []
        parts += [f"<ins>{more}</ins>"] if more and kind != "equal" else []
    return "".join(parts)


def mark(row: dict[str, Any], references: Sequence[str], language: str) -> list[str]:
    """List the MARKS that apply to an answer."""
    answer = row["prediction"]
    if not answer.strip():
        return ["wrong", "empty"]
    found = ["exact" if is_exact(answer, references) else "wrong"]
    found += [] if language != "python" or is_valid_python(answer) else ["invalid"]
    found += ["passes"] if row.get("ran") == "passed" else []
    found += ["repeated"] if is_repeated(answer) else []
    return found + (["cut off"] if row.get("ended") == "limit" else [])
