"""Has the answer got stuck?

A model that was tuned badly often ends in a loop: `x = x + x + x + x + x`. `is_repeated(text)` says whether the text
ends in a unit of tokens that is repeated over and over:

    the text ends in k repetitions of a unit of u tokens,   1 <= u <= LONGEST_UNIT,   k >= LEAST_REPEATS,
    and the repetitions fill half of the text's tokens or more

Tokens are those of `tokenize_conala(text)`; a `text` that is no text is refused by check_kind(text, str, "text").
Repetitions that are cut count too: in `a b c b c b c b` the last 7 tokens repeat with
period 2, which is 7 tokens of the unit, though the last repetition is not whole: what is compared with
LEAST_REPEATS * u, and with half of the text, is the length of the longest end of the text in which every token equals
the one u places before it (the first u tokens of it included).
"""

from __future__ import annotations

import random

from minipeft.errors import InputError
from minipeft.metrics.text import LEAST_REPEATS, LONGEST_UNIT
from minipeft.tour.exercises.judging import require
from minipeft.tour.exercises.record import Answer, Exercise

EXERCISE = Exercise(
    solution="minipeft.metrics.text.is_repeated",
    hints=(
        "Try every u from 1 to LONGEST_UNIT.",
        "Walk back from the end while tokens[i] == tokens[i - u]; the length is that many, and u for the first unit.",
        "It is repeated if length >= LEAST_REPEATS * u and 2 * length >= len(tokens).",
    ),
)


def is_stuck(text: str) -> bool:
    """The definition, by comparing ends of the list; the texts here hold one token between two blanks."""
    tokens = text.split()
    for u in range(1, LONGEST_UNIT + 1):
        least = max(LEAST_REPEATS * u, -(-len(tokens) // 2))
        for start in range(len(tokens) - least + 1):
            end = tokens[start:]
            if all(end[i] == end[i - u] for i in range(u, len(end))):
                return True
    return False


def check_examples(is_repeated: Answer) -> None:
    """Texts by hand: stuck, not stuck, and at the limits."""
    for text, wanted in (
        ("x x x x", True),
        ("x x x", False),
        ("", False),
        ("a b c b c b c b", False),
        ("a b c b c b c b c", True),
        ("a b c d x x x x", True),
        ("a b c d e x x x x", False),
        ("x x x x y", False),
        ("1 2 3 4 5 6 7 8 9 c b c b c b c b c", True),  # the cut unit makes it half
    ):
        require(is_repeated(text) is wanted, f"{text!r}: yours says {is_repeated(text)!r}")


def check_long_units(is_repeated: Answer) -> None:
    """A unit of 32 different tokens, four times, is the longest."""
    for u, wanted in ((LONGEST_UNIT - 1, True), (LONGEST_UNIT, True), (LONGEST_UNIT + 1, False)):
        text = " ".join(f"t{i}" for i in range(u))
        require(is_repeated(" ".join([text] * 4)) is wanted, f"a unit of {u} tokens, four times: not {wanted}")
        require(not is_repeated(" ".join([text] * 3)), f"a unit of {u} tokens, three times, is repeated")


def check_tokens(is_repeated: Answer) -> None:
    """Code without blanks is cut into CoNaLa's tokens."""
    require(is_repeated("f(f(f(f(f(f(f("), "'f(f(f(f(f(f(f(' is no repetition")


def check_random(is_repeated: Answer) -> None:
    """3,000 random texts of two or three words, against the definition."""
    draw = random.Random(0)
    for _ in range(3000):
        text = " ".join(draw.choice("abc"[: draw.choice((2, 3))]) for _ in range(draw.randint(0, 14)))
        require(is_repeated(text) is is_stuck(text), f"{text!r}: yours says {is_repeated(text)}")


def check_no_text(is_repeated: Answer) -> None:
    """What is no text is an InputError."""
    try:
        is_repeated(["x"] * 8)
    except InputError:
        return
    raise AssertionError("a list of words was taken for a text")
