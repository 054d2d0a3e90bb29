"""Make the demo's intent/snippet pairs (pairs.jsonl) from templates.txt, the same bytes on every machine.

    python -m minipeft.demo.make_pairs     # writes pairs.jsonl beside this file; a test runs each snippet of it

The fields are CoNaLa's (Yin et al. 2018), so that whatever reads CoNaLa reads this: intent, rewritten_intent (here the
same), snippet, question_id (the template's number). `split` is "train" or "test". The test split has templates of its
own, and names of its own for every variable and literal: a model that learned the training pairs by heart knows none.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template as Blank
from typing import TypeVar

HERE = Path(__file__).parent
TRAIN_PAIRS, TEST_PAIRS = 8, 3  # of a template; fewer where it has not so many ways to be filled
RAISES = "raises "

# A variable: what it holds when a snippet is run; the second of a kind holds something else.
VALUES = {
    "ints": ("[4, 8, 15, 16, 23, 42, 8]", "[8, 15, 3, 7, 42, 1, 9]"),
    "words": ("['pear', 'fig', 'apple', 'kiwi', 'fig']", "['plum', 'fig']"),
    "text": ("'  Der quick brown fox, a 2nd one-liner'", "'fox'"),
    "map": (
        "dict(a=3, b=1, name=2, id=7, color=5, size=4, kind=6, code=8, unit=9, status=10)",
        "dict(a=5, c=1, name=4)",
    ),
    "lists": ("{}",),
    "num": ("37", "12"),
    "float": ("3.14159", "3.14160"),
    "tuples": ("[('b', 2), ('a', 3), ('c', 1)]",),
    "dicts": (
        "[dict.fromkeys(('name', 'city', 'title', 'email', 'country', 'team'), 'Ann')"
        " | dict.fromkeys(('age', 'score', 'price', 'salary', 'height', 'rank'), 5)]",
    ),
    "matrix": ("[[1, 5, 3], [4, 2, 6], [7, 8, 9]]",),
    "set": ("{1, 2, 3, 5}", "{2, 3, 4}"),
    "date": ("__import__('datetime').datetime(2024, 3, 15, 10, 30)", "__import__('datetime').datetime(2023, 12, 1)"),
    "path": ("'notes.txt'",),
    "folder": ("'folder'",),
    "iterator": ("iter([1, 2, 3])",),
    "object": ("object()",),
}
# Each slot: what a split may put there. No variable's name stands in both splits, nor does a literal.
TRAIN = {
    "ints": "numbers values scores nums ages prices sizes my_list",
    "words": "words names items tokens fruits tags strings",
    "text": "s text message sentence name title greeting",
    "map": "d mapping table stock config lookup my_dict",
    "lists": "buckets index by_key",
    "num": "n x number k size age",
    "float": "price ratio score y temperature",
    "tuples": "pairs tuples records points results",
    "dicts": "people users students products books",
    "matrix": "matrix grid lists nested board",
    "set": "a seen left chosen ids",
    "date": "dt date when day created",
    "path": "path filename file_path fname input_file",
    "folder": "folder directory root base_dir",
    "iterator": "it iterator stream",
    "object": "obj node item",
    "n": "2 3 4 5 10",
    "i": "0 1",
    "sep": [", ", "-", ":", ";", "|", "/"],
    "sub": "a the ing pre un foo py",
    "fruit": "apple pear plum cherry",
    "key": "a b name id color size",
    "field": "name city title",
    "nfield": "age score price",
    "ext": "txt csv py json",
    "env": "HOME PATH USER DEBUG",
}
TEST = {
    "ints": "amounts readings marks totals levels",
    "words": "cities terms headings fields entries",
    "text": "phrase comment paragraph caption header",
    "map": "inventory weights ratings votes quotas",
    "num": "amount total quantity number_of_seats",
    "float": "weight rate speed distance",
    "tuples": "couples edges samples hits",
    "dicts": "employees players customers orders",
    "matrix": "blocks layers tiles cells",
    "set": "known members visited allowed",
    "date": "moment deadline birthday updated",
    "path": "source log_file report_path target_file",
    "folder": "location home_dir destination",
    "object": "element widget target",
    "n": "6 7 8 9 12",
    "m": "6 7",
    "sep": ["_", " - ", "=", "+"],
    "sub": "e ed re bar log",
    "key": "kind code unit status",
    "field": "email country team",
    "nfield": "salary height rank",
}
POOLS = {"train": TRAIN, "test": TEST}

T = TypeVar("T")


@dataclass
class Template:
    """A block of templates.txt; `number` is its place there, from 1, and every pair's question_id."""

    number: int
    split: str
    title: str
    intents: list[str] = field(default_factory=list)
    snippet: str = ""
    setup: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Pair:
    """A filled template; `program` runs the snippet, `raises` names the exception that it ends with."""

    intent: str
    snippet: str
    number: int
    split: str
    program: str
    raises: str | None


def read_templates(file: Path = HERE / "templates.txt") -> list[Template]:
    """Parse templates.txt, whose head says how it is written."""
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
    """One of `choices`, decided by the key alone: random.Random need not give the same in each Python version."""
    return choices[int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") % len(choices)]


def fill(template: Template, turn: int) -> Pair:
    """The template with its `turn`-th way of asking and names drawn for that turn."""
    snippet = template.snippet.rstrip("\n")
    intent = template.intents[turn % len(template.intents)]
    slots = sorted(set(Blank(snippet).get_identifiers()) | set(Blank(intent).get_identifiers()))
    drawn: dict[str, str] = {}
    program = [line for line in template.setup if line.startswith("import ")]
    for slot in slots:
        kind = slot.rstrip("2")
        pool = POOLS[template.split][kind]
        choices = pool.split() if isinstance(pool, str) else pool
        drawn[slot] = draw([c for c in choices if c not in drawn.values()], template.title, turn, slot)
        if kind in VALUES:
            program.append(f"{drawn[slot]} = {VALUES[kind][slot != kind]}")
    setup = [Blank(line).substitute(drawn) for line in template.setup]
    program += [line for line in setup if not line.startswith(("import ", RAISES))]
    snippet = Blank(snippet).substitute(drawn)
    raises = next((line.removeprefix(RAISES) for line in setup if line.startswith(RAISES)), None)
    intent = Blank(intent).substitute(drawn)
    return Pair(intent, snippet, template.number, template.split, "\n".join([*program, snippet]), raises)


def make_pairs(templates: list[Template] | None = None) -> list[Pair]:
    """All pairs, each once, training before test, shuffled within."""
    pairs: dict[tuple[str, str], Pair] = {}
    for template in read_templates() if templates is None else templates:
        wanted, before = (TRAIN_PAIRS if template.split == "train" else TEST_PAIRS), len(pairs)
        for turn in range(10 * wanted):
            pair = fill(template, turn)
            if len(pairs) - before < wanted:
                pairs.setdefault((pair.intent, pair.snippet), pair)
    order = {"train": 0, "test": 1}
    return sorted(
        pairs.values(), key=lambda p: (order[p.split], hashlib.sha256((p.intent + p.snippet).encode()).digest())
    )


def as_lines(pairs: list[Pair]) -> str:
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
    parser.parse_args().out.write_text(as_lines(make_pairs()), encoding="utf-8")


if __name__ == "__main__":
    main()
