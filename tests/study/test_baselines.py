"""The baselines on CoNaLa, against published and measured scores of its test set."""

import pytest

from minipeft.data.examples import Pair, load_pairs
from minipeft.metrics.bleu import bleu
from minipeft.metrics.codebleu import codebleu
from minipeft.study.baselines import BASELINES, answer_nearest


def test_conala(assets):
    """Official BLEU: the question 15.8, the nearest training snippet 15.4; the package's score of empty answers."""
    folder = assets / "data" / "conala"
    train, test = load_pairs(folder, split="train").items, load_pairs(folder, split="test").items
    references = [pair.snippet for pair in test]
    answers = {name: make(train, test) for name, make in BASELINES.items()}
    scores = {name: round(100 * bleu(texts, references).score, 1) for name, texts in answers.items()}
    assert scores == {"empty answer": 0.0, "print(x)": 0.0, "echo the question": 15.8, "nearest training pair": 15.4}
    nothing = codebleu(answers["empty answer"], references)
    assert (nothing.score, nothing.compat) == (0.0, pytest.approx(0.25))


def test_nearest_is_the_largest_share_of_words_and_the_first_of_equals():
    train = [Pair("sort a list", "a"), Pair("Sort the list", "b"), Pair("the list sort", "c"), Pair("read a file", "d")]
    assert answer_nearest(train, [Pair("sort THE list", "?"), Pair("read it", "?"), Pair("zebra", "?")]) == [
        "b",
        "d",
        "a",
    ]
