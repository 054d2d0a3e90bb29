"""`minipeft exercise`: exercises that check themselves: write a function of this library, find a public bug."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from minipeft.cli.streams import show

if TYPE_CHECKING:
    from minipeft.tour.exercises.record import Task

HELP = "exercises that check themselves: write functions of this library, and tests that find public bugs"
EXAMPLE = """minipeft exercise 1
  minipeft exercise 1 --check"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "number",
        type=int,
        nargs="?",
        metavar="N",
        help="exercise to write, a file with one hole and its checks; without it all are listed",
    )
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument("--check", action="store_true", help="run the checks; exit status 1 where one fails")
    actions.add_argument("--hint", action="store_true", help="show a hint, another one each time")
    actions.add_argument("--solution", action="store_true", help="show the library's own function")
    actions.add_argument("--overwrite", action="store_true", help="write the files again, without your answer")
    parser.add_argument("--json", action="store_true", help="print the list, or what a check found, as JSON")
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="your folder (default: this one)")


def main(options: argparse.Namespace) -> int:
    from minipeft.errors import InputError
    from minipeft.tour.exercises.folder import write_exercise
    from minipeft.tour.exercises.record import find_task, load_exercise

    if options.number is None:
        if options.check or options.hint or options.solution or options.overwrite:
            raise InputError("needs the number of an exercise", where="exercise", hint="minipeft exercise lists them")
        return list_all(options.out, options.json)
    task = find_task(options.number)
    load_exercise(task.name)
    if options.check:
        return check(options.out, task, options.json)
    if options.hint:
        return hint(options.out, task)
    if options.solution:
        return solve(task)
    written = write_exercise(options.out, task, options.overwrite)
    show(f"Exercise {task.number}, {task.chapter}: {task.title}\n\n{task.body}\n")
    show(f"wrote {' and '.join(map(str, written))}\nnext: write it, then minipeft exercise {task.number} --check")
    return 0


def list_all(folder: Path, as_json: bool) -> int:
    """Print all exercises by chapter, with their state in this folder."""
    from minipeft.tour.exercises.folder import find_state, read_notes
    from minipeft.tour.exercises.record import NAMES, find_task

    notes = read_notes(folder)
    tasks = [find_task(number) for number in range(1, len(NAMES) + 1)]
    states = [find_state(folder, task, notes) for task in tasks]
    if as_json:
        fields = ("number", "chapter", "title")
        rows = [{name: getattr(task, name) for name in fields} | {"state": state} for task, state in zip(tasks, states)]
        show(json.dumps(rows, indent=2))
        return 0
    chapter = ""
    for task, state in zip(tasks, states):
        if task.chapter != chapter:
            show(f"\n{task.chapter}" if chapter else task.chapter)
            chapter = task.chapter
        show(f"  {task.number:>2}  {task.title}{f'  [{state}]' if state else ''}")
    show(f"\n{states.count('done')} of {len(tasks)} done. minipeft exercise N writes exercise N here.")
    return 0


def check(folder: Path, task: Task, as_json: bool) -> int:
    """Run the checks and say what they found."""
    from minipeft.files import hash_file
    from minipeft.tour.exercises.checking import answer_file, check_answer
    from minipeft.tour.exercises.folder import note
    from minipeft.tour.exercises.record import NAMES

    verdict = check_answer(folder, task)
    note(folder, "done", task, hash_file(answer_file(folder, task)) if verdict.done else None)
    if as_json:
        show(json.dumps({"number": task.number, "done": verdict.done, **vars(verdict)}, indent=2))
        return 0 if verdict.done else 1
    for claim in verdict.passed:
        show(f"  ok    {flatten(claim)}")
    if verdict.done:
        show(f"exercise {task.number} is done ({task.title})")
        if task.number < len(NAMES):
            show(f"next: minipeft exercise {task.number + 1}. The library's own: --solution")
        return 0
    show(f"  WRONG {flatten(verdict.failed or 'there are checks')}\n        {verdict.reason}")
    if verdict.left:
        show(f"  {verdict.left} more {'check was' if verdict.left == 1 else 'checks were'} not run")
    show(f"next: minipeft exercise {task.number} --hint")
    return 1


def flatten(text: str) -> str:
    """A claim on one line."""
    return " ".join(text.split())


def hint(folder: Path, task: Task) -> int:
    """Print the next hint."""
    from minipeft.tour.exercises.folder import next_hint

    number, count, text = next_hint(folder, task)
    show(f"hint {number} of {count}: {text}")
    if number == count:
        show(f"That was the last one. minipeft exercise {task.number} --solution shows the library's function.")
    return 0


def solve(task: Task) -> int:
    """Print the library's own function, and the patch of a bug."""
    from minipeft.tour.exercises.definitions import find_definition
    from minipeft.tour.exercises.record import load_exercise

    exercise = load_exercise(task.name)
    show(f"# {exercise.solution}\n{find_definition(exercise.solution).text}")
    if exercise.bug is not None:
        changed = [f"- {line}" for line in exercise.bug.before.splitlines()]
        changed += [f"+ {line}" for line in exercise.bug.after.splitlines()]
        show(f"# the bug, in {exercise.bug.name}\n" + "\n".join(changed))
    return 0
