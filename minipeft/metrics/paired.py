"""Compare two systems on the same questions: paired differences of scores, with their intervals.

BLEU                 corpus BLEU of both over the same resample of questions
mean of the answers  exact match, validity, pass@1: the mean difference over the pairs of a resample
"""

from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np

from minipeft.errors import InputError
from minipeft.metrics.bootstrap import Interval, bootstrap_bleu, bootstrap_mean, sum_by_question
from minipeft.metrics.scores import SCORES, Answers, Score


def match_answers(
    mine: Sequence[tuple[Hashable, Sequence[str]]],
    theirs: Sequence[tuple[Hashable, Sequence[str]]],
    file: Path | str = "against",
) -> list[int]:
    """Find, for each answer given as (question, references), the index of the other system's answer to it.

    Answers to one question with the same references are taken in their order. `file`: theirs, for the error.

    Raises:
        InputError: the two sides do not answer the same questions.
    """
    places: dict[tuple[Hashable, tuple[str, ...]], list[int]] = {}
    for place, (question, references) in enumerate(theirs):
        places.setdefault((question, tuple(references)), []).append(place)
    found = []
    for number, (question, references) in enumerate(mine, 1):
        same = places.get((question, tuple(references)))
        if not same:
            problem = f"has no answer to answer {number} of the other file (same question_id and reference)"
            raise InputError(problem, file=file)
        found.append(same.pop(0))
    if len(theirs) != len(mine):
        raise InputError(f"has {len(theirs)} answers, the other file {len(mine)}", file=file)
    return found


def compare(one: Answers, other: Answers, language: str) -> list[tuple[Score, Interval]]:
    """The difference one - other of BLEU and of each score that is a mean over answers, in the order of SCORES.

    The answers of both are in the same order.
    """
    found = []
    for score in SCORES:
        if score.name == "bleu":
            counts = [[sum_by_question(side.counts, one.questions)] for side in (one, other)]
            found.append((score, bootstrap_bleu(*counts)))
        elif score.each is not None and score.language in ("", language):
            values = [score.each(side) for side in (one, other)]
            if values[0] is not None and values[1] is not None:
                differences = np.subtract(*(np.asarray(value, dtype=float) for value in values))
                found.append((score, bootstrap_mean(differences, one.questions)))
    return found


def as_text(found: Sequence[tuple[Score, Interval]], one: str, other: str, questions: int) -> str:
    """The differences as lines for a terminal."""
    lines = [f"{one} minus {other}, paired over {questions} questions, with 95 % intervals:"]
    for score, interval in found:
        value, low, high = (score.scale * end for end in (interval.value, interval.low, interval.high))
        unit = " %" if score.format.endswith("%") else ""
        p = f"p = {interval.p_value:.3f}" if interval.p_value else f"p < {2 / interval.resamples:g}"
        lines.append(f"{score.heading or score.label:<14} {value:+.1f}{unit} [{low:+.1f}, {high:+.1f}], {p}")
    return "\n".join(lines)
