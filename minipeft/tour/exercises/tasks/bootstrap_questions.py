"""Resample questions, not pairs.

CoNaLa's 500 test pairs are answers to 364 questions. Pairs of one question are alike, so a bootstrap that draws pairs
takes them for independent, and its interval is too narrow: it rejected 43 % of true nulls in a simulation, drawing
questions 5.5 %. So the counts of a question's pairs are summed first, and whole questions are drawn.

`sum_by_question(counts, questions)`: counts [N, 10], an array of numpy, and the question of each pair, any hashable
value. Return the sums [Q, 10], in the order in which the questions appear first, in the dtype of `counts`. A pair whose
question is None is a question of its own. Source: Koehn 2004; Field and Welsh 2007 (clusters).
"""

from __future__ import annotations

import numpy as np

from minipeft.tour.exercises.judging import require, require_equal
from minipeft.tour.exercises.record import Answer, Exercise

EXERCISE = Exercise(
    solution="minipeft.metrics.bootstrap.sum_by_question",
    hints=(
        "A dict from question to its row in the result; dict.setdefault(key, len(dict)) numbers them as they come.",
        "For None use a key that no question can be equal to, one for each pair.",
        "sums[rows] += counts adds one of equal rows only; np.add.at(sums, rows, counts) adds all.",
    ),
)


def check_example(sum_by_question: Answer) -> None:
    """Pairs of the questions b, a, b: two sums, b first."""
    sums = sum_by_question(np.array([[1, 10], [2, 20], [3, 30]]), ["b", "a", "b"])
    require_equal(np.asarray(sums).tolist(), [[4, 40], [2, 20]], "the sums")


def check_none(sum_by_question: Answer) -> None:
    """Pairs without a question stay apart, also beside questions that are numbers, texts and tuples."""
    questions = [None, 0, None, "None", 1, 0, ("pair", 9)]
    sums = sum_by_question(np.arange(7)[:, None], questions)
    require_equal(np.asarray(sums).tolist(), [[0], [6], [2], [3], [4], [6]], "the sums")


def check_random(sum_by_question: Answer) -> None:
    """Random questions, added up in loops; the dtype is kept."""
    draw = np.random.default_rng(0)
    for dtype in (np.int64, np.float64):
        counts, questions = draw.integers(0, 9, (40, 10)).astype(dtype), draw.integers(0, 12, 40).tolist()
        sums = sum_by_question(counts, questions)
        order = list(dict.fromkeys(questions))
        rows = [[row for row, question in zip(counts.tolist(), questions) if question == key] for key in order]
        wanted = [[sum(row[i] for row in own) for i in range(10)] for own in rows]
        require_equal(np.asarray(sums).tolist(), wanted, "the sums")
        require(sums.dtype == dtype, f"the sums are {sums.dtype}, the counts {np.dtype(dtype)}")


def check_untouched(sum_by_question: Answer) -> None:
    """The caller's counts stay."""
    counts = np.ones((3, 10), dtype=np.int64)
    sum_by_question(counts, ["q", "q", None])
    require(bool((counts == 1).all()), "the counts were changed")
