"""Pairs of an intent and a snippet: reading them, splitting them, and encoding them as the ids that a model trains on.

CoNaLa (Yin et al. 2018) holds 2,379 + 500 of them, mined from Stack Overflow. The text of a pair is in templates.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from minipeft.data.encoded import Array, Encoded, Example, as_arrays, take_together
from minipeft.data.preview import draw_rows
from minipeft.data.reading import find_source
from minipeft.data.templates import TEMPLATE, format_prompt
from minipeft.data.tokens import Piece, Tokenizer
from minipeft.errors import InputError, check_fields, check_items, check_methods, check_path, check_value
from minipeft.files import name_type

TOGETHER = 4096  # texts that are encoded at a time
NEEDED = "A row holds intent and snippet, or prompt and completion"
LONGEST_FIELD = 500_000  # characters; a row of 1024 tokens holds about 4,000


@dataclass(frozen=True, slots=True)
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

    def __repr__(self) -> str:
        return f"Pairs({len(self):,} pairs of {self.file})"

    def _repr_html_(self) -> str:
        return draw_rows(repr(self), ({"intent": pair.intent, "snippet": pair.snippet} for pair in self))


P = TypeVar("P", bound=Any)  # Pairs, or Data of another form


def load_pairs(source: str | Path, *, split: str = "train", longest_field: int = LONGEST_FIELD) -> Pairs:
    """Read pairs from "conala" (the hub's file), "demo" (ours), a folder that holds CoNaLa's files, or a file.

    A file is a JSON array if it begins with "[", else JSON lines. Each row is an object with `snippet` and `intent` or
    `rewritten_intent` (the rewritten one is used, unless it is null), or with `prompt` and `completion`; `question_id`
    may stand beside them, other fields have no effect. `split` ("train" or "test") chooses CoNaLa's file, and the rows
    of "demo"; a file is read whole.

    Raises:
        InputError: `FILE:LINE: field 'x': ...`: the file or a row cannot be used.
    """
    check_value(longest_field, int, {"least": 1}, "longest_field")
    found = find_source(check_path(source, "source"), split)
    items, replaced = [], 0
    for place, line, row in found.rows(20 * longest_field):
        if source == "demo" and row["split"] != split:
            continue
        pair, was_null = read_pair(row, line, place, longest_field)
        items.append(pair)
        replaced += was_null
    if not items:
        raise InputError("holds no examples", file=found.name)
    notes = (f"{replaced} of {len(items)} rows have no rewritten_intent; their intent was used",) if replaced else ()
    return Pairs(tuple(items), found.name, found.sha256, notes)


def read_pair(row: Any, line: int, place: str, longest_field: int) -> tuple[Pair, bool]:
    """A row's pair, and whether its rewritten_intent was null."""
    if not isinstance(row, dict):
        raise InputError(f"must be an object, is {name_type(row)}", file=place)
    question, answer = (
        ("prompt", "completion") if "completion" in row and "snippet" not in row else ("intent", "snippet")
    )
    rewritten = "rewritten_intent" if question == "intent" else None
    was_null = rewritten in row and row[rewritten] is None
    if rewritten in row and not was_null:
        question = "rewritten_intent"
    question_id = read_question_id(row, place)
    intent, snippet = (read_field(row, name, place, longest_field) for name in (question, answer))
    return Pair(intent, snippet, question_id, line), was_null


def read_question_id(row: dict[str, Any], place: str) -> int | None:
    """The row's question_id, or None."""
    question_id = row.get("question_id")
    if question_id is not None and (isinstance(question_id, bool) or not isinstance(question_id, int)):
        raise InputError(f"must be an integer, is {name_type(question_id)}", file=place, where="field 'question_id'")
    return question_id


def read_field(row: dict[str, Any], name: str, place: str, longest: int, needed: str = NEEDED) -> str:
    """Read a field: it must exist, be text, and contain only characters that a tokenizer accepts."""

    def refuse(problem: str, hint: str | None = None) -> InputError:
        return InputError(problem, file=place, where=f"field '{name}'", hint=hint)

    if name not in row:
        has = ", ".join(list(row)[:8]) or "nothing"
        raise refuse(f"is missing (the row has: {has})", needed)
    text = row[name]
    if not isinstance(text, str):
        raise refuse(f"must be text, is {name_type(text)}")
    if not text.strip():
        raise refuse("is empty" if not text else "is blank")
    check_text(text, place, f"field '{name}'", longest)
    return text


def check_text(text: str, place: str, where: str, longest: int) -> None:
    """Refuse a text that is too long, or contains a character that no tokenizer accepts."""
    problem = None
    if len(text) > longest:
        problem = f"has {len(text):,} characters, more than {longest:,}"
    elif "\0" in text:
        problem = f"holds a NUL character at {text.index(chr(0))}"
    elif (lone := next((sign for sign in text if "\ud800" <= sign <= "\udfff"), None)) is not None:
        problem = f"holds a lone surrogate, {lone!r}, which is no character"
    if problem is not None:
        raise InputError(problem, file=place, where=where)


def split_by_question(pairs: P, held_out: int = 100, seed: int = 0) -> tuple[P, P]:
    """Split into (train, dev) with exactly `held_out` pairs in dev and no question in both; the order is kept.

    Raises:
        InputError: `held_out` is not below the number of pairs, or no set of whole questions makes it up.
    """
    check_methods(pairs, ("items", "file", "sha256"), "Pairs", "pairs")
    check_value(held_out, int, {}, "held_out")
    check_value(seed, int, {}, "seed")
    digests = b"".join(hash_question(pair.question_id, number, seed) for number, pair in enumerate(pairs.items))
    dev = choose_held_out(digests, held_out, pairs.file, "pairs").tolist()
    kept = tuple(pair for pair, held in zip(pairs.items, dev) if not held)
    return replace(pairs, items=kept), replace(pairs, items=tuple(p for p, held in zip(pairs.items, dev) if held))


def hash_question(question_id: int | None, number: int, seed: int = 0) -> bytes:
    """sha256(seed, question) of row `number`: questions are held out in the order of these, which does not depend on a
    random-number library."""
    key = f"line {number}" if question_id is None else str(question_id)
    return hashlib.sha256(f"{seed}/{key}".encode()).digest()


def choose_held_out(digests: bytes | bytearray, held_out: int, file: str, noun: str = "rows") -> Array:
    """Choose exactly `held_out` rows: the first whole questions, in the order of `digests`, that add up. -> [rows] bool

    `digests`: `hash_question` of each row, 32 bytes. Bit n of `sums[k]`: whether some of the first k questions have n
    rows in all.

    Raises:
        InputError: as `split_by_question`.
    """
    words = np.frombuffer(digests, ">u8").reshape(-1, 4)  # [rows, 4]
    if not 0 <= held_out < len(words):
        raise InputError(f"cannot hold out {held_out} of {len(words)} {noun}", file=file, where="held_out")
    order = np.lexsort(words.T[::-1])
    begins = np.flatnonzero(np.append(True, (words[order[1:]] != words[order[:-1]]).any(axis=1)))
    stops = np.append(begins[1:], len(order))
    sums = [1]
    for many in (stops - begins).tolist():
        if sums[-1] >> held_out & 1:
            break
        sums.append((sums[-1] | sums[-1] << many) & ((2 << held_out) - 1))
    most = sums[-1].bit_length() - 1
    if most != held_out:
        problem = f"whole questions make {most} {noun}, not {held_out}"
        raise InputError(problem, file=file, where="held_out", hint=f"Hold out {most}")
    dev, left = np.zeros(len(words), np.bool_), held_out
    for k in reversed(range(len(sums) - 1)):
        if not sums[k] >> left & 1:  # those before it do not suffice: this one is needed
            dev[order[begins[k] : stops[k]]] = True
            left -= int(stops[k] - begins[k])
    return dev


def encode_pairs(pairs: Iterable[Pair], tokenizer: Tokenizer, *, template: str = TEMPLATE) -> Encoded:
    """Encode each pair: prompt, snippet, EOS. Generation starts from exactly the prompt's ids.

    A special token that the template names is that token; in an intent or a snippet it is text.
    """
    check_methods(tokenizer, ("require_eos", "encode", "encode_all"), "Tokenizer", "tokenizer")
    pairs = check_items(pairs, Pair, "pairs")
    format_prompt("x", template)  # checks it
    before, after = template.split("{intent}")

    def encode() -> Iterator[Example]:
        for some in take_together(pairs, TOGETHER):
            prompts = [[(before, True), (pair.intent, False), (after, True)] for pair in some]
            yield from encode_texts(prompts, [[(pair.snippet, False)] for pair in some], tokenizer)

    return as_arrays(encode())


def encode_texts(
    prompts: Sequence[Sequence[Piece]], responses: Sequence[Sequence[Piece]], tokenizer: Tokenizer
) -> list[Example]:
    """Encode each prompt and response as an example that ends with EOS.

    The text is encoded as a whole, as in pretraining: Llama's tokenizer would put a space before a response encoded by
    itself. The ids of the whole text may not begin with those of the prompt: a leading space of the response may merge
    with the newline before it. Only then is the response encoded by itself.
    """
    eos = tokenizer.require_eos()
    starts = tokenizer.encode_pieces(prompts)
    wholes = tokenizer.encode_pieces([[*prompt, *response] for prompt, response in zip(prompts, responses)])
    examples = []
    for prompt, response, whole in zip(starts, responses, wholes):
        if whole[: len(prompt)] != prompt:
            whole = prompt + tokenizer.encode_pieces([response], bos=False)[0]
        last, of_template = response[-1]
        ended = of_template and last and whole[-1:] == [eos]  # the template names EOS itself
        examples.append(Example(whole if ended else [*whole, eos], len(prompt)))
    return examples
