"""Put a bug into the library while a test runs.

The chapter "Break it" plants public failures, one at a time, and the student writes a test that notices: it passes
with the library as it is, and fails with the bug.
"""

from __future__ import annotations
import __future__

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from minipeft.errors import InputError
from minipeft.tour.exercises.definitions import find_definition
from minipeft.tour.exercises.judging import require
from minipeft.tour.exercises.record import Bug, load_exercise

FAILURES = (AssertionError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)  # of a failed test


@contextmanager
def planted(bug: Bug) -> Iterator[None]:
    """Context manager: the library with the bug, wherever the function or method is used.

    Raises:
        InputError: the text that the patch replaces is not there exactly once.
    """
    definition = find_definition(bug.name)
    if definition.text.count(bug.before) != 1:
        raise InputError(f"{definition.text.count(bug.before)} places hold {bug.before!r}, not one", where=bug.name)
    module = importlib.import_module(definition.module)
    made: dict[str, Any] = {}
    code = definition.text.replace(bug.before, bug.after)
    flags = __future__.annotations.compiler_flag
    exec(compile(code, f"<{bug.name} with a bug>", "exec", flags=flags), vars(module), made)
    parent, _, name = definition.path.rpartition(".")
    owner = getattr(module, parent) if parent else module
    places = [(owner, name)] if parent else find_uses(getattr(owner, name))
    kept = getattr(owner, name)
    try:
        for place, bound in places:
            setattr(place, bound, made[name])
        yield
    finally:
        for place, bound in places:
            setattr(place, bound, kept)


def find_uses(function: Callable[..., Any]) -> list[tuple[ModuleType, str]]:
    """Every module, and the name in it, that is bound to a function."""
    modules = [module for module in list(sys.modules.values()) if isinstance(module, ModuleType)]
    return [(module, name) for module in modules for name, value in list(vars(module).items()) if value is function]


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
