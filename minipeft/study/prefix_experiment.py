"""Why the paper's prefix-tuning did not train: start x learning rate x network, against LoRA and prompt tuning.

    trial               = one training run on one seed -> one cell of a study (presets.py)
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
from minipeft.study.table import names

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
        virtual_tokens = PrefixConfig().length if self.init else 0
        fields: dict[str, Any] = {
            "method": self.method,
            "learning_rate": self.learning_rate,
            "steps": self.steps,
            "seed": self.seed,
            "length": EXAMPLE_TOKENS * self.examples + virtual_tokens,
        }
        return fields | ({"init": self.init, "reparam": self.reparam} if self.init else {})


OURS = (Trial("prefix", 5e-3, "text"), Trial("prefix", 3e-2, "text"), Trial("prefix", 1e-3, "text", WIDTH))
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
    """The prefixes of one number of steps: a row for each start, a column for each rate; and what they compare with."""

    steps: int
    rates: tuple[float, ...]
    rows: tuple[tuple[str, tuple[dict[str, Any] | None, ...]], ...]  # (start, a group for each rate)
    others: tuple[tuple[str, float], ...]  # (name, held-out loss): the untrained model, the best LoRA, the best prompt

    def texts(self) -> list[list[str]]:
        """The table, its head first."""
        head = ["start", *(f"{rate:g}" for rate in self.rates)]
        return [head, *([start, *(loss_text(g) if g else "" for g in found)] for start, found in self.rows)]


MEANING = (
    "Held-out loss, in nats per token, by start and peak learning rate; in brackets before the first step. "
    "D: the dead-adapter check says that so few steps at such a rate cannot leave the start."
)


def tables(groups: Sequence[dict[str, Any]]) -> list[Grid]:
    """The grid of each number of steps at which prefixes of two starts or more were trained at several rates."""
    prefixes = [group for group in groups if group["method"] == "prefix" and group["error"] is None]
    found = []
    for steps in sorted({group["steps"] for group in prefixes}):
        mine = [group for group in prefixes if group["steps"] == steps]
        starts = list(dict.fromkeys((group["init"], bool(group["reparam"])) for group in mine))
        rates = tuple(sorted({group["learning_rate"] for group in mine}))
        at = {(group["init"], bool(group["reparam"]), group["learning_rate"]): group for group in mine}
        rows = tuple(
            (f"{init}{' + MLP' if network else ''}", tuple(at.get((init, network, rate)) for rate in rates))
            for init, network in starts
        )
        if sum(sum(group is not None for group in row) > 1 for _, row in rows) > 1:
            found.append(Grid(steps, rates, rows, compared(groups, steps)))
    return found


def several_seeds(results: dict[str, Any]) -> dict[int, list[tuple[str, str, dict[str, Any]]]]:
    """Number of steps -> (name, its held-out loss and what it stores in words, the group) of each group of this
    experiment with several seeds, best first."""
    found: dict[int, list[tuple[str, str, dict[str, Any]]]] = {}
    if results["preset"] != "prefix":
        return found
    groups = [(name, group) for name, group in zip(names(results["groups"]), results["groups"])]
    groups = [
        (name, group) for name, group in groups if group["error"] is None and group.get("dev_loss_sd") is not None
    ]
    for name, group in sorted(groups, key=lambda pair: pair[1]["dev_loss"]):
        loss, seeds = f"{group['dev_loss']:.3f} ± {group['dev_loss_sd']:.3f}", len(group["seeds"])
        said = f"{loss} in {seeds} seeds, {group['stored']:,} numbers stored"
        found.setdefault(group["steps"], []).append((name, said, group))
    return found


def conclusion(results: dict[str, Any]) -> list[str]:
    """What the runs with several seeds say, in sentences; none where there are none, or no prefix among them."""
    runs = several_seeds(results)
    longest = runs[max(runs)] if runs else []
    prefixes = [(name, group) for name, _, group in longest if group["method"] == "prefix"]  # best first
    if not prefixes:
        return []
    said = []
    (name, best), (_, worst) = prefixes[0], prefixes[-1]
    loss = f"{best['dev_loss']:.3f} ± {best['dev_loss_sd']:.3f}"
    said.append(f"Best of the prefixes after {best['steps']} steps is {name}: {loss} nats per held-out token.")
    for group in (group for _, _, group in longest if group["method"] == "lora"):
        apart, times = best["dev_loss"] - group["dev_loss"], group["stored"] / best["stored"]
        said.append(
            f"LoRA ends at {group['dev_loss']:.3f} ± {group['dev_loss_sd']:.3f}: the prefix is {abs(apart):.3f} "
            f"{'above' if apart > 0 else 'below'} it, with {times:.1f} times fewer numbers stored."
        )
    base = [g["dev_loss"] for g in results["groups"] if g["method"] == "zero-shot" and g["error"] is None]
    if base and worst["dev_loss"] > base[0]:
        said.append(
            f"A prefix that starts as {worst['init']!r} and learns at {worst['learning_rate']:g} ends at "
            f"{worst['dev_loss']:.3f}, worse than the untrained model's {base[0]:.3f}."
        )
    return said


def compared(groups: Sequence[dict[str, Any]], steps: int) -> tuple[tuple[str, float], ...]:
    """The untrained model's held-out loss, and the least of LoRA and of prompt-tuning after as many steps."""
    found = []
    for method, name, at in (("zero-shot", "untrained", 0), ("lora", "LoRA", steps), ("prompt", "prompt", steps)):
        losses = [g["dev_loss"] for g in groups if g["method"] == method and g["error"] is None and g["steps"] == at]
        found += [(f"{name} {min(losses):.3f}", min(losses))] if losses else []
    return tuple(found)


def loss_text(group: dict[str, Any]) -> str:
    """A trial's held-out loss, over its seeds, with where it began and whether it could leave."""
    spread = "" if group.get("dev_loss_sd") is None else f" ± {group['dev_loss_sd']:.3f}"
    began = "" if group.get("dev_loss_start") is None else f" ({group['dev_loss_start']:.2f})"
    dead = " D" if any("dead adapter" in flag for flag in group["flags"]) else ""
    return f"{group['dev_loss']:.3f}{spread}{began}{dead}"
