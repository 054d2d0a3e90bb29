"""Put a bug into the library while a test runs.

The chapter "Break it" plants public failures, one at a time, and the student writes a test that notices: it passes
with the library as it is, and fails with the bug.
"""

from __future__ import annotations

import importlib
import inspect
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minipeft.errors import InputError
from minipeft.tour.exercises.checking import load_file
from minipeft.tour.exercises.definitions import find_definition, make_module
from minipeft.tour.exercises.judging import require
from minipeft.tour.exercises.record import Bug, load_exercise

FAILURES = (AssertionError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)  # of a failed test


@contextmanager
def planted(bug: Bug) -> Iterator[None]:
    """Context manager: the library with the bug, wherever the function or method is used.

    The patched source is loaded from a file, like an exercise, and its code object takes the place of the function's:
    whoever holds the function runs it, with the function's own globals.

    Raises:
        InputError: the text that the patch replaces is not there exactly once.
    """
    definition = find_definition(bug.name)
    if definition.text.count(bug.before) != 1:
        raise InputError(f"{definition.text.count(bug.before)} places hold {bug.before!r}, not one", where=bug.name)
    held: Any = importlib.import_module(definition.module)
    for part in definition.path.split("."):
        held = getattr(held, part)
    with tempfile.TemporaryDirectory(prefix="minipeft-bug-") as folder:
        file = Path(folder, f"patched_{definition.name}.py")
        file.write_text(make_module(definition, definition.text.replace(bug.before, bug.after), ""), encoding="utf-8")
        patched = inspect.unwrap(getattr(load_file(file), definition.name))
    function = inspect.unwrap(held)
    kept = function.__code__
    try:
        function.__code__ = patched.__code__
        forget(held)
        yield
    finally:
        function.__code__ = kept
        forget(held)


def forget(function: Any) -> None:
    """Empty the cache of a function that has one."""
    if hasattr(function, "cache_clear"):
        function.cache_clear()


def require_caught(test: Callable[[], None], exercise: str) -> None:
    """Assert that a test fails while the bug of this exercise is in the library."""
    bug = load_exercise(exercise).bug
    assert bug is not None
    caught = False
    with planted(bug):
        try:
            test()
        except FAILURES:
            caught = True
    require(caught, "your test also passes with the bug: it does not notice it")
