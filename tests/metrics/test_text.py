"""What else is said of answers, and all of it at once."""

import json

import pytest
from sacrebleu.metrics import CHRF

from minipeft import InputError
from minipeft.metrics.bleu import bleu
from minipeft.metrics.codebleu import codebleu
from minipeft.metrics.text import chrf, is_exact, is_repeated, is_valid_python, score_texts


def test_score_texts_gives_each_score_of_the_others(snippets, mutate):
    predictions, references = snippets[1:100], snippets[:99]
    scores = score_texts(predictions, references, hit_limit=[True] + [False] * 98)
    code = codebleu(predictions, references)
    assert scores.bleu == bleu(predictions, references).score
    assert scores.bleu_interval[0] <= scores.bleu <= scores.bleu_interval[1]
    assert (scores.codebleu, scores.codebleu_compat) == (code.score, code.compat)
    assert (scores.ngram, scores.weighted_ngram, scores.syntax, scores.dataflow) == (
        code.ngram,
        code.weighted_ngram,
        code.syntax,
        code.dataflow,
    )
    assert scores.chrf == chrf(predictions, references)
    assert (scores.pairs, scores.hit_limit) == (99, 1)
    assert score_texts(predictions, references).hit_limit is None
    assert json.loads(json.dumps(scores.as_dict()))["bleu"] == scores.bleu


def test_counts_are_of_answers():
    scores = score_texts(["x = 'a'", "", " \n", "f(" * 40, "def"], ['x  =  "a"', "x", "y", "z", "w"])
    assert scores.exact_match == 1 / 5
    assert (scores.empty, scores.repeated) == (2, 1)
    assert scores.valid_python == 3 / 5  # nothing at all is a program too
    same = score_texts(["x = f(a, b)"], ["x = f(a, b)"])
    assert (same.bleu, same.exact_match, same.chrf, same.valid_python) == (1, 1, 1, 1)


def test_empty_answers_score_nothing():
    scores = score_texts(["", ""], ["x = f(y)", "print(z)"])
    assert (scores.bleu, scores.bleu_interval, scores.codebleu, scores.chrf) == (0, (0, 0), 0, 0)
    assert scores.codebleu_compat == 0.25


def test_bad_pairs_are_named():
    with pytest.raises(InputError, match="2 predictions but 1 references"):
        score_texts(["x", "y"], ["x"])
    with pytest.raises(InputError, match="hit_limit: 1 flags for 2 predictions"):
        score_texts(["x", "y"], ["x", "y"], hit_limit=[True])
    with pytest.raises(InputError, match="no pairs"):
        score_texts([], [])


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
