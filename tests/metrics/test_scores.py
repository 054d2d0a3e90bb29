"""All scores of a list of answers, and the interval that `score` and the study share."""

import json

import numpy as np
import pytest
import sacrebleu

from minipeft import InputError
from minipeft.metrics.bleu import bleu, count_pairs
from minipeft.metrics.bootstrap import bootstrap_bleu, sum_by_question
from minipeft.metrics.codebleu import codebleu
from minipeft.metrics.scores import SCORES, Score, Scores, as_text, score_texts
from minipeft.metrics.text import chrf, find_language


def test_score_texts_gives_each_score_of_the_others(snippets, mutate):
    predictions, references = snippets[1:100], snippets[:99]
    scores = score_texts(predictions, references, hit_limit=[True] + [False] * 98)
    code = codebleu(predictions, references)
    assert scores["bleu"] == bleu(predictions, references).score
    assert scores.bleu_interval[0] <= scores["bleu"] <= scores.bleu_interval[1]
    assert (scores["codebleu"], scores["codebleu_compat"]) == (code.score, code.compat)
    assert tuple(scores[name] for name in ("ngram", "weighted_ngram", "syntax", "dataflow")) == (
        code.ngram,
        code.weighted_ngram,
        code.syntax,
        code.dataflow,
    )
    assert scores["chrf"] == chrf(predictions, references)
    assert (scores.pairs, scores["hit_limit"]) == (99, 1)
    assert score_texts(predictions, references)["hit_limit"] is None
    assert json.loads(json.dumps(scores.as_dict()))["bleu"] == scores["bleu"]


