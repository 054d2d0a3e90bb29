"""Writes a study's results.json, report.md and report.html, and formats the summary for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minipeft.errors import escape
from minipeft.files import parse_json, read_text, write_json, write_whole
from minipeft.metrics.scores import TEXT_ONLY
from minipeft.runs.answers import read_answer_lines
from minipeft.study import ranking, rates_report
from minipeft.study.baselines import SAME_EACH_TIME
from minipeft.study.browser import Answered
from minipeft.study.cells import ANSWERS
from minipeft.study.curves import Curve
from minipeft.study.effects import decide
from minipeft.study.executed import EXECUTED
from minipeft.study.packed_rows import draw_packed_rows
from minipeft.study.page import draw_page, list_tables
from minipeft.study.prefix_experiment import MEANING, Grid, conclude, find_several_seeds, make_grids
from minipeft.study.rows import Results
from minipeft.study.table import (
    as_line,
    as_markdown,
    as_text,
    choose_columns,
    choose_main_columns,
    group_by_flag,
    join_names,
    measure_terminal,
    name_groups,
)

MOST_SHOWN = 24  # cells with answers; the page of the demo's nine methods and five seeds would have 5 MB
NOTES = (
    "Intervals are percentile bootstraps over questions; pairs of one question are resampled together. A difference "
    "whose interval excludes 0 generalizes to questions like these; with one seed it says nothing about other seeds.",
    'An answer ends at the end-of-text token or at the token limit. "zero-shot, first line" is the untrained model\'s '
    "answer up to its first newline: its score if it knew where to stop.",
    "CodeBLEU is strict: a part without a match counts 0. The codebleu package counts a data-flow match of 0 as 1, "
    "which gives 0.25 to an empty answer; its total is shown beside the strict one.",
)


def write_report(results: Results, out: Path) -> None:
    """Write results.json, report.md and report.html into the study's folder."""
    write_json(out / "results.json", as_json(results))
    text = draw_markdown(results)
    write_whole(out / "report.md", lambda stream: stream.write(text.encode("utf-8", "backslashreplace")))
    packed = draw_packed_rows(results, out, name_cells(results))
    curves, answers = read_curves(results, out), read_all_answers(results, out)
    page = draw_page(results, summarize(results), NOTES, curves, answers, packed)
    write_whole(out / "report.html", lambda stream: stream.write(page.encode("utf-8", "backslashreplace")))


def as_json(results: Results) -> dict[str, Any]:
    """results.json: the results, their ranking, and what the preset's experiment found."""
    return results.as_json() | ranking.as_json(results) | rates_report.as_json(results)


def summarize(results: Results) -> list[str]:
    """Summarize the findings in a few sentences."""
    named = list(zip(name_groups(results.groups), results.groups))
    done = [(name, group) for name, group in named if group.error is None]
    data = results.data
    text = decide(results.groups) + conclude(results) + rates_report.conclude(results)
    silent = [(name, group) for name, group in done if group.scores is None]
    if silent:
        name, best = min(silent, key=lambda pair: pair[1].dev_loss)
        text.append(f"Of the {len(silent)} without answers, {name} has the lowest held-out loss, {best.dev_loss:.3f}.")
    if not text:
        name, best = max(((n, g) for n, g in done if not g.model), key=lambda pair: pair[1].bleu or 0.0)
        text.append(f"The best baseline without a model, {name!r}, scores BLEU {100 * (best.bleu or 0.0):.1f}.")
    text.append(f"Test set: {data.pairs} pairs of {data.questions} questions ({data.source}).")
    if any(group.scores is not None and group.scores.language == "text" for _, group in done):
        text.append(f"The references are {TEXT_ONLY}.")
    failed = [name for name, group in named if group.error is not None]
    return [*text, f"Failed: {', '.join(failed)}."] if failed else text


def as_terminal(results: Results, out: Path) -> str:
    """Format the summary that the command prints."""
    flags = [
        f"! {join_names(who)}: {flag}"
        for flag, who in group_by_flag(results.groups).items()
        if not flag.startswith("CodeBLEU artefact")
    ]
    wrapped = [textwrap.fill(text, measure_terminal(), subsequent_indent="  ") for text in flags]
    verdict = textwrap.fill(" ".join(summarize(results)), measure_terminal())
    parts = [as_text(results.groups), verdict, "\n".join(wrapped), f"{out / 'report.html'}"]
    return "\n\n".join(part for part in parts if part)


