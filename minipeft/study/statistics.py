"""How sure a study is: intervals by bootstrap over questions, paired differences, the spread of seeds, and flags.

One draw is Q questions out of Q with replacement; pairs of one question are drawn together, because an answer that
suits one suits the others (the demo's test set has 299 pairs, but 100 questions). A system that was trained with S
seeds scores, in a draw, the mean of its S runs' BLEU, all over the same questions. Two systems are compared draw by
draw (Koehn 2004): what the questions have in common cancels out.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from minipeft.metrics.bleu import Interval, score_counts

RESAMPLES = 2000
MANY_DEGENERATE = 0.05  # share of answers that are empty, or repeat themselves, from which a cell is flagged
MANY_CUT = 0.25  # share that was cut off
ARTEFACT = 0.005  # between the two CodeBLEU totals


def by_question(counts: np.ndarray, questions: Sequence[Hashable]) -> np.ndarray:
    """Sum the rows of counts of each question. [N, 10] -> [Q, 10], in order of first appearance."""
    places: dict[Hashable, int] = {}
    rows = [places.setdefault(question, len(places)) for question in questions]
    sums = np.zeros((len(places), counts.shape[1]), dtype=counts.dtype)  # [Q, 10]
    np.add.at(sums, rows, counts)
    return sums


def mean_bleu(runs: Sequence[np.ndarray], draws: np.ndarray) -> np.ndarray:
    """The mean over runs of each draw's BLEU. S times [Q, 10], [R, Q] -> [R]"""
    return np.mean([score_counts(draws @ counts)[0] for counts in runs], axis=0)


def interval(
    runs: Sequence[np.ndarray],
    base: Sequence[np.ndarray] | None = None,
    *,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The percentile bootstrap of a system's BLEU, or of its difference to `base`; `runs` are [Q, 10], one a seed."""
    number = len(runs[0])
    whole = np.ones((1, number), dtype=np.int64)  # every question once: the value itself
    draws = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=resamples)  # [R, Q]
    value, values = mean_bleu(runs, whole), mean_bleu(runs, draws)  # [1], [R]
    p_value = None
    if base is not None:
        value, values = value - mean_bleu(base, whole), values - mean_bleu(base, draws)
        p_value = min(1.0, 2 * min(float((values <= 0).mean()), float((values >= 0).mean())))
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(value[0]), float(low), float(high), confidence, resamples, p_value)


def mean_and_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None where one value has none."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def flags(row: dict[str, Any], floor: tuple[str, float] | None) -> list[str]:
    """What a reader must know before using a cell's scores. `floor`: the best trivial baseline and its BLEU."""
    found = [f"training: {text}" for text in (row.get("adapter_movement") or {}).get("warnings", [])]
    if row.get("bleu") is None:
        return found
    pairs = row["pairs"]
    for name, most, said in (
        ("empty", MANY_DEGENERATE, "are empty"),
        ("repeated", MANY_DEGENERATE, "repeat themselves"),
        ("leaked", MANY_DEGENERATE, "hold the prompt's template"),
        ("hit_limit", MANY_CUT, "were cut off at the limit of new tokens"),
    ):
        if row["model"] and (row[name] or 0) > most * pairs:
            found.append(f"degenerate: {row[name]} of {pairs} answers {said}")
    if row["distinct"] == 1 < pairs and row["model"]:
        found.append("degenerate: every answer is the same")
    if row["codebleu_compat"] - row["codebleu"] > ARTEFACT:
        found.append(
            f"CodeBLEU artefact: the codebleu package would say {row['codebleu_compat']:.3f}, not "
            f"{row['codebleu']:.3f}: it counts a data-flow match of 0 as 1"
        )
    if floor is not None and row["model"] and row["bleu"] <= floor[1]:
        found.append(f"no better than {floor[0]!r}, which needs no model (BLEU {100 * floor[1]:.1f})")
    return found
