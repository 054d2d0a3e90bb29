"""Each method at its own best learning rate: a search on held-out pairs, then several seeds at the chosen rate.

search    learning rates 1, 3, 10, 30, ... times a power of ten, from the method's own on: one is chosen when the next
          smaller and the next larger one both end at a higher held-out loss. One seed; no test question is asked
runs      as many seeds at the chosen learning rate; each answers the test questions

LoRA+ is LoRA with a learning-rate multiplier of B (Hayou et al. 2024): a contender of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from minipeft.study.trials import Wanted

MOST_RATES = 7  # of a search; where the best is at its end then, the report says so
METHODS = ("full", "lora", "rslora", "dora", "pissa", "ia3", "prefix", "prompt")


@dataclass(frozen=True)
class Contender:
    """A method with settings of its own; `name` is a word, for folders."""

    name: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def name_variant(self, rate: float | None = None) -> str:
        """The variant of its cells: of a search with the learning rate."""
        own = "" if self.name == self.method else self.name
        return own if rate is None else f"{own}@{rate:g}"


LORA_PLUS = Contender("loraplus", "lora", {"lr_multiplier": {"lora_B": 16.0}})
LABELS = {"loraplus": "LoRA+", "rslora": "rsLoRA", "dora": "DoRA", "pissa": "PiSSA"}  # of contenders in tables


@dataclass(frozen=True)
class Trial:
    """One training run of a contender; `answers`: at the chosen learning rate."""

    contender: Contender
    learning_rate: float
    seed: int = 0
    answers: bool = False

    @property
    def method(self) -> str:
        return self.contender.method

    @property
    def variant(self) -> str:
        return self.contender.name_variant(None if self.answers else self.learning_rate)

    def settings(self) -> dict[str, Any]:
        """What differs from the preset's settings."""
        return {**self.contender.settings, "learning_rate": self.learning_rate}


def list_contenders(methods: Sequence[str]) -> list[Contender]:
    """The contenders of these methods; LoRA+ comes with LoRA."""
    return [
        one for name in methods for one in (Contender(name, name), *((LORA_PLUS,) if name == LORA_PLUS.method else ()))
    ]


def list_trials(wanted: Wanted) -> list[Trial]:
    """The trials of one model, as far as they are known: the searches, then the runs, seed by seed."""
    losses = wanted.losses or {}
    search, chosen = [], []
    for contender in list_contenders(wanted.methods):
        first = find_rung(wanted.start(contender.method))
        near = range(first - MOST_RATES, first + MOST_RATES + 1)
        keys = {rung: (contender.method, contender.name_variant(get_rate(rung))) for rung in near}
        rungs, best = climb(first, {rung: losses[key] for rung, key in keys.items() if key in losses})
        search += [Trial(contender, get_rate(rung)) for rung in rungs]
        if best is not None or wanted.losses is None:
            chosen.append(Trial(contender, get_rate(first if best is None else best), answers=True))
    return search + [replace(trial, seed=seed) for seed in range(wanted.seeds) for trial in chosen]


def climb(first: int, ended: Mapping[int, float | None]) -> tuple[list[int], int | None]:
    """The rungs to try, and the best of them once those beside it are tried as well.

    `ended`: the held-out loss of the rungs that were tried; None or NaN: training failed there.
    """
    tried = {first, first - 1, first + 1}
    while all(rung in ended for rung in tried):
        losses = {rung: loss for rung in tried if (loss := ended[rung]) is not None and not math.isnan(loss)}
        if not losses:
            return sorted(tried), None
        best = min(losses, key=lambda rung: (losses[rung], rung))
        beside = {best - 1, best + 1} - tried
        if not beside or len(tried) >= MOST_RATES:
            return sorted(tried), best
        tried |= beside
    return sorted(tried), None


def find_rung(rate: float) -> int:
    """The rung next to a learning rate: 0.003 -> -5, 0.01 -> -4."""
    return round(2 * math.log10(rate))


def get_rate(rung: int) -> float:
    """The learning rate of a rung, 10^(rung / 2) to one digit: ..., 0.001, 0.003, 0.01, ..."""
    return float(f"{10 ** (rung / 2):.0e}")
