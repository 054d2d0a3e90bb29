"""The bootstrap against one written out: every draw's sentences laid side by side and scored by sacrebleu."""

import numpy as np
import pytest
import sacrebleu

from minipeft.metrics.bleu import bootstrap_bleu, count_pairs
from minipeft.metrics.ngrams import conala_tokens
from minipeft.study.statistics import by_question, flags, interval, mean_and_sd

REFERENCES = [f"sorted(x{n}, key=lambda t: t[{n % 3}])" for n in range(24)]
GOOD = [text if n % 2 else text.replace("sorted", "list") for n, text in enumerate(REFERENCES)]
POOR = [text if n % 4 == 0 else f"x{n}.sort(key=lambda t: t[0])" for n, text in enumerate(REFERENCES)]
QUESTIONS = [n // 3 for n in range(24)]  # 8 of 3 pairs each


def corpus_bleu(predictions, references) -> float:
    """BLEU of CoNaLa's tokens by sacrebleu, without smoothing."""
    cut = lambda texts: [" ".join(conala_tokens(text)) for text in texts]
    scored = sacrebleu.corpus_bleu(
        cut(predictions), [cut(references)], tokenize="none", smooth_method="none", force=True
    )
    return scored.score / 100


def drawn_bleus(predictions, resamples, seed=0) -> np.ndarray:
    """The BLEU of each draw of whole questions."""
    draws = np.random.default_rng(seed).multinomial(8, np.full(8, 1 / 8), size=resamples)
    values = []
    for times in draws:
        rows = [
            row for question, count in enumerate(times) for row in count * list(range(3 * question, 3 * question + 3))
        ]
        values.append(corpus_bleu([predictions[row] for row in rows], [REFERENCES[row] for row in rows]))
    return np.array(values)


def counted(predictions) -> np.ndarray:
    return by_question(count_pairs(predictions, REFERENCES), QUESTIONS)


def test_the_interval_is_that_of_whole_corpora_drawn_by_question():
    values, found = drawn_bleus(GOOD, 40), interval([counted(GOOD)], resamples=40)
    assert found.value == pytest.approx(corpus_bleu(GOOD, REFERENCES))
    assert [found.low, found.high] == pytest.approx(list(np.quantile(values, [0.025, 0.975])))
    assert found.low < found.value < found.high


def test_the_difference_uses_the_same_draws():
    values = drawn_bleus(GOOD, 40) - drawn_bleus(POOR, 40)
    found = interval([counted(GOOD)], [counted(POOR)], resamples=40)
    assert [found.low, found.high] == pytest.approx(list(np.quantile(values, [0.025, 0.975])))
    assert found.p_value == pytest.approx(2 * min((values <= 0).mean(), (values >= 0).mean()))
    same = interval([counted(GOOD)], [counted(GOOD)])
    assert (same.value, same.low, same.high, same.p_value) == (0, 0, 0, 1)


def test_seeds_are_averaged_within_each_draw():
    values = (drawn_bleus(GOOD, 40) + drawn_bleus(POOR, 40)) / 2
    found = interval([counted(GOOD), counted(POOR)], resamples=40)
    assert [found.low, found.high] == pytest.approx(list(np.quantile(values, [0.025, 0.975])))


def test_one_pair_a_question_is_the_bootstrap_of_metrics():
    counts = count_pairs(GOOD, REFERENCES)
    ours, theirs = interval([by_question(counts, range(24))], resamples=500), bootstrap_bleu(counts, resamples=500)
    assert (ours.value, ours.low, ours.high) == (theirs.value, theirs.low, theirs.high)


def test_pairs_that_hang_together_make_it_wider():
    alike = [text if question % 2 else "nothing" for text, question in zip(REFERENCES, QUESTIONS)]
    counts = count_pairs(alike, REFERENCES)
    apart, together = interval([by_question(counts, range(24))]), interval([by_question(counts, QUESTIONS)])
    assert together.high - together.low > 1.3 * (apart.high - apart.low)


def test_mean_and_sd():
    assert mean_and_sd([1.0, 2.0, 4.0]) == (pytest.approx(7 / 3), pytest.approx(np.std([1, 2, 4], ddof=1)))
    assert mean_and_sd([3.0]) == (3.0, None)


def test_flags():
    row = {
        "model": "m",
        "pairs": 100,
        "bleu": 0.3,
        "empty": 0,
        "repeated": 0,
        "leaked": 0,
        "hit_limit": None,
        "distinct": 90,
        "codebleu": 0.3,
        "codebleu_compat": 0.3,
        "adapter_movement": None,
    }
    assert flags(row, ("nearest", 0.2)) == []
    said = lambda **changes: " ".join(flags({**row, **changes}, ("nearest", 0.2)))
    assert "6 of 100 answers are empty" in said(empty=6)
    assert "repeat themselves" in said(repeated=6)
    assert said(hit_limit=20) == ""
    assert "cut off" in said(hit_limit=26)
    assert "every answer is the same" in said(distinct=1)
    assert "would say 0.250, not 0.000" in said(codebleu=0.0, codebleu_compat=0.25)
    assert "no better than 'nearest'" in said(bleu=0.2)
    assert "it is still its start" in said(adapter_movement={"warnings": ["dead adapter: it is still its start"]})
