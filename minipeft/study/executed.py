"""Run the answers of a study's cells against the demo's programs, and add pass@1 to their rows.

cells/NAME/executed.jsonl   a line for each answer: status (passed, failed, timeout) and the end of what it printed

Methods and seeds often give the same answer to a question: a program runs once for all of them.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from minipeft.files import write_json, write_whole
from minipeft.metrics.execution import Outcome, run_programs
from minipeft.metrics.programs import DEMO, build_programs
from minipeft.metrics.scores import add_passes
from minipeft.runs.answers import read_answer_lines
from minipeft.study.cells import ANSWERS, RESULT
from minipeft.study.rows import Row

EXECUTED = "executed.jsonl"


def execute_row(row: Row, out: Path, known: dict[str, Outcome]) -> Row:
    """Add pass@1 to a row; a row without answers, or with pass@1, is returned unchanged.

    `known`: how each program that was run before ended; the row's new ones are added.

    Raises:
        InputError: this machine cannot isolate programs; nothing was run.
    """
    folder = out / "cells" / row.cell
    if row.scores is None or row.scores["pass_at_1"] is not None:
        return row
    answers = list(read_answer_lines(folder / ANSWERS))
    programs = build_programs(answers, DEMO)
    new = [program for program in dict.fromkeys(programs) if program not in known]
    known.update(zip(new, run_programs(new), strict=True))
    outcomes = [known[program] for program in programs]
    text = "".join(json.dumps(outcome._asdict()) + "\n" for outcome in outcomes)
    write_whole(folder / EXECUTED, lambda stream: stream.write(text.encode()))
    passed = [outcome.status == "passed" for outcome in outcomes]
    row = replace(row, scores=add_passes(row.scores, passed, [answer.get("question_id") for answer in answers]))
    write_json(folder / RESULT, row.as_json(counts=True))
    return row
