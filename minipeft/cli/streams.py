"""Terminal output: escape sequences from a file, a path or a model are shown as text."""

from __future__ import annotations

import sys

from minipeft.errors import escape

KEPT = "\n\t"


def report(text: str) -> None:
    """Print to standard error."""
    print(escape(text, KEPT), file=sys.stderr, flush=True)


def show(text: str, *, as_is: bool = False) -> None:
    """Print to standard output. `as_is`: a pipe or file gets the text unchanged, only a terminal gets it escaped."""
    whole = as_is and not (sys.stdout is not None and sys.stdout.isatty())
    print(text if whole else escape(text, KEPT))
