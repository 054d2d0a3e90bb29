"""Encode a data set row by row: a row's text is dropped once its tokens are in the arrays.

Training splits the rows by question and looks for duplicates, and keeps two hashes of each row for it:

questions  [rows, 32] uint8   sha256 of its question; the order in which questions are held out
contents   [rows] int64       of its fields or messages; equal rows have equal hashes
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from minipeft.data.chat import ChatTemplate
from minipeft.data.encoded import Array, Encoded
from minipeft.data.examples import choose_held_out, hash_question
from minipeft.data.forms import DataFormat, DataStream, Item, encode_data
from minipeft.data.tokens import Tokenizer

SHOWN_AFTER = 3.0  # seconds; a shorter encoding shows no progress bar


@dataclass(frozen=True)
class EncodedData:
    """The encoded rows of a data set; `file`, `sha256`, `format` and `notes` as of `Data`."""

    examples: Encoded
    questions: Array  # [rows, 32] uint8
    contents: Array  # [rows] int64
    file: str
    sha256: str
    format: DataFormat
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def repeated(self) -> int:
        """The rows whose content an earlier row has."""
        return len(self) - len(np.unique(self.contents))

    def hold_out(self, count: int) -> tuple[Encoded, Encoded, int]:
        """Split off exactly `count` rows, as `split_by_question` does: the rows to train on, those held out, and how
        many of these are also trained on.

        Raises:
            InputError: as `split_by_question`.
        """
        held = choose_held_out(self.questions.tobytes(), count, self.file, self.format.noun)
        shared = int(np.isin(self.contents[held], self.contents[~held]).sum())
        return self.examples.select(~held), self.examples.select(held), shared


def encode_stream(stream: DataStream, tokenizer: Tokenizer, chat: ChatTemplate | None = None) -> EncodedData:
    """Read and encode the rows of a data set; a progress bar shows those done.

    Raises:
        InputError: a row cannot be read or encoded.
    """
    questions, contents = bytearray(), array("q")

    def pass_on() -> Iterator[Item]:
        for number, item in enumerate(stream):
            questions.extend(hash_question(item.question_id, number))
            contents.append(hash_content(item))
            yield item

    rows = tqdm(pass_on(), "encoding", unit=" rows", delay=SHOWN_AFTER, file=sys.stderr, disable=None, leave=False)
    examples = encode_data(rows, stream.format, tokenizer, chat)
    return EncodedData(
        examples,
        np.frombuffer(questions, np.uint8).reshape(-1, 32),
        np.frombuffer(contents, np.int64),
        stream.file,
        stream.sha256,
        stream.format,
        stream.notes,
    )


def hash_content(item: Item) -> int:
    """Hash a row's content to 64 bits."""
    digest = hashlib.blake2b(item.content.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
