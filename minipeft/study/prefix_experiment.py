"""Why the paper's prefix-tuning did not train: init x learning rate x reparameterization, beside LoRA and prompts.

    trial               = one training run with one seed -> one cell of a study (presets.py)
    grid (part 1)       = init {N(0,1), normal, text} x learning rate {2e-4, 1e-3, 5e-3, 3e-2} x {no MLP, MLP},
                          beside LoRA at two learning rates and a text prompt at its own: 60 steps, held-out loss alone
    long runs (part 2)  = the paper's init, ours, LoRA and prompt: 300 steps, three seeds; the first seed also answers

A step sees a row of about 4 examples (200 tokens), so that 60 steps are minutes on one core. The row is longer by the
virtual tokens of a prefix or prompt: every method sees the same tokens in a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from minipeft.adapters import PrefixConfig
from minipeft.study.rows import Group, Results
from minipeft.study.table import name_groups, name_method, show_init
from minipeft.study.trials import Wanted

RATES = (2e-4, 1e-3, 5e-3, 3e-2)
WIDTH = 512  # of the reparameterization MLP, as in Li & Liang 2021
EXAMPLE_TOKENS = 55  # of a row, per example of a step: CoNaLa's mean is 47, and no row is quite full


@dataclass(frozen=True)
class Trial:
    """One training run: the method, its init, and its settings."""

    method: str
    learning_rate: float
    init: str | None = None  # of a prefix or prompt
    reparam: int | None = None
    steps: int = 60
    seed: int = 0
    examples: int = 4  # a step
    answers: bool = False  # the test questions

    @property
    def variant(self) -> str:
        """Name what differs from the other trials of its method."""
        parts = (self.init, "mlp" if self.reparam else None, f"{self.learning_rate:g}", f"{self.steps}")
        return "-".join(part for part in parts if part)

    def settings(self) -> dict[str, Any]:
        """The settings of its training run; warm-up, decay and clipping are those of the method's recipe."""
        virtual_tokens = PrefixConfig().length if self.init else 0
        fields: dict[str, Any] = {
            "learning_rate": self.learning_rate,
            "steps": self.steps,
            "length": EXAMPLE_TOKENS * self.examples + virtual_tokens,
        }
        return fields | ({"init": self.init, "reparam_width": self.reparam} if self.init else {})


OURS = (Trial("prefix", 5e-3, "text"), Trial("prefix", 3e-2, "text"), Trial("prefix", 1e-3, "text", WIDTH))
OTHERS = (Trial("lora", 1e-3), Trial("prompt", 3e-2, "text"))
PAPERS = Trial("prefix", 2e-4, "peft")  # the init of PEFT, at a learning rate that suits LoRA


def list_grid(steps: int = 60) -> list[Trial]:
    """Part 1: the 24 prefixes and three reference trials, the most informative first."""
    rest = [
        Trial("prefix", rate, init, width)
        for width in (None, WIDTH)
        for init in ("peft", "text", "normal")
        for rate in RATES
    ]
    trials = dict.fromkeys([PAPERS, *OURS, *OTHERS, Trial("lora", 3e-4), *rest])
    return [replace(trial, steps=steps) for trial in trials]


def list_long_runs(steps: int = 300, seeds: int = 3) -> list[Trial]:
    """Part 2, seed by seed."""
    kinds = (PAPERS, *OURS, *OTHERS)
    return [replace(trial, steps=steps, seed=seed) for seed in range(seeds) for trial in kinds]


def list_trials(wanted: Wanted) -> list[Trial]:
    """Both parts, with the caller's number of steps if given; of the long runs the first seed answers."""
    steps = {name: value for name, value in wanted.settings.items() if name == "steps"}
    long = [replace(trial, answers=trial.seed == 0) for trial in list_long_runs(seeds=wanted.seeds)]
    return [replace(trial, **steps) for trial in (*list_grid(), *long) if trial.method in wanted.methods]


@dataclass(frozen=True)
class Grid:
    """The prefixes of one number of steps: a row an init, a column a learning rate; and what to compare with."""

    steps: int
    rates: tuple[float, ...]
    rows: tuple[tuple[str, tuple[Group | None, ...]], ...]  # (init, a group for each learning rate)
    others: tuple[tuple[str, float], ...]  # (name, held-out loss): the untrained model, the best LoRA, the best prompt

    def texts(self) -> list[list[str]]:
        """The table as text, header row first."""
        head = ["init", *(f"{rate:g}" for rate in self.rates)]
        return [head, *([name, *(format_loss(g) if g else "" for g in found)] for name, found in self.rows)]


