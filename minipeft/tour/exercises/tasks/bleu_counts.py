"""BLEU's counts.

For each n, BLEU needs the n-grams of the prediction and those of them that the references have, clipped:

    matches_n = sum over the n-grams of the prediction of  min( count in it, largest count in one reference )

Source: Papineni et al. 2002, section 2.1. Their example, by 1-grams: "the the the the the the the" has 7 of them, and
against "the cat is on the mat" 2 matches, not 7.

`count_pairs(predictions, references, *, tokenize)` returns an int64 array of numpy, [N, 10], a row a pair:

    c, r, matches of order 1..4, n-grams of order 1..4

c is the number of tokens of the prediction. r is that of its reference; of several, "conala" takes the shortest, every
other tokenizer the one nearest to c (`choose_length`). `TOKENIZERS[tokenize]` cuts a text into tokens; an unknown name
is an InputError. `check_pairs(predictions, references)` checks both, and gives each prediction a list of references.
`count_ngrams(tokens)` gives four Counters, and `count_matches` compares two of them.
"""

from __future__ import annotations

import numpy as np

from minipeft.errors import InputError
from minipeft.tour.exercises.judging import require, require_equal
from minipeft.tour.exercises.record import Answer, Exercise

EXERCISE = Exercise(
    solution="minipeft.metrics.bleu.count_pairs",
    hints=(
        "The union of two Counters, one | other, holds the larger count of each key.",
        "A text of c tokens has c - n + 1 n-grams, and none where that is negative.",
        "zip(*check_pairs(predictions, references)) goes through the pairs.",
    ),
)


def count_in_loops(prediction: list[str], references: list[list[str]], n: int) -> tuple[int, int]:
    """Matches and number of the n-grams, by lists."""
    cut = lambda tokens: [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    mine = cut(prediction)
    clipped = [min(mine.count(g), max(cut(reference).count(g) for reference in references)) for g in set(mine)]
    return sum(clipped), len(mine)


def check_paper(count_pairs: Answer) -> None:
    """The paper's example: 2 of 7 unigrams match."""
    counts = count_pairs(["the the the the the the the"], ["the cat is on the mat"], tokenize="none")
    require(isinstance(counts, np.ndarray) and counts.dtype == np.int64, "the counts are no int64 array of numpy")
    require_equal(counts.tolist(), [[7, 6, 2, 0, 0, 0, 7, 6, 5, 4]], "the counts")


def check_short(count_pairs: Answer) -> None:
    """Texts of fewer than four tokens, and an empty prediction, have no n-grams of the higher orders."""
    counts = count_pairs(["a b", ""], ["a b", "a"], tokenize="none")
    require_equal(counts.tolist(), [[2, 2, 2, 1, 0, 0, 2, 1, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0, 0, 0]], "the counts")


def check_references(count_pairs: Answer) -> None:
    """With three references the largest count of one counts, not their sum."""
    prediction, references = "a a a b b c", ["a b b", "a a c d", "b c"]
    counts = count_pairs([prediction], [references], tokenize="none")[0].tolist()
    pairs = [count_in_loops(prediction.split(), [r.split() for r in references], n) for n in (1, 2, 3, 4)]
    require_equal(counts[2:6], [m for m, _ in pairs], "the matches")
    require_equal(counts[6:], [total for _, total in pairs], "the n-grams")


def check_lengths(count_pairs: Answer) -> None:
    """r: of references of 2, 4 and 9 tokens, the nearest to 5; "conala" takes the shortest."""
    references = ["a b", "a b c d", "a b c d e f g h i"]
    for name, length in (("none", 4), ("13a", 4), ("conala", 2)):
        counts = count_pairs(["a b c d x"], [references], tokenize=name)[0].tolist()
        require_equal(counts[:2], [5, length], f"c and r with tokenize={name!r}")


def check_random(count_pairs: Answer) -> None:
    """Random texts of a few words, against lists."""
    draw = np.random.default_rng(0)
    text = lambda: " ".join(draw.choice(list("abc"), size=int(draw.integers(0, 9))))
    predictions, references = [text() for _ in range(60)], [[text(), text()] for _ in range(60)]
    counts = count_pairs(predictions, references, tokenize="none")
    for row, prediction, texts in zip(counts.tolist(), predictions, references):
        pairs = [count_in_loops(prediction.split(), [t.split() for t in texts], n) for n in (1, 2, 3, 4)]
        wanted = [m for m, _ in pairs] + [total for _, total in pairs]
        require_equal(row[2:], wanted, f"matches and n-grams of {prediction!r} against {texts}")


def check_unknown(count_pairs: Answer) -> None:
    """An unknown tokenizer is an InputError that names it."""
    for name in ("words", 3):
        try:
            count_pairs(["a"], ["a"], tokenize=name)
        except InputError as error:
            require(str(name) in str(error), f"the error does not name {name!r}: {error}")
        else:
            raise AssertionError(f"tokenize={name!r} gave counts")
