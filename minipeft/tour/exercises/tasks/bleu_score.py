"""BLEU from its counts.

    BLEU = min(1, exp(1 - r/c)) * exp(1/4 * sum over n=1..4 of log p_n),    p_n = matches_n / ngrams_n

Source: Papineni et al. 2002, section 2.3; smoothings: Chen and Cherry 2014. `counts` [R, 10] holds one text (or one
corpus, its rows summed) a row: c, r, matches of order 1..4, n-grams of order 1..4; MATCHES and TOTALS are their slices.
Return three arrays: the scores [R], the precisions p_n [R, 4] as they are used, and the factors min(1, exp(1 - r/c))
[R]; with c = 0 the factor is 0 (unless r is 0 too: then 1). Where no order has a match, precisions and score are 0.

`smooth` changes counts before the division; `_smooth_value(smooth, smooth_value)` is its number k:

    none     as they are; with a precision of 0 the score is 0
    floor    k instead of 0 matches
    add-k    k is added to matches and n-grams of the orders 2, 3 and 4
    exp      1/2, 1/4, ... matches for the first, second, ... order without a match

An order for which the text is too short has no n-grams (after smoothing), and its precision is 0, and so are those of
the orders above it. With `effective_order` the mean of the logarithms is taken over the orders that there are, at
least one; without it always over four.
"""

from __future__ import annotations

import math

import numpy as np

from minipeft.metrics.bleu import SMOOTHINGS, count_pairs
from minipeft.tour.exercises.judging import require, require_close
from minipeft.tour.exercises.record import Answer, Exercise

EXERCISE = Exercise(
    solution="minipeft.metrics.bleu.score_counts",
    hints=(
        "A loop over the rows, with plain floats, is right: keep it simple first. Work on a copy as float.",
        "'found' (any match) is decided before smoothing.",
        "In numpy: np.errstate(divide='ignore', invalid='ignore') around log and division, and np.where to choose.",
    ),
)


def score_row(row: list[int], smooth: str, k: float, effective: bool) -> tuple[float, list[float], float]:
    """One row, by the text."""
    c, r, matches, totals = row[0], row[1], [float(n) for n in row[2:6]], [float(n) for n in row[6:]]
    brevity = 1.0 if c >= r else math.exp(1 - r / c) if c else 0.0
    if not any(matches):
        return 0.0, [0.0] * 4, brevity
    halves = 1.0
    for n in range(4):
        if smooth == "add-k" and n:
            matches[n], totals[n] = matches[n] + k, totals[n] + k
        if matches[n] == 0 and smooth == "exp":
            halves /= 2
            matches[n] = halves
        if matches[n] == 0 and smooth == "floor":
            matches[n] = k
    orders = next((n for n in range(4) if totals[n] <= 0), 4)
    precisions = [matches[n] / totals[n] if n < orders else 0.0 for n in range(4)]
    used = precisions[:orders] if effective else precisions
    if any(p == 0 for p in used):
        return 0.0, precisions, brevity
    return brevity * math.exp(sum(map(math.log, used)) / len(used)), precisions, brevity


ROWS = [
    [7, 6, 2, 0, 0, 0, 7, 6, 5, 4],
    [9, 12, 6, 4, 3, 1, 9, 8, 7, 6],
    [12, 9, 6, 4, 3, 1, 12, 11, 10, 9],
    [2, 2, 2, 1, 0, 0, 2, 1, 0, 0],
    [1, 3, 1, 0, 0, 0, 1, 0, 0, 0],
    [5, 5, 0, 0, 0, 0, 5, 4, 3, 2],
    [0, 3, 0, 0, 0, 0, 0, 0, 0, 0],
    [6, 6, 6, 5, 4, 3, 6, 5, 4, 3],
]


def compare(score_counts: Answer, smooth: str, value: float | None, effective: bool) -> None:
    """Compare each row with the text."""
    counts = np.array(ROWS, dtype=np.int64)
    before = counts.copy()
    scores, precisions, brevity = score_counts(counts, smooth=smooth, smooth_value=value, effective_order=effective)
    require(np.array_equal(counts, before), "the caller's counts were changed")
    for i, row in enumerate(ROWS):
        score, ps, factor = score_row(row, smooth, SMOOTHINGS[smooth] if value is None else value, effective)
        what = f"of {row} with smooth={smooth!r}, effective_order={effective}"
        require_close(float(brevity[i]), factor, f"the brevity penalty {what}", 1e-9)
        for n in range(4):
            require_close(float(precisions[i][n]), ps[n], f"the precision of order {n + 1} {what}", 1e-9)
        require_close(float(scores[i]), score, f"the score {what}", 1e-9)


def check_plain(score_counts: Answer) -> None:
    """Without smoothing, over four orders."""
    compare(score_counts, "none", None, False)


def check_perfect(score_counts: Answer) -> None:
    """A text scored against itself has 1."""
    scores, _, _ = score_counts(count_pairs(["a b c d e"], ["a b c d e"], tokenize="none"))
    require_close(float(scores[0]), 1.0, "the score of a text against itself", 1e-9)


def check_smoothings(score_counts: Answer) -> None:
    """Each smoothing, with its default value and another."""
    for smooth in ("floor", "add-k", "exp"):
        compare(score_counts, smooth, None, False)
        compare(score_counts, smooth, 0.5, False)


def check_effective_order(score_counts: Answer) -> None:
    """The mean over the orders that a short text has."""
    for smooth in ("none", "floor", "add-k", "exp"):
        compare(score_counts, smooth, None, True)
