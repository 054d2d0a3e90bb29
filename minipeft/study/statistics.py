"""The spread of scores over seeds, and flags on cells whose training or answers look wrong.

The intervals themselves are a bootstrap over questions (metrics/bootstrap.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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
