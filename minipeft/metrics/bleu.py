"""BLEU-4 (Papineni et al. 2002), 0..1, from counts per sentence.

    BLEU = min(1, exp(1 - r/c)) * exp(1/4 * sum over n=1..4 of log p_n),    p_n = matches_n / ngrams_n

where c counts the tokens of all predictions, r those of their references, and matches are clipped to the largest count
in one reference. Counts are summed over the corpus before the division, so a corpus is scored from the sum of its rows
of counts, which makes a bootstrap cheap (bootstrap.py). A BLEU without its tokenizer and smoothing cannot be compared:
the same 500 answers score 0.154 with CoNaLa's tokens and 0.031 with words.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minipeft.errors import InputError, check_value, format_value
from minipeft.metrics.ngrams import ORDERS, TOKENIZERS, check_pairs, choose_length, count_matches, count_ngrams

# The smoothings of Chen & Cherry (2014) under sacrebleu's names, each with its default value. They replace a precision
# of 0. none: the score is 0; floor: `value` matches; add-k: k added to matches and totals from order 2 on; exp: 1/2,
# 1/4, ... matches for the first, second, ... order without a match.
SMOOTHINGS: dict[str, float] = {"none": 0.0, "floor": 0.1, "add-k": 1.0, "exp": 0.0}

# The counts of a sentence are one row: c, r, matches of order 1..4, n-grams of order 1..4.
LENGTH, REFERENCE_LENGTH, MATCHES, TOTALS = 0, 1, slice(2, 6), slice(6, 10)


@dataclass(frozen=True)
class BLEU:
    """A BLEU score, 0..1, and the counts behind it."""

    score: float
    precisions: tuple[float, ...]  # p_1..p_4, smoothed
    brevity_penalty: float
    matches: tuple[int, ...]
    totals: tuple[int, ...]
    length: int
    reference_length: int
    signature: str


def bleu(
    predictions: Sequence[str],
    references: Sequence[str | Sequence[str]],
    *,
    tokenize: str = "conala",
    smooth: str | None = None,
    smooth_value: float | None = None,
) -> BLEU:
    """Score a corpus. `tokenize="conala"` without smoothing is the official CoNaLa evaluation.

    "13a" and "none" are sacrebleu's, which smooths with "exp"; these are the defaults of `smooth` for each.
    Raises: InputError for an unknown tokenizer or smoothing, and for pairs that cannot be scored.
    """
    counts = count_pairs(predictions, references, tokenize=tokenize)
    return _bleu(counts, tokenize, smooth, smooth_value, effective_order=False)


def sentence_bleu(
    prediction: str,
    references: str | Sequence[str],
    *,
    tokenize: str = "conala",
    smooth: str | None = None,
    smooth_value: float | None = None,
    effective_order: bool = True,
) -> BLEU:
    """Score one sentence; by default the order is limited by its length, as in sacrebleu."""
    counts = count_pairs([prediction], [references], tokenize=tokenize)
    return _bleu(counts, tokenize, smooth, smooth_value, effective_order)


def count_pairs(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]], *, tokenize: str = "conala"
) -> np.ndarray:
    """The row of counts of each pair, int64 [N, 10]; a corpus is scored from the sum of its rows.

    With several references "conala" uses the shortest length (as its evaluation does), the others the closest.
    """
    if not isinstance(tokenize, str) or tokenize not in TOKENIZERS:
        raise InputError(
            f"no tokenizer is called {format_value(tokenize)}; there are {sorted(TOKENIZERS)}", where="tokenize"
        )
    cut, rows = TOKENIZERS[tokenize], []
    for prediction, texts in zip(*check_pairs(predictions, references)):
        tokens, others = cut(prediction), [cut(text) for text in texts]
        grams, allowed = count_ngrams(tokens), list(count_ngrams(others[0]))
        for other in others[1:]:
            allowed = [most | more for most, more in zip(allowed, count_ngrams(other))]
        lengths = [len(other) for other in others]
        shortest = min(lengths) if tokenize == "conala" else choose_length(len(tokens), lengths)
        matches = [count_matches(here, there) for here, there in zip(grams, allowed)]
        rows.append([len(tokens), shortest, *matches, *(max(0, len(tokens) - order + 1) for order in ORDERS)])
    return np.array(rows, dtype=np.int64)  # [N, 10]


def score_counts(
    counts: np.ndarray, *, smooth: str = "none", smooth_value: float | None = None, effective_order: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """BLEU of each row of (summed) counts [R, 10]: scores [R], precisions [R, 4], brevity penalties [R]."""
    matches, totals = counts[:, MATCHES].astype(float), counts[:, TOTALS].astype(float)  # [R, 4] each
    found = matches.sum(axis=1) > 0  # [R]
    zero = matches == 0  # [R, 4]
    if smooth == "floor":
        matches[zero] = _smooth_value(smooth, smooth_value)
    elif smooth == "add-k":
        matches[:, 1:] += _smooth_value(smooth, smooth_value)
        totals[:, 1:] += _smooth_value(smooth, smooth_value)
    elif smooth == "exp":
        matches[zero] = 0.5 ** zero.cumsum(axis=1)[zero]
    there = np.logical_and.accumulate(totals > 0, axis=1)  # [R, 4]: the orders that the texts are long enough for
    with np.errstate(divide="ignore", invalid="ignore"):
        precisions = np.where(there & found[:, None], matches / totals, 0.0)  # [R, 4]
        logs = np.log(precisions)  # [R, 4], -inf where a precision is 0
        c, r = counts[:, LENGTH], counts[:, REFERENCE_LENGTH]  # [R] each
        brevity = np.where(c >= r, 1.0, np.where(c > 0, np.exp(1 - r / c), 0.0))  # [R]
    if effective_order:
        logs, orders = np.where(there, logs, 0.0), np.maximum(1, there.sum(axis=1))  # [R, 4], [R]
    else:
        orders = np.full(len(counts), len(ORDERS))  # [R]
    scores = np.where(found, brevity * np.exp(logs.sum(axis=1) / orders), 0.0)  # [R]
    return scores, precisions, brevity


def _bleu(
    counts: np.ndarray, tokenize: str, smooth: str | None, smooth_value: float | None, effective_order: bool
) -> BLEU:
    """Score the summed counts; returns the parts and the signature too."""
    if smooth is None:
        smooth = "none" if tokenize == "conala" else "exp"
    if not isinstance(smooth, str) or smooth not in SMOOTHINGS:
        raise InputError(
            f"no smoothing is called {format_value(smooth)}; there are {sorted(SMOOTHINGS)}", where="smooth"
        )
    check_value(smooth_value, float | None, {"above": 0}, "smooth_value")
    check_value(effective_order, bool, {}, "effective_order")
    sums = counts.sum(axis=0, keepdims=True)  # [1, 10]
    scores, precisions, brevity = score_counts(
        sums, smooth=smooth, smooth_value=smooth_value, effective_order=effective_order
    )
    numbers = [int(number) for number in sums[0]]
    value = f"[{_smooth_value(smooth, smooth_value):g}]" if smooth in ("floor", "add-k") else ""
    return BLEU(
        score=float(scores[0]),
        precisions=tuple(float(p) for p in precisions[0]),
        brevity_penalty=float(brevity[0]),
        matches=tuple(numbers[MATCHES]),
        totals=tuple(numbers[TOTALS]),
        length=numbers[LENGTH],
        reference_length=numbers[REFERENCE_LENGTH],
        signature=f"BLEU-4|scale:0-1|tokenize:{tokenize}|smooth:{smooth}{value}"
        f"|effective_order:{'yes' if effective_order else 'no'}"
        f"|reference_length:{'shortest' if tokenize == 'conala' else 'closest'}|case:kept",
    )


def _smooth_value(smooth: str, value: float | None) -> float:
    return SMOOTHINGS[smooth] if value is None else value
