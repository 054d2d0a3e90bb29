"""The spread over seeds, what a study can detect, and flags on cells whose training or answers look wrong.

The intervals of scores are a bootstrap over questions (metrics/bootstrap.py). A loss has one value a seed, so its
interval is Student's: mean +- t s / sqrt(n), with n - 1 degrees of freedom.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minipeft.metrics.bootstrap import Interval
from minipeft.metrics.scores import ARTEFACT
from minipeft.study.rows import Row

# Share of the answers above which a cell is flagged, and the text of the flag.
DEGENERATE = {
    "empty": (0.05, "are empty"),
    "repeated": (0.05, "repeat themselves"),
    "leaked": (0.05, "contain the prompt template"),
    "hit_limit": (0.25, "were cut off at the token limit"),
}


def compute_mean_and_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; a single value has no deviation."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


# The 97.5 % quantile of Student's t with 1, 2, ... degrees of freedom.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
Z_INTERVAL, Z_POWER = 1.960, 0.842  # normal quantiles of a 95 % interval and of a power of 80 %


def compute_t_interval(values: Sequence[float]) -> tuple[float, float, float] | None:
    """Mean of the seeds' values with its 95 % interval, (mean, low, high); None for fewer than two values."""
    mean, sd = compute_mean_and_sd(values) if values else (0.0, None)
    if sd is None:
        return None
    t = T_QUANTILES[min(len(values) - 1, len(T_QUANTILES)) - 1]
    half = t * sd / len(values) ** 0.5
    return mean, mean - half, mean + half


def find_detectable(difference: Interval) -> float:
    """The difference that a study with this interval's width finds with a power of 80 %: (1.96 + 0.84) standard errors,
    of which the 95 % interval is 2 x 1.96 wide."""
    return (Z_INTERVAL + Z_POWER) * (difference.high - difference.low) / (2 * Z_INTERVAL)


def flag(row: Row, floor: tuple[str, float] | None) -> tuple[str, ...]:
    """The flags of a row. `floor`: the best trivial baseline and its BLEU."""
    found = [f"training: {text}" for text in (row.adapter_movement or {}).get("warnings", [])]
    if row.scores is None:
        return tuple(found)
    scores, pairs = row.scores, row.scores.pairs
    if row.model:
        for name, (most, problem) in DEGENERATE.items():
            number = scores[name] or 0
            if number > most * pairs:
                found.append(f"degenerate: {number:.0f} of {pairs} answers {problem}")
        if scores["distinct"] == 1 < pairs:
            found.append("degenerate: every answer is the same")
    strict, compat, bleu = (scores[name] or 0.0 for name in ("codebleu", "codebleu_compat", "bleu"))
    if compat - strict > ARTEFACT:
        found.append(
            f"CodeBLEU artefact: the codebleu package gives {compat:.3f}, not {strict:.3f}: it counts a "
            "data-flow match of 0 as 1"
        )
    if floor is not None and row.model and bleu <= floor[1]:
        found.append(f"no better than {floor[0]!r}, a baseline without a model (BLEU {100 * floor[1]:.1f})")
    return tuple(found)
