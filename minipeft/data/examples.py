"""Pairs of an intent and a snippet: reading them, splitting them, and encoding them as the ids that a model trains on.

CoNaLa (Yin et al. 2018) holds 2,379 + 500 of them, mined from Stack Overflow. The text of a pair is in templates.py.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from minipeft.data.templates import TEMPLATE, prompt_text
from minipeft.data.tokens import Tokenizer
from minipeft.errors import (
    InputError,
    check_fields,
    check_items,
    check_kind,
    check_methods,
    check_path,
    check_value,
    matches,
    shown,
)
from minipeft.files import check_plain, kind_of, parse_json
from minipeft.hub import fetch

CONALA, CONALA_COMMIT = "neulab/conala", "fbc749f1c537e5c3834e93b15784302e331debe2"
LARGEST_FILE = 2**31  # bytes; all pairs are held in memory
LONGEST_FIELD = 500_000  # characters; a row of 1024 tokens holds about 4,000
MAGIC = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"PAR1": "parquet", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd",
         b"\xfd7zXZ": "xz"}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A question in words, and the code that answers it. `line` is its place in the file."""

    intent: str
    snippet: str
    question_id: int | None = None  # of Stack Overflow; pairs of one question stay together when split
    line: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Pairs:
    """Pairs in the order of their file; `notes` says what was changed when reading, `sha256` is that of the file."""

    items: tuple[Pair, ...]
    file: str
    sha256: str
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.items)


@dataclass(frozen=True, slots=True)
class Example:
    """A document to train on: its ids, EOS included, of which the first `prompt_tokens` are the prompt."""

    ids: list[int]
    prompt_tokens: int


def load_pairs(source: str | Path, *, split: str = "train", longest_field: int = LONGEST_FIELD) -> Pairs:
    """Read pairs from "conala" (the hub's file), "demo" (ours), a folder that holds CoNaLa's files, or a file.

    A file is a JSON array if it begins with "[", else JSON lines. Each row is an object with `snippet` and `intent` or
    `rewritten_intent` (the rewritten one is used, unless it is null), or with `prompt` and `completion`; `question_id`
    may stand beside them, other fields have no effect. `split` ("train" or "test") chooses CoNaLa's file, and the rows
    of "demo"; a file is read whole.

    Raises:
        InputError: `FILE:LINE: field 'x': ...`: the file or a row cannot be used.
    """
    folder = check_path(source, "source")
    check_value(longest_field, int, {"least": 1}, "longest_field")
    if str(source) in NAMED:
        path = NAMED[str(source)](split)
    elif folder.is_dir() and (folder / conala_name(split)).exists():
        path = folder / conala_name(split)
    else:
        path = folder
    raw = read_whole(path)
    items, replaced = [], 0
    for place, line, row in read_rows(decode(raw, path), path, 20 * longest_field):
        if source == "demo" and row["split"] != split:
            continue
        pair, was_null = read_pair(row, line, place, longest_field)
        items.append(pair)
        replaced += was_null
    if not items:
        raise InputError("holds no examples", file=path)
    notes = (f"{replaced} of {len(items)} rows have no rewritten_intent; their intent was used",) if replaced else ()
    return Pairs(tuple(items), str(path), hashlib.sha256(raw).hexdigest(), notes)


def conala_name(split: str) -> str:
    """The name of CoNaLa's file of a split."""
    if split not in ("train", "test"):
        raise InputError(f"CoNaLa has no split {shown(split)}, only 'train' and 'test'", where="split")
    return f"conala-paired-{split}.json"


def conala_file(split: str) -> Path:
    """CoNaLa's file of a split, downloaded at the one revision that the published results were measured with."""
    name = f"data/{conala_name(split)}"
    return fetch(CONALA, [name], revision=CONALA_COMMIT, repo_type="dataset") / name


def demo_file(split: str) -> Path:
    """The file of the demo pairs, which holds all splits: each row names its own."""
    if split not in ("train", "test", "hard"):
        raise InputError(f"the demo has no split {shown(split)}, only 'train', 'test' and 'hard'", where="split")
    return Path(__file__).parents[1] / "demo" / "pairs.jsonl"


# a name in place of a path: split -> file
NAMED: dict[str, Callable[[str], Path]] = {"conala": conala_file, "demo": demo_file}


def read_whole(path: Path) -> bytes:
    """The bytes of a plain file of reasonable size that nobody is writing to."""
    check_plain(path)
    with open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > LARGEST_FILE:
            raise InputError(f"has {size:,} bytes, more than {LARGEST_FILE:,}", file=path, hint="Split it")
        raw = stream.read(size + 1)
    if len(raw) != size:
        raise InputError(f"changed while it was read ({size:,} bytes, then {len(raw):,})", file=path)
    return raw