def test_the_interval_is_by_question(snippets, mutate):
    """Pairs of one question are correlated: resampled separately, as in an earlier version, they make it too narrow."""
    references = snippets[:60]
    predictions = [text if place // 3 % 2 else "nothing" for place, text in enumerate(references)]
    questions = [f"q{place // 3}" for place in range(60)]
    grouped = score_texts(predictions, references, questions=questions)
    single = score_texts(predictions, references)
    expected = bootstrap_bleu([sum_by_question(count_pairs(predictions, references), questions)])
    assert grouped.bleu_interval == (expected.low, expected.high)
    assert (grouped.questions, single.questions) == (20, 60)
    width = lambda scores: scores.bleu_interval[1] - scores.bleu_interval[0]
    assert width(grouped) > 1.2 * width(single)
    assert score_texts(predictions, references, questions=[None] * 60).bleu_interval == single.bleu_interval


def test_counts_are_of_answers():
    scores = score_texts(["x = 'a'", "", " \n", "f(" * 40, "def"], ['x  =  "a"', "x", "y", "z", "w"])
    assert scores["exact_match"] == 1 / 5
    assert (scores["empty"], scores["repeated"]) == (2, 1)
    assert scores["valid_python"] == 3 / 5  # nothing at all is a program too
    same = score_texts(["x = f(a, b)"], ["x = f(a, b)"])
    assert tuple(same[name] for name in ("bleu", "exact_match", "chrf", "valid_python")) == (1, 1, 1, 1)


def test_empty_answers_score_nothing():
    scores = score_texts(["", ""], ["x = f(y)", "print(z)"])
    assert (scores["bleu"], scores.bleu_interval, scores["codebleu"], scores["chrf"]) == (0, (0, 0), 0, 0)
    assert scores["codebleu_compat"] == 0.25


def test_bad_pairs_are_named():
    with pytest.raises(InputError, match="2 predictions but 1 references"):
        score_texts(["x", "y"], ["x"])
    with pytest.raises(InputError, match="hit_limit: 1 flags for 2 predictions"):
        score_texts(["x", "y"], ["x", "y"], hit_limit=[True])
    with pytest.raises(InputError, match="no pairs"):
        score_texts([], [])
    with pytest.raises(InputError, match="questions: 1 for 2 predictions"):
        score_texts(["x", "y"], ["x", "y"], questions=[1])
    with pytest.raises(InputError, match=r"questions: \['a'\] must be text or a number"):
        score_texts(["x"], ["x"], questions=[["a"]])


def test_the_text_has_a_line_for_each_heading_and_warns_where_the_totals_differ():
    empty = as_text(score_texts(["", ""], ["x = f(y)", "g(x)"], hit_limit=[True, False]))
    assert "BLEU           0.0 [0.0, 0.0] of 100" in empty
    assert "exact match    0 of 2" in empty
    assert "degenerate     2 empty, 0 repeat themselves, 1 cut off" in empty
    assert "0.2500 as the codebleu package counts" in empty
    assert "warning: the two CodeBLEU totals" in empty
    same = as_text(score_texts(["x = f(y)"] * 2, ["x = f(y)"] * 2))
    assert "exact match    2 of 2" in same
    assert "warning" not in same
    assert "data flow none in the references" in as_text(score_texts(["pass"], ["pass"]))


def test_a_score_is_its_function_and_one_row(monkeypatch):
    mean_length = lambda answers: float(np.mean([len(text) for text in answers.predictions]))
    monkeypatch.setattr(
        "minipeft.metrics.scores.SCORES", [*SCORES, Score("mean_length", "characters", "of an answer", mean_length)]
    )
    scores = score_texts(["x", "abc"], ["x", "y"])
    assert scores.as_dict()["mean_length"] == 2.0
    assert "characters     2.000" in as_text(scores)


SHELL = ["grep -r word . | wc -l", "cd /tmp && ls", "find . -name '*.py'", "tar xzf a.tgz", "ls -la", "pwd"]


def test_text_that_is_not_python_is_not_scored_as_python():
    scores = score_texts([*SHELL[:5], "whoami"], SHELL)
    assert scores.language == "text"
    for name in ("codebleu", "codebleu_compat", "ngram", "weighted_ngram", "syntax", "dataflow", "valid_python"):
        assert scores[name] is None
    peer = sacrebleu.corpus_bleu([*SHELL[:5], "whoami"], [SHELL]).score
    assert scores["bleu_13a"] == pytest.approx(peer / 100)
    assert scores["chrf"] == pytest.approx(sacrebleu.corpus_chrf([*SHELL[:5], "whoami"], [SHELL]).score / 100)
    assert scores["exact_match"] == pytest.approx(5 / 6)
    text = as_text(scores)
    assert "references     text: most references are not Python, so there is no CodeBLEU and no validity" in text
    assert "valid Python" not in text
    assert "data flow" not in text
    assert not any("CodeBLEU" in signature for signature in scores.signatures)
    assert Scores.from_json({**scores.as_dict(), "bleu_counts": [scores.runs[0].tolist()]}) == scores


def test_the_language_is_that_of_the_references_unless_it_is_given(snippets):
    code = score_texts(["hello there"] * 50, snippets[:50])
    assert code.language == "python"
    assert code["bleu_13a"] is None
    assert score_texts(SHELL, SHELL, language="python")["valid_python"] == pytest.approx(2 / 6)
    assert score_texts(snippets[:9], snippets[:9], language="text")["codebleu"] is None
    with pytest.raises(InputError, match="language: 'perl' is not known"):
        score_texts(["x"], ["x"], language="perl")
    with pytest.raises(InputError, match="language: 'perl' is not known"):
        Scores.from_json({**code.as_dict(), "bleu_counts": [], "language": "perl"})


@pytest.mark.parametrize(
    ("references", "language"),
    [
        (["yes", "no", "42", "New York"], "text"),
        (["pass"], "python"),
        (["x = 1", "", "  "], "python"),
        (["positive", "negative"], "text"),
        (["", ""], "text"),
        (["x = 1", "ls -la /tmp"], "python"),
        (["x = 1", "grep x y", "rm -r a"], "text"),
    ],
)
def test_the_language_of_references(references, language):
    assert find_language([[text] for text in references]) == language
