"""The exercises: their chapters and order, and the record of one."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipeft.errors import InputError
from minipeft.files import read_text

Answer = Callable[..., Any]  # the student's function
TASKS = "minipeft.tour.exercises.tasks"
CHAPTERS = {  # title: the exercises' files in tasks/, in order
    "LoRA": ("lora_forward", "lora_init", "lora_backward", "dora_norms"),
    "Merging": ("merge_lora", "merge_vera", "combine_svd", "merge_divergence"),
    "Prefix and prompt": ("text_to_length", "positions", "prefix_gate"),
    "Packing and masks": ("visibility", "fill_rows", "supervised", "left_padding"),
    "Training and resume": ("learning_rate", "adamw", "accumulation", "chunked_loss", "atomic_write"),
    "Metrics and sampling": ("bleu_counts", "bleu_score", "bootstrap_questions", "repetition", "nucleus"),
    "A Triton kernel": ("kernel_add", "kernel_reduce", "kernel_shrink", "kernel_lora"),
    "Break it": (
        "bug_accumulation",
        "bug_packing",
        "bug_eos",
        "bug_merge",
        "bug_scale",
        "bug_dropout",
        "bug_order",
        "bug_padding",
        "bug_codebleu",
    ),
}
NAMES = tuple(name for names in CHAPTERS.values() for name in names)


@dataclass(frozen=True)
class Bug:
    """A public failure as a patch: in the source of the function `name`, the text `before` becomes `after`."""

    name: str
    before: str
    after: str


@dataclass(frozen=True)
class Exercise:
    """What the file of an exercise declares. `solution`: the dotted name of the function that the student writes."""

    solution: str
    hints: tuple[str, ...]
    needs: str | None = None  # a package that is not among the base dependencies
    bug: Bug | None = None


@dataclass(frozen=True)
class Task:
    """The text of an exercise: its number from 1, its chapter, and the title and body of its docstring."""

    number: int
    name: str
    chapter: str
    title: str
    body: str


def find_task(number: int) -> Task:
    """Read the text of exercise `number`.

    Raises:
        InputError: there is no such exercise.
    """
    if not 1 <= number <= len(NAMES):
        raise InputError(f"there are {len(NAMES)} exercises, from 1", where=f"exercise {number}")
    name = NAMES[number - 1]
    chapter = next(title for title, names in CHAPTERS.items() if name in names)
    text = ast.get_docstring(ast.parse(read_text(find_file(name)))) or ""
    title, _, body = text.partition("\n")
    return Task(number, name, chapter, title.rstrip("."), body.strip("\n"))


def find_file(name: str) -> Path:
    """The file of an exercise."""
    return Path(__file__).parent / "tasks" / f"{name}.py"


def load_exercise(name: str) -> Exercise:
    """Read the record of an exercise from its file, without importing it (and torch).

    Raises:
        InputError: a package that it needs is not installed.
    """
    tree = ast.parse(read_text(find_file(name)))
    nodes = (node for node in tree.body if isinstance(node, ast.Assign))
    call = next(node.value for node in nodes if ast.unparse(node.targets[0]) == "EXERCISE")
    assert isinstance(call, ast.Call)
    exercise = Exercise(**{str(keyword.arg): read_literal(keyword.value) for keyword in call.keywords})
    if exercise.needs is not None and importlib.util.find_spec(exercise.needs) is None:
        hint = "pip install minipeft[kernels]"
        raise InputError(f"needs {exercise.needs}, which is not installed", where=f"exercise {name}", hint=hint)
    return exercise


def read_literal(node: ast.expr) -> Any:
    """The value of a literal, or of Bug(...) with literals."""
    if not isinstance(node, ast.Call):
        return ast.literal_eval(node)
    return Bug(
        *map(ast.literal_eval, node.args),
        **{str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords},
    )


def list_checks(namespace: dict[str, Any]) -> list[Callable[[Answer], None]]:
    """The checks that a module defines, in its order."""
    functions = [value for name, value in namespace.items() if name.startswith("check_") and inspect.isfunction(value)]
    return [function for function in functions if function.__module__ == namespace["__name__"]]
