"""Fixtures of the metrics' tests: texts, and the codebleu package 0.7.0 as reference, with two fixes."""

import json
import os
import random
import re
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

import pytest


class OrderedSet(dict):
    """A set in insertion order: `list(set(names))` then does not depend on hashes."""

    def __init__(self, members: Iterable = ()):
        super().__init__(dict.fromkeys(members))

    def add(self, member: object) -> None:
        self[member] = None


def cut_by_bytes(index: tuple, lines: list[str]) -> str:
    """The text between two points whose columns count bytes."""
    (row, column), (last_row, last_column) = index
    data = [line.encode() for line in lines]
    if row == last_row:
        return data[row][column:last_column].decode()
    return b"".join([data[row][column:], *data[row + 1 : last_row], data[last_row][:last_column]]).decode()


@pytest.fixture(scope="session")
def package() -> Callable[..., dict[str, float]]:
    """`calc_codebleu(references, predictions, "python")` of the package, repaired; its only warning is muted."""
    try:
        import codebleu
        from codebleu import dataflow_match
        from codebleu.parser import DFG
    except ImportError:
        missing = "the judge is missing: pip install --no-deps codebleu==0.7.0"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    assert version("codebleu") == "0.7.0"
    dataflow_match.set = OrderedSet
    DFG.set = OrderedSet
    dataflow_match.index_to_code_token = cut_by_bytes
    dataflow_match.logging.warning = lambda *_: None
    return codebleu.calc_codebleu


@pytest.fixture(scope="session")
def snippets() -> list[str]:
    """Texts: one-liners, blocks, tabs, CRLF, not ASCII, Python 2, broken, no code at all."""
    return json.loads((Path(__file__).parent / "snippets.json").read_text())


@pytest.fixture(scope="session")
def mutate() -> Callable[[str, random.Random], str]:
    """A text with 1 to 4 of its tokens deleted, doubled, exchanged, or something put between them."""
    pieces = ["(", ")", "[", "]", ":", "=", ",", ".", "if ", "else:", "for ", " in ", "x", "\n", "\n    ", "\t", "\r\n"]
    pieces += ["\f", "\\\n", "\\", "$", "?", "#", "'", '"', "'''", '"""', "é", "\0", "lambda ", "def f(", "f'{x}'", ";"]

    def change(text: str, random: random.Random) -> str:
        tokens = re.findall(r"\w+|\s+|[^\w\s]", text)
        for _ in range(random.randint(1, 4)):
            place = random.randrange(len(tokens) + 1)
            action = random.randrange(4)
            if action == 0:
                del tokens[place : place + 1]
            elif action == 1:
                tokens.insert(place, random.choice(pieces))
            elif action == 2 and tokens:
                tokens.insert(place, random.choice(tokens))
            elif tokens[place + 1 :]:
                tokens[place], tokens[place + 1] = tokens[place + 1], tokens[place]
        return "".join(tokens)

    return change