def draw_markdown(results: Results) -> str:
    """report.md"""
    groups, main = results.groups, choose_main_columns(results.groups)
    all_columns = [column for column in choose_columns(groups) if column.title not in [one.title for one in main]]
    flags = (
        "\n".join(as_line(f"- {join_names(who)}: {flag}") for flag, who in group_by_flag(groups).items()) or "- none"
    )
    meanings = "\n".join(f"- {column.title}: {column.meaning}" for column in (*main, *all_columns))
    environment = ", ".join(f"{name} {value}" for name, value in results.environment.items() if value is not None)
    command, summary = escape(results.command), as_line(" ".join(summarize(results)))
    parts = [
        f"# Study: {results.preset}\n\n    {command}\n\n{summary}",
        as_markdown(groups, main),
        f"## All columns\n\n{as_markdown(groups)}",
        *(f"## {title}\n\n{meaning}\n\n{as_markdown_table(rows)}" for title, meaning, rows in list_tables(results)),
        *(f"## Prefixes after {grid.steps} steps\n\n{MEANING}\n\n{draw_grid(grid)}" for grid in make_grids(groups)),
        *(
            f"## Held-out loss after {steps} steps\n\n"
            + "\n".join(as_line(f"- {name}: {label}") for name, label, _ in rows)
            for steps, rows in find_several_seeds(results).items()
        ),
        f"## Caveats\n\n{flags}",
        f"## Columns\n\n{meanings}",
        *(NOTES if any(column.title == "CodeBLEU" for column in all_columns) else NOTES[:-1]),
        f"Made with {as_line(environment)}.\n",
    ]
    return "\n\n".join(parts)


def as_markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows of text as a Markdown table, header first."""
    head, *rest = [[as_line(cell) for cell in row] for row in rows]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rest]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def draw_grid(grid: Grid) -> str:
    """Format a grid as Markdown."""
    text = as_markdown_table(grid.texts())
    return text + "\n\nTo compare with: " + as_line(", ".join(name for name, _ in grid.others)) + "."


def name_cells(results: Results) -> dict[str, str]:
    """Name each cell: its group's name, and its seed unless 0."""
    seeds = {row.cell: f" seed {row.seed}" if row.seed else "" for row in results.cells}
    named = zip(name_groups(results.groups), results.groups)
    return {cell: name + seeds[cell] for name, group in named for cell in group.cells}


def choose_shown(results: Results) -> set[str]:
    """The cells whose curves and answers the page shows: those of the tables, or, of many, their first seed."""
    grouped = {cell for group in results.groups for cell in group.cells}
    done = [row for row in results.cells if row.error is None and row.cell in grouped]
    first = {group.cells[0] for group in results.groups if group.cells}
    many = sum(row.scores is not None for row in done) > MOST_SHOWN
    return {row.cell for row in done if not many or row.cell in first or row.scores is None}


def read_curves(results: Results, out: Path) -> list[Curve]:
    """The losses of each trained cell, from its log; where any cell answered, only of those that did."""
    found, called, shown = [], name_cells(results), choose_shown(results)
    answered = any(row.scores is not None and row.training.steps for row in results.cells)
    for row in results.cells:
        file = out / "cells" / row.cell / "run" / "log.jsonl"
        if row.error is not None or not file.exists() or (answered and row.scores is None) or row.cell not in shown:
            continue
        entries = [parse_json(line, file) for line in read_text(file).splitlines()]
        pick = lambda name, entries=entries: [(e["step"], e[name]) for e in entries if e.get(name) is not None]
        found.append(Curve(called[row.cell], pick("loss"), pick("dev_loss")))
    return found


def read_all_answers(results: Results, out: Path) -> list[Answered]:
    """Of each cell whose answers are worth reading its name and its answers, in the order of the questions."""
    called, shown = name_cells(results), choose_shown(results)
    return [
        Answered(called[row.cell], read_cell_answers(out / "cells" / row.cell), row.scores.language)
        for row in results.cells
        if row.cell in shown and row.scores is not None and row.method not in SAME_EACH_TIME
    ]


def read_cell_answers(folder: Path) -> list[dict[str, Any]]:
    """The answers of a cell, each with how its program ended where it was run."""
    rows, file = list(read_answer_lines(folder / ANSWERS)), folder / EXECUTED
    if not file.exists():
        return rows
    ran = [parse_json(line, file)["status"] for line in read_text(file).splitlines()]
    return [row | {"ran": status} for row, status in zip(rows, ran, strict=True)]
