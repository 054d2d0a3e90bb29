"""A text of exactly P tokens.

A prefix or prompt of P virtual tokens starts as a text that describes the task, and this text must have exactly P
tokens: a longer one is cut at its end, a shorter one is repeated from its beginning until it is long enough. A BOS that
the tokenizer puts first stays first, and is not repeated; a tokenizer may have a BOS and not put it there:

    P = 8, the text is [BOS, 5, 6, 7]      ->  [BOS, 5, 6, 7, 5, 6, 7, 5]
    P = 2                                  ->  [BOS, 5]

Source: Lester et al. 2021, section 3.2 (init from text). `encode_text(text, tokenizer, method)` returns the ids;
`tokenizer.bos` is the id of BOS, None or not there at all. A text without a token beside BOS is an
`InputError(PROBLEM, where="text")` whose problem names the text.
"""

from __future__ import annotations

from dataclasses import dataclass

from minipeft.errors import InputError
from minipeft.tour.exercises.judging import require, require_equal
from minipeft.tour.exercises.record import Answer, Exercise

EXERCISE = Exercise(
    solution="minipeft.adapters.virtual.encode_to_length",
    hints=(
        "Keep two lists: ids, and `again`, what is repeated: ids without a BOS at their head.",
        "getattr(tokenizer, 'bos', None) works for a tokenizer without a BOS.",
        "Check that `again` is not empty before you repeat it: the loop would never end.",
    ),
)


@dataclass(frozen=True)
class Letters:
    """A tokenizer: a letter is a token, its number in the alphabet; BOS comes first if there is one and it is added."""

    bos: int | None = None
    adds: bool = True

    def encode(self, text: str) -> list[int]:
        return ([] if self.bos is None or not self.adds else [self.bos]) + [ord(sign) - ord("a") for sign in text]


class Plain:
    """A tokenizer that knows of no BOS."""

    def encode(self, text: str) -> list[int]:
        return [ord(sign) - ord("a") for sign in text]


def check_cut(encode_to_length: Answer) -> None:
    """A longer text is cut, one of the right length stays."""
    require_equal(encode_to_length("abcd", 2, Plain(), "prefix"), [0, 1], "'abcd' in 2 tokens")
    require_equal(encode_to_length("abcd", 4, Plain(), "prefix"), [0, 1, 2, 3], "'abcd' in 4 tokens")
    require_equal(encode_to_length("abcd", 2, Letters(99), "prefix"), [99, 0], "BOS and 'abcd' in 2 tokens")


def check_repeated(encode_to_length: Answer) -> None:
    """A shorter text is repeated, and cut in the middle where need be."""
    require_equal(encode_to_length("abc", 7, Plain(), "prefix"), [0, 1, 2, 0, 1, 2, 0], "'abc' in 7 tokens")
    require_equal(encode_to_length("a", 3, Letters(None), "prompt"), [0, 0, 0], "'a' in 3 tokens")


def check_bos(encode_to_length: Answer) -> None:
    """BOS comes once; a first token that is no BOS is repeated like the others."""
    require_equal(encode_to_length("abc", 8, Letters(99), "prefix"), [99, 0, 1, 2, 0, 1, 2, 0], "BOS and 'abc' in 8")
    require_equal(encode_to_length("aba", 5, Plain(), "prefix"), [0, 1, 0, 0, 1], "'aba' in 5 tokens")
    unused = Letters(99, adds=False)
    require_equal(encode_to_length("ab", 4, unused, "prefix"), [0, 1, 0, 1], "'ab' in 4, with a BOS that is not added")


def check_empty(encode_to_length: Answer) -> None:
    """A text without tokens is an InputError, also beside a BOS."""
    for tokenizer in (Plain(), Letters(99)):
        try:
            encode_to_length("", 4, tokenizer, "prefix")
        except InputError as error:
            require("''" in str(error) and "text" in str(error), f"the error does not name the text: {error}")
        else:
            raise AssertionError("a text without tokens gave ids")


def check_tokenizer(encode_to_length: Answer) -> None:
    """Without a tokenizer the error names the method."""
    try:
        encode_to_length("a", 4, None, "prompt")
    except InputError as error:
        require("prompt init" in str(error), f"the error does not name the method: {error}")
    else:
        raise AssertionError("ids without a tokenizer")
