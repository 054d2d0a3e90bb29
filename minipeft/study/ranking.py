"""The systems of a study in the order of their BLEU, and whether each is above the next: paired differences.

    above(i) = BLEU(i) - BLEU(i + 1)      of the same questions; 95 % interval over questions, and over seeds of several

Ranked are the tuned groups, the untrained models, and the baseline with the highest BLEU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from minipeft.metrics.bootstrap import Interval, bootstrap_bleu
from minipeft.study.cells import FIRST_LINE
from minipeft.study.rows import Group, Results, as_object
from minipeft.study.table import name_groups, show_difference

MEANING = (
    "BLEU minus that of the next lower system, paired by question, with a 95 % interval over questions (and over "
    "seeds, where both have several). Apart: the interval excludes 0."
)


@dataclass(frozen=True)
class Place:
    """A system and its difference to the next lower one; None for the last."""

    name: str
    bleu: float
    above: Interval | None

    @property
    def is_apart(self) -> bool:
        return self.above is not None and self.above.low > 0


def rank(groups: Sequence[Group]) -> list[Place]:
    """The systems from the highest BLEU to the lowest, if any is tuned."""
    named = [(name, group) for name, group in zip(name_groups(groups), groups) if group.scores is not None]
    plain = [(name, group) for name, group in named if not group.model]
    best = max(plain, key=lambda pair: pair[1].bleu or 0.0, default=None)
    ranked = [pair for pair in named if pair[1].model and pair[1].method != FIRST_LINE]
    if not any(group.is_tuned for _, group in ranked):
        return []
    ranked = sorted([*ranked, *([best] if best else [])], key=lambda pair: -(pair[1].bleu or 0.0))
    lower = [subtract_seeds(one, other) for (_, one), (_, other) in pairwise(ranked)]
    return [Place(name, group.bleu or 0.0, above) for (name, group), above in zip(ranked, [*lower, None])]


def subtract_seeds(one: Group, other: Group) -> Interval:
    """The paired difference of two groups' BLEU; where both have several seeds, those are resampled too."""
    assert one.scores is not None
    assert other.scores is not None
    runs, base = one.scores.runs, other.scores.runs
    return bootstrap_bleu(runs, base, draw_runs=min(len(runs), len(base)) > 1)


def as_json(results: Results) -> dict[str, Any]:
    """What results.json holds of the ranking."""
    return {"ranking": [vars(place) | {"above": as_object(place.above)} for place in rank(results.groups)]}


def list_tables(results: Results) -> list[tuple[str, str, list[list[str]]]]:
    """The ranking as a table: title, meaning, and rows, header first; none where nothing is tuned."""
    rows = [
        [place.name, f"{100 * place.bleu:.1f}", show_difference(place.above), "yes" if place.is_apart else ""]
        for place in rank(results.groups)
    ]
    return [("Ranking", MEANING, [["", "BLEU", "above the next", "apart"], *rows])] if rows else []