def decode(raw: bytes, path: Path) -> str:
    """The text of UTF-8 bytes, with or without a byte order mark."""
    for magic, name in MAGIC.items():
        if raw.startswith(magic):
            raise InputError(f"is a {name} file", file=path, hint="Decompress or convert it to JSON lines first")
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in raw[:4]:
        raise InputError("looks like UTF-16", file=path, hint="Save it as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"not UTF-8 at byte {error.start}", file=f"{path}:{line}") from error


def read_rows(text: str, path: Path, longest_line: int) -> Iterator[tuple[str, int, Any]]:
    """Each row of a JSON array or of JSON lines, with its place for errors and its number."""
    if text.lstrip().startswith("["):
        for number, row in enumerate(parse_json(text, path), start=1):
            yield f"{path}: item {number}", number, row
        return
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines(): U+2028 may stand in a JSON string
        if len(line) > longest_line:
            raise InputError(f"has {len(line):,} characters, more than {longest_line:,}", file=f"{path}:{number}")
        if line.strip():
            yield f"{path}:{number}", number, parse_json(line, f"{path}:{number}", line=number)


def read_pair(row: Any, line: int, place: str, longest_field: int) -> tuple[Pair, bool]:
    """A row's pair, and whether its rewritten_intent was null."""
    if not isinstance(row, dict):
        raise InputError(f"must be an object, is {kind_of(row)}", file=place)
    question, answer = (
        ("prompt", "completion") if "completion" in row and "snippet" not in row else ("intent", "snippet")
    )
    rewritten = "rewritten_intent" if question == "intent" else None
    was_null = rewritten in row and row[rewritten] is None
    if rewritten in row and not was_null:
        question = "rewritten_intent"
    question_id = row.get("question_id")
    if question_id is not None and not matches(question_id, int):
        raise InputError(f"must be an integer, is {kind_of(question_id)}", file=place, where="field 'question_id'")
    intent, snippet = (read_field(row, name, place, longest_field) for name in (question, answer))
    return Pair(intent, snippet, question_id, line), was_null


def read_field(row: dict[str, Any], name: str, place: str, longest: int) -> str:
    """The text of a field, which must be there, be text, and hold what a tokenizer accepts."""

    def refuse(problem: str, hint: str | None = None) -> InputError:
        return InputError(problem, file=place, where=f"field '{name}'", hint=hint)

    if name not in row:
        has = ", ".join(list(row)[:8]) or "nothing"
        raise refuse(f"is missing (the row has: {has})", "A row holds intent and snippet, or prompt and completion")
    text = row[name]
    if not isinstance(text, str):
        raise refuse(f"must be text, is {kind_of(text)}")
    if not text.strip():
        raise refuse("is empty" if not text else "is blank")
    if len(text) > longest:
        raise refuse(f"has {len(text):,} characters, more than {longest:,}")
    if "\0" in text:
        raise refuse(f"holds a NUL character at {text.index(chr(0))}")
    lone = next((sign for sign in text if "\ud800" <= sign <= "\udfff"), None)
    if lone is not None:
        raise refuse(f"holds a lone surrogate, {lone!r}, which is no character")
    return text


def split_by_question(pairs: Pairs, held_out: int = 100, seed: int = 0) -> tuple[Pairs, Pairs]:
    """Split into (train, dev) with exactly `held_out` pairs in dev and no question in both; the order is kept.

    Questions are ordered by sha256(seed, question), which no library's random numbers can change, and the first that
    make up the number are taken. Bit n of `sums[k]`: whether some of the first k questions hold n pairs together.

    Raises:
        InputError: `held_out` is not below the number of pairs, or no set of whole questions makes it up.
    """
    check_kind(pairs, Pairs, "pairs")
    check_value(held_out, int, {}, "held_out")
    check_value(seed, int, {}, "seed")
    if not 0 <= held_out < len(pairs):
        raise InputError(f"cannot hold out {held_out} of {len(pairs)} pairs", file=pairs.file, where="held_out")
    groups: dict[str, list[int]] = {}
    for number, pair in enumerate(pairs.items):
        key = f"line {number}" if pair.question_id is None else str(pair.question_id)
        groups.setdefault(key, []).append(number)
    questions = sorted(groups, key=lambda key: hashlib.sha256(f"{seed}/{key}".encode()).digest())
    sums = [1]
    for key in questions:
        sums.append((sums[-1] | sums[-1] << len(groups[key])) & ((2 << held_out) - 1))
    most = sums[-1].bit_length() - 1
    if most != held_out:
        problem = f"whole questions make {most} pairs, not {held_out}"
        raise InputError(problem, file=pairs.file, where="held_out", hint=f"Hold out {most}")
    dev: set[int] = set()
    for k in reversed(range(len(questions))):
        if not sums[k] >> (held_out - len(dev)) & 1:  # those before it do not suffice: this one is needed
            dev.update(groups[questions[k]])
    kept = tuple(pair for number, pair in enumerate(pairs.items) if number not in dev)
    return replace(pairs, items=kept), replace(pairs, items=tuple(pairs.items[number] for number in sorted(dev)))


def shared_pairs(pairs: Iterable[Pair], others: Iterable[Pair]) -> int:
    """How many of `others` (a test set) are also in `pairs` (the training set): same intent, same snippet."""
    seen = {(pair.intent, pair.snippet) for pair in check_items(pairs, Pair, "pairs")}
    return sum((pair.intent, pair.snippet) in seen for pair in check_items(others, Pair, "others"))


def encode_pairs(pairs: Iterable[Pair], tokenizer: Tokenizer, *, template: str = TEMPLATE) -> list[Example]:
    """Each pair's ids: prompt, snippet, EOS. The prompt's ids are those that generation starts from, always.

    The text is encoded as a whole, as in pretraining: Llama's tokenizer would put a space before a snippet encoded by
    itself. A whole text need not begin with its prompt's ids, though: a snippet that begins with a space may merge with
    the newline before it. Only there is the snippet encoded by itself.
    """
    check_methods(tokenizer, ("require_eos", "encode", "encode_all"), "Tokenizer", "tokenizer")
    eos = tokenizer.require_eos()
    pairs = check_items(pairs, Pair, "pairs")
    texts = [prompt_text(pair.intent, template) for pair in pairs]
    prompts = tokenizer.encode_all(texts)
    wholes = tokenizer.encode_all([text + pair.snippet for text, pair in zip(texts, pairs)])
    examples = []
    for pair, prompt, whole in zip(pairs, prompts, wholes):
        if whole[: len(prompt)] != prompt:
            whole = prompt + tokenizer.encode(pair.snippet, bos=False)
        examples.append(Example([*whole, eos], len(prompt)))
    return examples
