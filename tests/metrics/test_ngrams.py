"""Tokens and n-gram counts."""

from collections import Counter

import pytest

from minipeft import InputError
from minipeft.metrics.ngrams import (
    check_pairs,
    choose_length,
    count_matches,
    count_ngrams,
    tokenize_13a,
    tokenize_conala,
)


def test_conala_tokens_are_signs_and_words():
    assert tokenize_conala("os.kill(getPid(), 'a_b1') ") == "os . kill ( get Pid ( ) , ` a_b1 ` )".split()  # noqa: SIM905
    assert tokenize_conala('x="é\n"') == ["x", "=", "`", "é", "`"]
    assert tokenize_conala(" \n") == []


def test_13a_tokens_keep_numbers():
    assert tokenize_13a("1,000.5 a,b. &quot;c&quot; 3-4") == [
        "1,000.5",
        "a",
        ",",
        "b",
        ".",
        '"',
        "c",
        '"',
        "3",
        "-",
        "4",
    ]


def test_ngrams_are_runs_of_tokens(snippets):
    for text in snippets:
        tokens = text.split()
        for order, counts in enumerate(count_ngrams(tokens), 1):
            assert counts == Counter(tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1))


def test_matches_are_clipped():
    the, cat = count_ngrams("the the the the".split()), count_ngrams("the cat the".split())  # noqa: SIM905
    assert [count_matches(a, b) for a, b in zip(the, cat)] == [2, 0, 0, 0]
    assert all(count_matches(a, b) == (a & b).total() == count_matches(b, a) for a, b in zip(the, cat))


def test_the_closest_length_is_the_shorter_of_two():
    assert choose_length(4, [6, 2, 9]) == 2
    assert choose_length(4, [9, 5]) == 5


def test_pairs_come_as_lists():
    assert check_pairs(["a", "b"], ["x", ["y", "z"]]) == (["a", "b"], [["x"], ["y", "z"]])
    with pytest.raises(InputError, match="1 predictions but 2 references"):
        check_pairs(["a"], ["x", "y"])
