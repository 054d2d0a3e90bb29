"""Read the stops of the tour from Markdown with directives, and refuse a number that the build has not computed.

    # Title                            the first line
    ... {{loss}} or {{loss:.2f}} ...   a value that the stop's function returns under this name
    {{loss_table}}                     alone on a line: a table, a drawing or a program's output
    {{source minipeft.documents.visible}}   alone on a line: the definition of this name
    ```math                            an equation, as text

In prose a digit stands only in a name (GPT-2, float32), in a citation (Hu et al. 2021), or in code that is more than a
number. Everything else must come from a directive.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from minipeft.errors import InputError
from minipeft.files import read_text
from minipeft.tour.values import Drawing, Output, Table, Value, show

FOLDER = Path(__file__).parent / "stops"
DIRECTIVE = re.compile(r"\{\{([^{}]+)\}\}")
NAMED = re.compile(r"^source\s+([\w.]+)$")
VALUE = re.compile(r"^(\w+)(?::([^{}:]+))?$")
NAMES = re.compile(
    r"\b(?:GPT-2|BLEU-4|float16|float32|float64|bfloat16|int64|uint16|Llama 2|Mistral-7B|CodeLlama-7B|AdamW|eq\. \d+|"
    r"section \d+(?:\.\d+)?|SHA-256)\b|\(IA\)3"
)
CITED = re.compile(r"\b[A-Z][\w’'-]+(?: et al\.| (?:&|and) [A-Z]\w+)?,? (?:19|20)\d\d\b")
BARE = re.compile(r"^[\d\s.,%+−x×/-]+$")  # code that is nothing but a number
WORDS = re.compile(r"\b(?:hundreds?|thousands?|millions?|billions?|dozens?|per cent|percent)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Block:
    """A part of a stop: kind is "text", "math", "source" or "value"; `line` is its first line in the file."""

    kind: str
    text: str
    line: int
    form: str = ""


@dataclass(frozen=True)
class Stop:
    """One stop: its number and name (of NN-name.md), title, and parts in order."""

    number: int
    name: str
    title: str
    blocks: tuple[Block, ...]
    file: Path

    def used(self) -> set[str]:
        """The names of the values that the stop shows."""
        found = {block.text for block in self.blocks if block.kind == "value"}
        texts = [block.text for block in self.blocks if block.kind == "text"]
        return found | {split_value(inner)[0] for text in texts for inner in DIRECTIVE.findall(text)}


@dataclass(frozen=True)
class Measured:
    """A stop with the values that were computed for it."""

    stop: Stop
    values: Mapping[str, Value]


def read_stops(folder: Path = FOLDER) -> list[Stop]:
    """Read all stops in order.

    Raises:
        InputError: a stop has no title, a directive that cannot be read, or a number that is not computed.
    """
    return [read_stop(file) for file in sorted(folder.glob("[0-9][0-9]-*.md"))]


def read_stop(file: Path) -> Stop:
    """Read one stop."""
    text = read_text(file)
    first, _, rest = text.partition("\n")
    if not first.startswith("# "):
        raise InputError("must begin with '# ' and a title", file=file, where="line 1")
    blocks = tuple(split_blocks(rest, file))
    for block in blocks:
        if block.kind == "text":
            check_prose(block.text, file, block.line)
    number, _, name = file.stem.partition("-")
    return Stop(int(number), name, first[2:].strip(), blocks, file)


def split_blocks(text: str, file: Path) -> Iterator[Block]:
    """Split a stop's text, from its second line on, into blocks."""
    held: list[str] = []
    start, fence = 2, ""
    for number, line in enumerate(text.split("\n"), 2):
        inner = DIRECTIVE.fullmatch(line.strip())
        opens = line.startswith("```")
        if not fence and (opens or inner):
            if any(part.strip() for part in held):
                yield Block("text", "\n".join(held).strip("\n"), start)
            held, start = [], number + 1
            if inner:
                yield read_directive(inner[1].strip(), file, number)
            else:
                fence = line[3:].strip() or "text"
                if fence != "math":
                    problem = f"a block of {fence!r} would be pasted"
                    hint = "Name the definition: {{source ...}}"
                    raise InputError(problem, file=file, where=f"line {number}", hint=hint)
        elif fence and opens:
            yield Block(fence, "\n".join(held), start)
            held, start, fence = [], number + 1, ""
        else:
            held.append(line)
    if fence:
        raise InputError("``` is not closed", file=file, where=f"line {start - 1}")
    if any(part.strip() for part in held):
        yield Block("text", "\n".join(held).strip("\n"), start)


def read_directive(inner: str, file: Path, line: int) -> Block:
    """Read a directive that stands alone on its line."""
    if named := NAMED.match(inner):
        return Block("source", named[1], line)
    if VALUE.match(inner):
        name, form = split_value(inner)
        return Block("value", name, line, form)
    raise InputError(f"cannot read {{{{{inner}}}}}", file=file, where=f"line {line}")


def split_value(inner: str) -> tuple[str, str]:
    """Split the inside of a directive into a value's name and its format."""
    name, _, form = inner.strip().partition(":")
    return name, form


def show_inline(inner: str, values: Mapping[str, Value]) -> str:
    """Format a value within a sentence.

    Raises:
        InputError: a table, drawing or output, which needs a line of its own.
    """
    name, form = split_value(inner)
    value = values[name]
    if isinstance(value, Table | Drawing | Output):
        raise InputError(f"{name!r} needs a line of its own", where="tour")
    return show(value, form)


def fill(text: str, values: Mapping[str, Value]) -> str:
    """Put the values into a stop's Markdown."""
    return DIRECTIVE.sub(lambda match: show_inline(match[1], values), text)


def check_prose(text: str, file: Path, line: int) -> None:
    """Refuse a number in prose that no directive computes. `line`: the first line of `text` in the file.

    Raises:
        InputError: names the line and the words.
    """
    for number, words in enumerate(text.split("\n"), line):
        plain = DIRECTIVE.sub(" ", words)
        spans = re.findall(r"`([^`]*)`", plain)
        plain = re.sub(r"`[^`]*`", " ", plain)
        plain = re.sub(r"\]\([^)]*\)", "]", plain)
        plain = NAMES.sub(" ", CITED.sub(" ", plain))
        found = [span for span in spans if BARE.match(span) and any(c.isdigit() for c in span)]
        found += re.findall(r"\S*\d\S*", plain) + WORDS.findall(plain)
        if found:
            hint = "Let the stop's function return it, and write {{name}}"
            raise InputError(
                f"{found[0]!r} is a number that is not computed", file=file, where=f"line {number}", hint=hint
            )
