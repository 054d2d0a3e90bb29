"""Why the paper's prefix-tuning did not train: start x learning rate x network, against LoRA and prompt tuning.

    trial               = one training run on one seed -> one cell of a study (grid.py)
    grid (part 1)       = start {N(0,1), normal, text} x rate {2e-4, 1e-3, 5e-3, 3e-2} x network {none, MLP},
                          beside LoRA at two rates and a text prompt at its own: 60 steps, held-out loss alone
    long runs (part 2)  = the paper's start, ours, LoRA and prompt: 300 steps, three seeds; the first seed answers

A step sees a row of about 4 examples (200 tokens), so that 60 steps are minutes on one core. The columns of a prefix
or prompt stand beside the row, not in it: each method sees the same tokens in a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from minipeft.adapters import PrefixConfig

RATES = (2e-4, 1e-3, 5e-3, 3e-2)
WIDTH = 512  # of the network, as Li & Liang's
EXAMPLE_TOKENS = 55  # of a row, for each example of a step: CoNaLa's mean is 47, and no row is quite full


@dataclass(frozen=True)
class Trial:
    """One run: what is trained, how it starts, and how."""

    method: str
    learning_rate: float
    init: str | None = None  # of a prefix or prompt
    reparam: int | None = None
    steps: int = 60
    seed: int = 0
    examples: int = 4  # a step

    @property
    def variant(self) -> str:
        """What tells it from another trial of its method."""
        parts = (self.init, "mlp" if self.reparam else None, f"{self.learning_rate:g}", f"{self.steps}")
        return "-".join(part for part in parts if part)

    def tuning(self) -> dict[str, Any]:
        """The trial as fields of TuneConfig; warm-up, decay and clipping are the method's own (recipes.py)."""
        learned = PrefixConfig().length if self.init else 0
        fields: dict[str, Any] = {
            "method": self.method, "learning_rate": self.learning_rate, "steps": self.steps, "seed": self.seed,
            "length": EXAMPLE_TOKENS * self.examples + learned,
        }  # fmt: skip
        return fields | ({"init": self.init, "reparam": self.reparam} if self.init else {})


OURS = (Trial("prefix", 5e-3, "text"), Trial("prefix", 1e-3, "text", WIDTH))
OTHERS = (Trial("lora", 1e-3), Trial("prompt", 3e-2, "text"))
PAPERS = Trial("prefix", 2e-4, "peft")  # the start that PEFT gives, at a rate that suits LoRA


def grid(steps: int = 60) -> list[Trial]:
    """Part 1: the 24 prefixes and three to compare them with; those that tell most stand first."""
    rest = [
        Trial("prefix", rate, init, width)
        for width in (None, WIDTH)
        for init in ("peft", "text", "normal")
        for rate in RATES
    ]
    trials = dict.fromkeys([PAPERS, *OURS, *OTHERS, Trial("lora", 3e-4), *rest])
    return [replace(trial, steps=steps) for trial in trials]


def long_runs(steps: int = 300, seeds: int = 3) -> list[Trial]:
    """Part 2, seed by seed."""
    kinds = (PAPERS, *OURS, *OTHERS)
    return [replace(trial, steps=steps, seed=seed) for seed in range(seeds) for trial in kinds]


@dataclass(frozen=True)
class Grid:
    """The prefixes of one number of steps as a table: a row for each start, a column for each rate."""

    steps: int
    rates: tuple[float, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]  # (start, a text for each rate)


MEANING = (
    "Held-out loss, in nats per token, by start and peak learning rate; in brackets before the first step. "
    "D: the dead-adapter check says that so few steps at such a rate cannot leave the start."
)


def tables(groups: Sequence[dict[str, Any]]) -> list[Grid]:
    """The grid of each number of steps at which prefixes of several starts and rates were trained."""
    prefixes = [group for group in groups if group["method"] == "prefix" and group["error"] is None]
    found = []
    for steps in sorted({group["steps"] for group in prefixes}):
        mine = [group for group in prefixes if group["steps"] == steps]
        starts = list(dict.fromkeys((group["init"], bool(group["reparam"])) for group in mine))
        rates = tuple(sorted({group["learning_rate"] for group in mine}))
        if len(starts) < 2 or len(rates) < 2:
            continue
        texts = {(group["init"], bool(group["reparam"]), group["learning_rate"]): loss_text(group) for group in mine}
        rows = tuple(
            (f"{init}{' + MLP' if network else ''}", tuple(texts.get((init, network, rate), "") for rate in rates))
            for init, network in starts
        )
        found.append(Grid(steps, rates, rows))
    return found


def loss_text(group: dict[str, Any]) -> str:
    """A trial's held-out loss, over its seeds, with where it began and whether it could leave."""
    spread = "" if group.get("dev_loss_sd") is None else f" ± {group['dev_loss_sd']:.3f}"
    began = "" if group.get("dev_loss_start") is None else f" ({group['dev_loss_start']:.2f})"
    dead = " D" if any("dead adapter" in flag for flag in group["flags"]) else ""
    return f"{group['dev_loss']:.3f}{spread}{began}{dead}"
