"""Exact match, chrF, valid Python and repetition of an answer."""

import pytest
from sacrebleu.metrics import CHRF

from minipeft.metrics.text import chrf, is_exact, is_repeated, is_valid_python


def test_chrf_is_sacrebleus(snippets):
    predictions, references = snippets[2:100], snippets[:98]
    assert chrf(predictions, references) == CHRF().corpus_score(predictions, [references]).score / 100
    several = [[one, two] for one, two in zip(references, predictions)]
    assert chrf(predictions, several) == CHRF().corpus_score(predictions, [references, predictions]).score / 100
    assert chrf(["a"], [["a", "b"]]) == 1


def test_any_of_the_references_can_be_met():
    assert is_exact("a.b( 'x' )", ["y", 'a . b("x")'])
    assert not is_exact("a.b(x)", ["y", 'a.b("x")'])


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("x = 1", True),
        ("  x = 1\n", True),
        ("print 'x'", False),
        ("def f(:", False),
        ("'\\d'", True),  # warned of, but valid
        ("x\0", False),
        ("'\ud800'", False),
        ("(" * 1000 + ")" * 1000, False),
        ("-" * 100_000 + "x", False),
        ("a" + ".b" * 99_000, False),
        ("+".join("a" * 50_000), False),
        ("x" * 10**6, False),
    ],
)
def test_only_pythons_parser_says_what_is_valid(text, valid, recwarn):
    assert is_valid_python(text) is valid
    assert not recwarn.list


@pytest.mark.parametrize(
    ("text", "repeated"),
    [
        ("", False),
        ("x = 1", False),
        ("!" * 64, True),
        ("the " * 20, True),
        ("x = f(y)\n" * 8, True),
        ("import os\n" + "os.kill(x)\n" * 6, True),
        ("x = [0, 0, 0, 0]", False),
        ("x = 1\ny = 2\nz = 3\nw = 4", False),
        ("a very long answer that goes on and on and says a lot before it ends in 1 1 1 1", False),
    ],
)
def test_repeated_answers_are_told_from_others(text, repeated):
    assert is_repeated(text) is repeated
