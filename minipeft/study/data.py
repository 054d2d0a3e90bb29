"""The data of a study: a training and a test set of any form, and its rows as they are written into the study's folder.

Every form of data/forms.py can be compared but plain text, which asks no question. Baselines and scores see a row as a
pair: its question as text, and the reference.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from minipeft.data.chat import load_chat_template
from minipeft.data.encoded import Encoded
from minipeft.data.examples import Pair, split_by_question
from minipeft.data.forms import CHAT, Data, Item, encode_data, get_reference, load_data
from minipeft.data.reading import has_splits
from minipeft.data.tokens import Tokenizer
from minipeft.errors import InputError
from minipeft.files import read_object, read_text, write_json, write_whole
from minipeft.study.rows import FORMAT

TESTED = 500  # test questions of a data set without a split, at most; and at most a fifth of its questions
TRAINED, QUESTIONS = "data/train.jsonl", "data/test.jsonl"  # in the study's folder, in which a cell runs


def load_study_data(
    source: str, limit: int | None = None, settings: Mapping[str, Any] | None = None
) -> tuple[Data, Data]:
    """Load the training and test rows: the source's own split, or a fifth of its questions for the test.

    `settings`: template, data_file and data_revision of a run, if given.

    Raises:
        InputError: the data cannot be read, ask no question, or are too few to be split.
    """
    given = settings or {}
    more: dict[str, Any] = {
        "template": given.get("template"),
        "file": given.get("data_file"),
        "revision": given.get("data_revision"),
    }
    read = partial(load_data, source, **more)
    if has_splits(source):
        train, test = read(split="train"), read(split="test")
    else:
        whole = read()
        train, test = split_by_question(whole, find_split(whole, min(TESTED, len(whole) // 5)), seed=0)
        if not test.items:
            raise InputError(
                f"{len(whole)} {whole.format.noun} are too few to keep a fifth of them as questions", file=source
            )
    if train.format.form != CHAT and not train.format.parsed.asked:
        hint = "minipeft train continues pretraining on it"
        raise InputError(f"holds {train.format.form}, which asks no question", file=train.file, hint=hint)
    return train, replace(test, items=test.items[:limit])


def find_split(data: Any, wanted: int) -> int:
    """Find the largest number of rows <= wanted that consists of whole questions."""
    for number in range(wanted, 0, -1):
        try:
            split_by_question(data, number)
        except InputError:
            continue
        return number
    return 0


def as_pairs(data: Data) -> tuple[Pair, ...]:
    """Each row as question and reference."""
    return tuple(Pair(item.question, get_reference(item, data.format), item.question_id, item.line) for item in data)


def encode_rows(data: Data, source: str, tokenizer: Tokenizer) -> Encoded:
    """Encode the rows as training does for this model, with its chat template where the rows are chats."""
    chat = load_chat_template(source) if data.format.form == CHAT else None
    return encode_data(data.items, data.format, tokenizer, chat)


def make_row(item: Item) -> dict[str, Any]:
    """Make a row of JSON that is read back as the same item."""
    row: dict[str, Any] = dict(item.values)
    if item.messages:
        row["messages"] = list(item.messages)
    if item.tools is not None:
        row["tools"] = item.tools
    return row if item.question_id is None else {**row, "question_id": item.question_id}


def write_data(out: Path, train: Data, test: Data) -> None:
    """Write study.json and the rows, unless they exist.

    Raises:
        InputError: the folder holds another study.
    """
    marker = out / "study.json"
    about = {"format": FORMAT, "train_sha256": train.sha256, "test_sha256": test.sha256}
    about |= {"train": len(train), "questions": len(test)}
    if not marker.exists():
        write_json(marker, about)
    if read_object(marker) != about:
        raise InputError("holds a study of other data or other questions", file=out, hint="Name another --out")
    for data, name in ((train, TRAINED), (test, QUESTIONS)):
        text = "".join(json.dumps(make_row(item)) + "\n" for item in data)
        if not (out / name).exists() or read_text(out / name) != text:
            write_whole(out / name, lambda stream, text=text: stream.write(text.encode()))  # type: ignore[misc]
