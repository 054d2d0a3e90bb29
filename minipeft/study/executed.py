"""Run the answers of a finished cell against the demo's programs, and add pass@1 to its row.

cells/NAME/executed.jsonl   a line for each answer: status (passed, failed, timeout) and the end of what it printed
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from minipeft.files import write_json, write_whole
from minipeft.metrics.execution import run_programs
from minipeft.metrics.programs import DEMO, build_programs
from minipeft.metrics.scores import add_passes
from minipeft.runs.answers import read_answer_lines
from minipeft.study.cells import ANSWERS, RESULT
from minipeft.study.rows import Row

EXECUTED = "executed.jsonl"


def execute_row(row: Row, out: Path) -> Row:
    """Add pass@1 to a row; a row without answers, or with pass@1, is returned unchanged.

    Raises:
        InputError: this machine cannot isolate programs; nothing was run.
    """
    folder = out / "cells" / row.cell
    if row.scores is None or row.scores["pass_at_1"] is not None:
        return row
    answers = list(read_answer_lines(folder / ANSWERS))
    outcomes = run_programs(build_programs(answers, DEMO))
    text = "".join(json.dumps(outcome._asdict()) + "\n" for outcome in outcomes)
    write_whole(folder / EXECUTED, lambda stream: stream.write(text.encode()))
    passed = [outcome.status == "passed" for outcome in outcomes]
    row = replace(row, scores=add_passes(row.scores, passed, [answer.get("question_id") for answer in answers]))
    write_json(folder / RESULT, row.as_json(counts=True))
    return row
