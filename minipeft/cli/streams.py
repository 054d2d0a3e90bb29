"""What a person reads while a program reads standard output: lines on standard error."""

from __future__ import annotations

import sys

from minipeft.errors import escape


def report(text: str) -> None:
    """Print to standard error, escape sequences as text."""
    print("\n".join(escape(line) for line in text.split("\n")), file=sys.stderr, flush=True)
