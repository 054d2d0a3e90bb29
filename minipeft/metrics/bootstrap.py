"""Confidence intervals of BLEU: percentile bootstrap over questions (Koehn 2004), of one system or a difference of two.

A resample draws Q of the Q questions with replacement. The pairs of a question are drawn together, because their scores
are correlated: drawn separately they would make the interval too narrow. A system trained with S seeds scores, in a
resample, the mean BLEU of its S runs over the same questions. Two systems are compared on the same resamples, so that
the variance between questions cancels (paired bootstrap).
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from minipeft.errors import InputError, check_items, check_value
from minipeft.metrics.bleu import score_counts

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A value and its percentile bootstrap interval: `confidence` of the resamples lie in [low, high]."""

    value: float
    low: float
    high: float
    confidence: float = 0.95
    resamples: int = RESAMPLES
    p_value: float | None = None  # of a difference: twice the smaller share of resamples on one side of 0


def sum_by_question(counts: np.ndarray, questions: Sequence[Hashable]) -> np.ndarray:
    """Sum the BLEU counts of each question's pairs. [N, 10] -> [Q, 10], in order of first appearance.

    A pair whose question is None is a question of its own.
    """
    places: dict[Hashable, int] = {}
    keys = [("pair", row) if question is None else question for row, question in enumerate(questions)]
    rows = [places.setdefault(key, len(places)) for key in keys]
    sums = np.zeros((len(places), counts.shape[1]), dtype=counts.dtype)  # [Q, 10]
    np.add.at(sums, rows, counts)
    return sums


def bootstrap_bleu(
    runs: Sequence[np.ndarray],
    base: Sequence[np.ndarray] | None = None,
    *,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
    draw_runs: bool = False,
) -> Interval:
    """The interval of a system's mean BLEU over its runs, or of its difference to `base` on the same questions.

    `runs` and `base` hold BLEU counts [Q, 10], one array a seed. The same `seed` gives the same interval. `draw_runs`:
    each resample also draws each system's runs with replacement, so that the interval covers other runs as well.
    Raises: InputError where two runs have different numbers of questions.
    """
    runs = check_counts(runs, "runs")
    base = None if base is None else check_counts(base, "base")
    check_value(resamples, int, {"least": 1, "limit": 100_000}, "resamples")
    check_value(confidence, float, {"above": 0, "below": 1}, "confidence")
    check_value(seed, int, {"least": 0}, "seed")
    number = len(runs[0])
    for counts in (*runs, *(base or ())):
        if len(counts) != number:
            raise InputError(f"paired systems have {number} and {len(counts)} questions", where="base")
    whole, draws = draw_questions(number, resamples, seed)
    generator = np.random.default_rng(seed + 1) if draw_runs else None
    value, values = compute_mean_bleu(runs, whole), compute_mean_bleu(runs, draws, generator)  # [1], [R]
    if base is not None:
        value, values = value - compute_mean_bleu(base, whole), values - compute_mean_bleu(base, draws, generator)
    return summarize(value, values, confidence, compared=base is not None)


def bootstrap_mean(
    differences: np.ndarray,
    questions: Sequence[Hashable],
    *,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The interval of a mean paired difference over pairs, [N], drawn by question.

    A resample's mean is the sum of its pairs' differences over the number of its pairs: sum_q w_q d_q / sum_q w_q n_q.
    """
    pairs = np.stack([differences, np.ones_like(differences)], axis=1)  # [N, 2]
    sums = sum_by_question(pairs, questions)  # [Q, 2]
    whole, draws = draw_questions(len(sums), resamples, seed)
    mean = lambda weights: (weights @ sums[:, 0]) / (weights @ sums[:, 1])  # [R, Q] -> [R]
    return summarize(mean(whole), mean(draws), confidence, compared=True)


def draw_questions(number: int, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each question is taken: once, which gives the value itself [1, Q], and in each resample [R, Q]."""
    draws = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=resamples)
    return np.ones((1, number), dtype=np.int64), draws


def summarize(value: np.ndarray, values: np.ndarray, confidence: float, *, compared: bool) -> Interval:
    """The percentile interval of resampled values, [R]; of a difference (`compared`) with its p-value."""
    p_value = min(1.0, 2 * min(float((values <= 0).mean()), float((values >= 0).mean()))) if compared else None
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(value[0]), float(low), float(high), confidence, len(values), p_value)


def check_counts(runs: Sequence[np.ndarray], where: str) -> list[np.ndarray]:
    """Check that there are runs, each with BLEU counts of a question or more, [Q, 10].

    Raises:
        InputError: there are none, or one has another shape.
    """
    arrays = check_items(runs, np.ndarray, where)
    if not arrays:
        raise InputError("holds no run", where=where)
    for array in arrays:
        if array.ndim != 2 or array.shape[1] != 10 or not len(array) or array.dtype.kind not in "iuf":
            raise InputError(f"BLEU counts are numbers [Q, 10], not {array.dtype} {list(array.shape)}", where=where)
    return arrays


def compute_mean_bleu(
    runs: Sequence[np.ndarray], draws: np.ndarray, generator: np.random.Generator | None = None
) -> np.ndarray:
    """Compute the mean BLEU over runs for each resample; `generator` draws the runs of each, with replacement.

    S times [Q, 10], [R, Q] -> [R]
    """
    bleu = np.stack([score_counts(draws @ counts)[0] for counts in runs])  # [S, R]
    if generator is not None:
        picked = generator.integers(len(runs), size=bleu.shape)  # [S, R]
        bleu = np.take_along_axis(bleu, picked, axis=0)  # [S, R]
    return np.asarray(bleu.mean(axis=0))
