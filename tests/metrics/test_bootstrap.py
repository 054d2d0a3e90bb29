"""The bootstrap against a literal one: sacrebleu scores the answers of every resample."""

import random
import time

import numpy as np
import pytest
import sacrebleu

from minipeft import InputError
from minipeft.metrics.bleu import bleu, count_pairs, score_counts
from minipeft.metrics.bootstrap import bootstrap_bleu, sum_by_question
from minipeft.metrics.ngrams import tokenize_conala

REFERENCES = [f"sorted(x{n}, key=lambda t: t[{n % 3}])" for n in range(24)]
GOOD = [text if n % 2 else text.replace("sorted", "list") for n, text in enumerate(REFERENCES)]
POOR = [text if n % 4 == 0 else f"x{n}.sort(key=lambda t: t[0])" for n, text in enumerate(REFERENCES)]
QUESTIONS = [n // 3 for n in range(24)]  # 8 of 3 pairs each


def corpus_bleu(predictions, references) -> float:
    """BLEU of CoNaLa's tokens by sacrebleu, without smoothing."""
    cut = lambda texts: [" ".join(tokenize_conala(text)) for text in texts]
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
    return sum_by_question(count_pairs(predictions, REFERENCES), QUESTIONS)


def test_the_interval_is_that_of_whole_corpora_drawn_sum_by_question():
    values, found = drawn_bleus(GOOD, 40), bootstrap_bleu([counted(GOOD)], resamples=40)
    assert found.value == pytest.approx(corpus_bleu(GOOD, REFERENCES))
    assert [found.low, found.high] == pytest.approx(list(np.quantile(values, [0.025, 0.975])))
    assert found.low < found.value < found.high


def test_the_difference_uses_the_same_draws():
    values = drawn_bleus(GOOD, 40) - drawn_bleus(POOR, 40)
    found = bootstrap_bleu([counted(GOOD)], [counted(POOR)], resamples=40)
    assert [found.low, found.high] == pytest.approx(list(np.quantile(values, [0.025, 0.975])))
    assert found.p_value == pytest.approx(2 * min((values <= 0).mean(), (values >= 0).mean()))
    same = bootstrap_bleu([counted(GOOD)], [counted(GOOD)])
    assert (same.value, same.low, same.high, same.p_value) == (0, 0, 0, 1)


def test_seeds_are_averaged_within_each_draw():
    values = (drawn_bleus(GOOD, 40) + drawn_bleus(POOR, 40)) / 2
    found = bootstrap_bleu([counted(GOOD), counted(POOR)], resamples=40)
    assert [found.low, found.high] == pytest.approx(list(np.quantile(values, [0.025, 0.975])))


def test_a_pair_without_a_question_is_one_of_its_own():
    counts = count_pairs(GOOD, REFERENCES)
    for questions in (range(24), [None] * 24, [*range(23), None]):
        assert (sum_by_question(counts, questions) == counts).all()
    assert (sum_by_question(counts, [0, 0, *range(22)]) == [counts[:3].sum(0), *counts[3:]]).all()


def test_pairs_that_hang_together_make_it_wider():
    alike = [text if question % 2 else "nothing" for text, question in zip(REFERENCES, QUESTIONS)]
    counts = count_pairs(alike, REFERENCES)
    apart, together = (bootstrap_bleu([sum_by_question(counts, keys)]) for keys in (range(24), QUESTIONS))
    assert together.high - together.low > 1.3 * (apart.high - apart.low)


@pytest.fixture(scope="module")
def pairs(snippets, mutate):
    chance = random.Random(7)
    return [mutate(text, chance) for text in snippets], snippets


def test_the_interval_is_that_of_drawn_sentences(pairs):
    counts = count_pairs(*pairs)
    found = bootstrap_bleu([counts], resamples=2000, seed=1)
    chance = np.random.default_rng(2)
    drawn = [counts[chance.integers(0, len(counts), len(counts))].sum(axis=0, keepdims=True) for _ in range(2000)]
    scores = [score_counts(sums)[0][0] for sums in drawn]
    assert found.value == bleu(*pairs).score
    assert [found.low, found.high] == pytest.approx(np.quantile(scores, [0.025, 0.975]), abs=0.01)
    assert found.low < found.value < found.high
    assert bootstrap_bleu([counts], resamples=2000, seed=1) == found
    assert bootstrap_bleu([counts], resamples=2000, seed=3) != found


def test_the_paired_interval_tells_equal_from_different_systems(pairs):
    predictions, references = pairs
    counts = count_pairs(predictions, references)
    same = bootstrap_bleu([counts], [counts])
    assert (same.value, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    better = bootstrap_bleu([count_pairs(references, references)], [counts])
    assert better.low > 0
    assert better.p_value == 0
    swapped = bootstrap_bleu([counts], [count_pairs(references, references)])
    assert swapped.value == -better.value


def test_a_thousand_resamples_of_500_sentences_take_under_a_second():
    counts = np.tile(count_pairs(["a b c d e f"], ["a b c d f e"]), (500, 1))
    start = time.process_time()
    bootstrap_bleu([counts], resamples=1000)
    assert time.process_time() - start < 1


def test_systems_on_different_questions_are_refused():
    with pytest.raises(InputError, match="1 and 2 questions"):
        bootstrap_bleu([np.ones((1, 10))], [np.ones((2, 10))])
