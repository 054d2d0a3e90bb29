"""What a stop computes when the book is built: numbers and texts by name, tables, drawings, program output, claims."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minipeft.errors import InputError
from minipeft.tour.page import frame

Plain = int | float | str


@dataclass(frozen=True)
class Table:
    """A head and rows of cells; numbers are formatted as in the text."""

    head: Sequence[str]
    rows: Sequence[Sequence[Plain]]

    def _repr_markdown_(self) -> str:
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return "\n".join("| " + " | ".join(show(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


@dataclass(frozen=True)
class Drawing:
    """HTML with inline SVG, and the same in words, for the Markdown book and for screen readers."""

    html: str
    words: str

    def _repr_html_(self) -> str:
        return frame(self.html)


@dataclass(frozen=True)
class Output:
    """Text as a program prints it."""

    text: str

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(self.text)


Value = Plain | Table | Drawing | Output


def show(value: Plain, form: str = "") -> str:
    """Format a number for the text: by `form`, else integers with commas and floats with three digits."""
    if isinstance(value, str):
        return value
    if form:
        return format(value, form)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def claim(holds: bool, sentence: str) -> None:
    """Check what the prose says of the numbers: the book is not built with a sentence that no longer holds.

    Raises:
        InputError: it does not hold.
    """
    if not holds:
        raise InputError(f"the numbers do not show that {sentence}", where="tour", hint="Correct the stop's text")
