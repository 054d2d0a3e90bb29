"""Make the demo's pairs (pairs.jsonl) from dialect.txt, and the general pairs of the demo model's pretraining.

    python -m minipeft.demo.make_pairs     # writes pairs.jsonl beside this file, the same bytes on every machine

pairs.jsonl is the study's task: questions about tables, answered with the functions of a house library (house.py). Its
fields are CoNaLa's (Yin et al. 2018), so that the same reader serves both; each pair has its own question. `split`:

    train   2,016 pairs of 28 operations
    test    168 of the same operations, with names, texts and numbers that no training pair has (names.py): the model
            has to copy them
    hard    60 of six operations that no training pair shows

General pairs fill templates.txt, whose code uses the standard library, with the same names: `make_general_pairs` yields
them for the pretraining corpus (corpus.py). They share no wording with the task.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from string import Template as Blank
from typing import TypeVar

from minipeft.demo.names import is_kept, split_names

HERE = Path(__file__).parent
TRAIN_PAIRS = 72  # of an operation, and of each of its wordings a third
TEST_PAIRS = {"taught": 6, "unseen": 10}  # of an operation
TEXTS = """amber autumn basic berlin black blue bold bronze cairo calm clear closed cold copper coral cotton crisp daily
dark deep delhi dry dublin east empty failed fast fixed flat free fresh full geneva glass gold grand gray green heavy
high hot iron ivory jade kyoto large leather lima linen locked loud low lunar marble milan minor misty moist narrow
navy north olive open orange oslo oval paid pale paris pending pink plain prague purple quiet rapid ready red rome
rough round royal rural sealed sharp shiny short silent silk silver simple slow small smooth soft solid south spring
square steel steep sunny sweet tall thin tokyo torn urban vague velvet violet warm weak west wet white wide winter
wooden yellow young"""
KINDS = {"t": "table", "c": "column", "v": "text", "n": "number", "m": "number"}

T = TypeVar("T")


@dataclass
class Template:
    """A block of a template file; `number` counts from 1. The head of the file explains the fields."""

    number: int
    split: str
    title: str
    intents: list[str] = field(default_factory=list)
    snippet: str = ""
    setup: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Pair:
    """A filled template: `slots` are what was drawn for its blanks."""

    intent: str
    snippet: str
    number: int  # of the question: 1000 * the operation's number + the turn, + 500 in the test
    split: str  # train, test, hard
    slots: tuple[tuple[str, str], ...]


def read_templates(file: Path = HERE / "dialect.txt") -> list[Template]:
    """Parse a template file; its head explains the format."""
    templates: list[Template] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            split, title = line[1:].split("] ", 1)
            templates.append(Template(len(templates) + 1, split, title))
        elif line.startswith("    "):
            templates[-1].snippet += line[4:] + "\n"
        elif line.startswith("! "):
            templates[-1].setup.append(line[2:])
        elif line and not line.startswith("#"):
            templates[-1].intents.append(line)
    return templates


def draw(choices: Sequence[T], *key: object) -> T:
    """Choose one of `choices` by the hash of a key: random.Random may differ between Python versions."""
    return choices[int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") % len(choices)]


@cache
def list_choices(kind: str, test: bool) -> list[str]:
    """The possible values of a slot: names, texts and numbers of the test questions, or of the other splits."""
    many, one = split_names(test)
    if kind == "table":
        return many
    if kind == "column":
        return one
    found = TEXTS.split() if kind == "text" else [str(number) for number in range(2, 100)]
    return [word for word in found if is_kept(word) is test]


def fill(template: Template, turn: int, test: bool) -> Pair:
    """Fill the template: its `turn`-th wording with the values drawn for that turn."""
    intent, snippet = template.intents[turn % len(template.intents)], template.snippet.rstrip("\n")
    drawn: dict[str, str] = {}
    for slot in sorted(set(Blank(snippet).get_identifiers())):
        left = [c for c in list_choices(KINDS[slot[0]], test) if c not in drawn.values()]
        drawn[slot] = draw(left, template.title, turn, slot, test)
    if "m" in drawn and int(drawn["m"]) < int(drawn["n"]):  # above n and below m
        drawn["m"], drawn["n"] = drawn["n"], drawn["m"]
    intent, snippet = Blank(intent).substitute(drawn), Blank(snippet).substitute(drawn)
    split = "train" if not test else "test" if template.split == "taught" else "hard"
    return Pair(intent, snippet, 1000 * template.number + turn + 500 * test, split, tuple(drawn.items()))


def make_pairs(templates: list[Template] | None = None) -> list[Pair]:
    """All pairs of the task, each once, split by split, shuffled within."""
    pairs: dict[tuple[str, str], Pair] = {}
    for template in read_templates() if templates is None else templates:
        for test in (False, True):
            wanted = TEST_PAIRS[template.split] if test else TRAIN_PAIRS * (template.split == "taught")
            before = len(pairs)
            for turn in range(10 * wanted):
                if len(pairs) - before == wanted:
                    break
                pair = fill(template, turn, test)
                pairs.setdefault((pair.intent, pair.snippet), pair)
    order = {"train": 0, "test": 1, "hard": 2}
    return sorted(
        pairs.values(), key=lambda p: (order[p.split], hashlib.sha256((p.intent + p.snippet).encode()).digest())
    )


# ---- general pairs, for the pretraining corpus

MANY = ("ints", "words", "lists", "tuples", "dicts", "matrix", "set")  # slots of templates.txt that a plural name fits
ONE = ("text", "map", "num", "float", "date", "path", "folder", "iterator", "object")
LITERALS = {  # slots with fixed values, or filled from the texts and names
    "i": ["0", "1"],
    "sep": [", ", "-", ":", ";", "|", "/", "_", " - ", "=", "+"],
    "ext": ["txt", "csv", "py", "json"],
    "env": ["HOME", "PATH", "USER", "DEBUG"],
}


def make_general_pairs(times: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Fill each wording of each block of templates.txt `times` times -> (intent, snippet), without test names."""
    many, one = split_names(test=False)
    texts, numbers = list_choices("text", False), list_choices("number", False)
    pool = {**dict.fromkeys(MANY, many), **dict.fromkeys(ONE, one), **LITERALS, "n": numbers, "m": numbers}
    for template in read_templates(HERE / "templates.txt"):
        snippet = template.snippet.rstrip("\n")
        for number, intent in enumerate(template.intents):
            slots = sorted(set(Blank(snippet).get_identifiers()) | set(Blank(intent).get_identifiers()))
            for turn in range(times):
                drawn: dict[str, str] = {}
                for slot in slots:
                    choices = pool.get(slot.rstrip("2"), texts)  # sub, fruit, key, field: any text
                    left = [c for c in choices if c not in drawn.values()]
                    drawn[slot] = draw(left, seed, template.title, number, turn, slot)
                yield Blank(intent).substitute(drawn), Blank(snippet).substitute(drawn)


def format_lines(pairs: list[Pair]) -> str:
    """The text of pairs.jsonl."""
    rows = (
        {
            "intent": p.intent,
            "rewritten_intent": p.intent,
            "snippet": p.snippet,
            "question_id": p.number,
            "split": p.split,
        }
        for p in pairs
    )
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "pairs.jsonl")
    parser.parse_args().out.write_text(format_lines(make_pairs()), encoding="utf-8")


if __name__ == "__main__":
    main()
