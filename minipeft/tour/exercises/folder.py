"""The student's folder: exercise_N.py with its hole, test_exercise_N.py, and what is done (exercises.json)."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from minipeft.errors import InputError
from minipeft.files import hash_file, make_folder, read_object, read_text, write_json, write_whole
from minipeft.tour.exercises.checking import answer_file, test_file
from minipeft.tour.exercises.definitions import cut_body, find_definition, make_module
from minipeft.tour.exercises.record import Task, find_file, load_exercise

NOTES = "exercises.json"  # {"done": {number: sha256 of the file that passed}, "hints": {number: hints shown}}


def write_exercise(folder: Path, task: Task, overwrite: bool) -> list[Path]:
    """Write an exercise's file, and its checks; returns the paths. Without `overwrite` an answer is kept.

    Raises:
        InputError: both files are there already.
    """
    answer, test = answer_file(folder, task), test_file(folder, task)
    if answer.exists() and test.exists() and not overwrite:
        hint = f"minipeft exercise {task.number} --check runs its checks; --overwrite starts again"
        raise InputError("is there already", file=answer, hint=hint)
    make_folder(folder)
    texts = {answer: make_answer(task), test: make_test(task)}
    written = [file for file in texts if overwrite or not file.exists()]
    for file in written:
        write_whole(file, lambda stream, text=texts[file]: stream.write(text.encode()))  # type: ignore[misc]
    return written


def make_answer(task: Task, text: str | None = None) -> str:
    """The source of the student's file, with the hole; or with this source of the function."""
    definition = find_definition(load_exercise(task.name).solution)
    how = f"Write the body of `{definition.name}`, then: minipeft exercise {task.number} --check (and --hint)"
    head = f'"""Exercise {task.number}, {name_exercise(task)}\n\n{task.body}\n\n{how}\n"""'
    return make_module(definition, cut_body(definition.text) if text is None else text, head)


def make_test(task: Task) -> str:
    """The source of the checks: the exercise's file without its text, its record and a solution in the same file."""
    text = read_text(find_file(task.name))
    lines, hidden = text.splitlines(), {find_definition(load_exercise(task.name).solution).name, "EXERCISE"}
    tree = ast.parse(text)
    for node in reversed(tree.body):
        targets = node.targets if isinstance(node, ast.Assign) else []
        names = {getattr(node, "name", ""), *(target.id for target in targets if isinstance(target, ast.Name))}
        if names & hidden or node is tree.body[0]:
            lines[node.lineno - 1 : node.end_lineno] = []
    body = "\n".join(lines).strip("\n")
    body = re.sub(r"^(from minipeft\.tour\.exercises\.record import Answer), .*$", r"\1", body, flags=re.M)
    head = f'"""The checks of exercise {task.number}, {name_exercise(task)}"""'
    return f"{head}\n\n" + re.sub(r"\n{4,}", "\n\n\n", body) + "\n"


def name_exercise(task: Task) -> str:
    """Its chapter and its title, as a sentence."""
    return f"{task.chapter}: {task.title}" + ("" if task.title.endswith("?") else ".")


def read_notes(folder: Path) -> dict[str, dict[str, Any]]:
    """What is done in a folder, and the hints shown.

    Raises:
        InputError: the file is damaged.
    """
    file = folder / NOTES
    notes = read_object(file) if file.exists() else {}
    for part in ("done", "hints"):
        if not isinstance(notes.setdefault(part, {}), dict):
            raise InputError("must be an object", file=file, where=part)
    return notes


def note(folder: Path, part: str, task: Task, value: object) -> None:
    """Keep a value of an exercise in the notes; None removes it."""
    notes = read_notes(folder)
    notes[part].pop(str(task.number), None)
    if value is not None:
        notes[part][str(task.number)] = value
    write_json(folder / NOTES, notes)


def find_state(folder: Path, task: Task, notes: dict[str, dict[str, Any]]) -> str:
    """An exercise's state in a folder: "done", "changed since it was done", "begun", or ""."""
    file, passed = answer_file(folder, task), notes["done"].get(str(task.number))
    if not file.exists():
        return ""
    if passed is None:
        return "begun"
    return "done" if passed == hash_file(file) else "changed since it was done"


def next_hint(folder: Path, task: Task) -> tuple[int, int, str]:
    """The next hint of an exercise, its number and how many there are; after the last one, the last again."""
    hints = load_exercise(task.name).hints
    shown = read_notes(folder)["hints"].get(str(task.number), 0)
    number = min(shown + 1 if isinstance(shown, int) else 1, len(hints))
    note(folder, "hints", task, number)
    return number, len(hints), hints[number - 1]