MEANING = (
    "Held-out loss, in nats per token, by init and peak learning rate; in brackets the loss before the first step. "
    "D: dead adapter: this learning rate and number of steps cannot move it away from its init."
)


def make_grids(groups: Sequence[Group]) -> list[Grid]:
    """One grid per number of steps at which prefixes with at least two inits were trained at several learning rates."""
    prefixes = [group for group in groups if group.method == "prefix" and group.error is None]
    found = []
    for steps in sorted({group.training.steps or 0 for group in prefixes}):
        mine = [group for group in prefixes if group.training.steps == steps]
        rates = tuple(sorted({group.training.learning_rate or 0.0 for group in mine}))
        at = {(show_init(group), group.training.learning_rate): group for group in mine}
        inits = dict.fromkeys(show_init(group) for group in mine)
        rows = tuple((name, tuple(at.get((name, rate)) for rate in rates)) for name in inits)
        if sum(sum(group is not None for group in row) > 1 for _, row in rows) > 1:
            found.append(Grid(steps, rates, rows, find_references(groups, steps)))
    return found


def find_several_seeds(results: Results) -> dict[int, list[tuple[str, str, Group]]]:
    """By number of steps, the groups of this experiment with several seeds, best first: (name, summary, group)."""
    found: dict[int, list[tuple[str, str, Group]]] = {}
    if results.preset != "prefix":
        return found
    named = zip(name_groups(results.groups), results.groups)
    several = [(name, group) for name, group in named if group.error is None and group.dev_loss_sd is not None]
    for name, group in sorted(several, key=lambda pair: pair[1].dev_loss):
        text = (
            f"{format_mean_loss(group)} over {len(group.seeds)} seeds, {group.training.stored or 0:,} parameters stored"
        )
        found.setdefault(group.training.steps or 0, []).append((name, text, group))
    return found


def format_mean_loss(group: Group) -> str:
    """The mean held-out loss ± its standard deviation over seeds."""
    return f"{group.dev_loss:.3f} ± {group.dev_loss_sd:.3f}"


def conclude(results: Results) -> list[str]:
    """The findings of the runs with several seeds, in sentences; none where no prefix is among them."""
    runs = find_several_seeds(results)
    longest = runs[max(runs)] if runs else []
    prefixes = [(name, group) for name, _, group in longest if group.method == "prefix"]  # best first
    if not prefixes:
        return []
    (name, best), (_, worst) = prefixes[0], prefixes[-1]
    steps = best.training.steps
    text = [f"The best prefix after {steps} steps is {name}: {format_mean_loss(best)} nats per held-out token."]
    for group in (group for _, _, group in longest if group.method == "lora"):
        gap = best.dev_loss - group.dev_loss
        times = (group.training.stored or 0) / (best.training.stored or 1)
        text.append(
            f"LoRA ends at {format_mean_loss(group)}: the prefix is {abs(gap):.3f} nats "
            f"{'above' if gap > 0 else 'below'} it and stores {times:.1f} times fewer parameters."
        )
    base = [g.training.dev_loss for g in results.groups if g.method == "zero-shot" and g.error is None]
    if base and base[0] is not None and worst.dev_loss > base[0]:
        text.append(
            f"A prefix with {worst.training.init!r} init at learning rate {worst.training.learning_rate:g} ends at "
            f"{worst.dev_loss:.3f}, worse than the untrained model's {base[0]:.3f}."
        )
    return text


def find_references(groups: Sequence[Group], steps: int) -> tuple[tuple[str, float], ...]:
    """The held-out loss of the untrained model, and the lowest of LoRA and of prompt tuning after as many steps."""
    found = []
    for method, at in (("zero-shot", 0), ("lora", steps), ("prompt", steps)):
        same = [g for g in groups if g.method == method and g.error is None and g.training.steps == at]
        losses = [g.training.dev_loss for g in same if g.training.dev_loss is not None]
        name = "untrained" if method == "zero-shot" else name_method(method)
        found += [(f"{name} {min(losses):.3f}", min(losses))] if losses else []
    return tuple(found)


def format_loss(group: Group) -> str:
    """The held-out loss over seeds, the loss before the first step, and D for a dead adapter."""
    spread = "" if group.dev_loss_sd is None else f" ± {group.dev_loss_sd:.3f}"
    before = "" if group.training.dev_loss_start is None else f" ({group.training.dev_loss_start:.2f})"
    dead = " D" if any("dead adapter" in flag for flag in group.flags) else ""
    return f"{group.dev_loss:.3f}{spread}{before}{dead}"
