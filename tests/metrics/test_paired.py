"""Paired differences against the study's own bootstrap, all resamples of a small set, and the normal interval."""

import itertools

import numpy as np
import pytest

from minipeft import InputError
from minipeft.metrics.bleu import count_pairs
from minipeft.metrics.bootstrap import bootstrap_bleu, bootstrap_mean, sum_by_question
from minipeft.metrics.paired import as_text, compare, match_answers
from minipeft.metrics.scores import Answers

REFERENCES = [[f"x{n} = sorted(y{n}, key=f{n})"] for n in range(12)]
QUESTIONS = [n // 2 for n in range(12)]


def answers(right: int, passed: list[bool] | None = None) -> Answers:
    texts = [texts[0] for texts in REFERENCES[:right]] + ["def"] * (12 - right)
    return Answers(texts, REFERENCES, None, passed, QUESTIONS)


def test_the_differences_are_those_of_the_scores():
    one, other = answers(9, [True] * 6 + [False] * 6), answers(6, [True] * 3 + [False] * 9)
    found = {score.name: interval for score, interval in compare(one, other, "python")}
    assert list(found) == ["bleu", "pass_at_1", "exact_match", "valid_python"]
    counts = [sum_by_question(count_pairs(side.predictions, REFERENCES), QUESTIONS) for side in (one, other)]
    assert found["bleu"] == bootstrap_bleu([counts[0]], [counts[1]])
    assert found["exact_match"].value == pytest.approx(3 / 12)
    assert found["pass_at_1"].value == pytest.approx(3 / 12)
    assert "valid_python" not in [score.name for score, _ in compare(one, other, "text")]
    assert "pass_at_1" not in [score.name for score, _ in compare(answers(9), other, "python")]
    text = as_text(compare(one, other, "python"), "a", "b", 6)
    assert text.startswith("a minus b, paired over 6 questions, with 95 % intervals:\nBLEU           +")
    assert "exact match    +25.0 % [" in text


def test_the_interval_is_that_of_all_resamples():
    """Of 5 questions of 1 to 3 pairs, all 3,125 draws; ours are 20,000 at random."""
    differences = np.array([1.0, 0, 1, -1, 0, 1, 1, 0, -1])
    questions = ["a", "b", "b", "c", "d", "d", "d", "e", "e"]
    ours = bootstrap_mean(differences, questions, resamples=20_000)
    members = [[d for d, q in zip(differences, questions) if q == name] for name in "abcde"]
    means = [np.mean([d for pick in draw for d in members[pick]]) for draw in itertools.product(range(5), repeat=5)]
    assert ours.value == pytest.approx(differences.mean())
    assert (ours.low, ours.high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.05)
    assert ours.p_value == pytest.approx(
        2 * min(np.mean(np.array(means) <= 0), np.mean(np.array(means) >= 0)), abs=0.02
    )


def test_a_large_sample_has_the_normal_interval():
    differences = np.random.default_rng(1).normal(0.1, 1.0, size=2000)
    ours = bootstrap_mean(differences, [None] * 2000)
    error = 1.96 * differences.std(ddof=1) / 2000**0.5
    assert (ours.low, ours.high) == pytest.approx((differences.mean() - error, differences.mean() + error), abs=0.004)


def test_answers_are_matched_by_question_and_reference():
    mine = [(1, ["a"]), (1, ["b"]), (2, ["c"]), (2, ["c"])]
    assert match_answers(mine, [mine[2], mine[1], mine[3], mine[0]]) == [3, 1, 0, 2]
    with pytest.raises(InputError, match="against: has no answer to answer 2 of the other file"):
        match_answers(mine, [mine[0], (1, ["x"]), mine[2], mine[3]])
    with pytest.raises(InputError, match="against: has 4 answers, the other file 3"):
        match_answers(mine[:3], mine)
