"""Trivial baselines that need no model: a tuned model has to beat them before its score means anything.

On CoNaLa's 500 test questions the official BLEU gives 15.8 to the question itself and 15.4 to the snippet of the
nearest training question; the codebleu package gives 0.25 to empty answers, and 0.26 to `print(x)`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from minipeft.data.examples import Pair


def answer_empty(train: Sequence[Pair], questions: Sequence[Pair]) -> list[str]:
    """An empty answer to every question."""
    return ["" for _ in questions]


def answer_constant(train: Sequence[Pair], questions: Sequence[Pair]) -> list[str]:
    """`print(x)` to every question."""
    return ["print(x)" for _ in questions]


def answer_echo(train: Sequence[Pair], questions: Sequence[Pair]) -> list[str]:
    """Answer each question with its own text."""
    return [pair.intent for pair in questions]


def answer_nearest(train: Sequence[Pair], questions: Sequence[Pair]) -> list[str]:
    """Answer with the snippet of the training question of the largest Jaccard similarity in words; ties: the first."""
    known = [split_words(pair.intent) for pair in train]
    answers = []
    for pair in questions:
        asked = split_words(pair.intent)
        overlaps = [len(asked & other) / max(1, len(asked | other)) for other in known]
        answers.append(train[overlaps.index(max(overlaps))].snippet)
    return answers


def split_words(text: str) -> set[str]:
    """The set of a text's words, in lower case."""
    return set(re.findall(r"\w+", text.lower()))


BASELINES: dict[str, Callable[[Sequence[Pair], Sequence[Pair]], list[str]]] = {
    "empty answer": answer_empty,
    "print(x)": answer_constant,
    "echo the question": answer_echo,
    "nearest training pair": answer_nearest,
}
PYTHON_ONLY = "print(x)"  # meaningless for other languages
SAME_EACH_TIME = ("empty answer", "print(x)", "echo the question")  # answers that do not depend on the training pairs
