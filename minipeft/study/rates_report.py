"""What the rates experiment found: its searches and each contender's difference to LoRA, as sentences and tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minipeft.metrics.bootstrap import Interval, bootstrap_bleu
from minipeft.study.rates_experiment import LABELS, find_rung, get_rate
from minipeft.study.rows import Results, as_object
from minipeft.study.statistics import compute_t_interval, find_detectable
from minipeft.study.table import name_method, show_difference

RELEVANT = 0.02  # a BLEU difference, of 0 to 1, that is asked about
SEARCHED = (
    "Held-out loss after training, in nats per token, by peak learning rate; one seed. *: the chosen one, with a "
    "higher loss on both sides, or (end) where the search stopped at its limit."
)
COMPARED = (
    "Each at its own best learning rate. BLEU: paired by question, 95 % interval over questions and seeds. Detectable: "
    "the difference that such a study finds in 4 of 5 repetitions. Held-out loss: nats per token, paired by seed, 95 % "
    "interval over seeds."
)


@dataclass(frozen=True)
class Search:
    """The search of one contender on one model: held-out loss by learning rate, None where training failed."""

    model: str
    name: str
    losses: Mapping[float, float | None]

    @property
    def known(self) -> dict[float, float]:
        return {rate: loss for rate, loss in self.losses.items() if loss is not None and not math.isnan(loss)}

    @property
    def best(self) -> float | None:
        """The learning rate with the lowest held-out loss."""
        return min(self.known, key=lambda rate: (self.known[rate], rate), default=None)

    @property
    def is_open(self) -> bool:
        """Whether the best is the smallest or largest that was tried."""
        return self.best in (min(self.losses), max(self.losses))

    def show(self, rate: float) -> str:
        """Format the loss at a learning rate, with * if it is the best."""
        if rate not in self.known:
            return "failed"
        mark = "" if rate != self.best else " * (end)" if self.is_open else " *"
        return f"{self.known[rate]:.3f}{mark}"


@dataclass(frozen=True)
class Difference:
    """A contender minus LoRA, each at its own learning rate."""

    model: str
    name: str
    learning_rate: float
    bleu: Interval | None  # over questions and seeds
    detectable: float | None  # BLEU difference that such a study finds in 4 of 5 repetitions
    loss: tuple[float, float, float] | None  # of held-out losses, paired by seed, with its 95 % interval over seeds

    @property
    def verdict(self) -> str:
        """Whether BLEU differs by more than RELEVANT."""
        if self.bleu is None:
            return ""
        if self.bleu.low > RELEVANT or self.bleu.high < -RELEVANT:
            return "yes"
        return "no" if self.bleu.low > -RELEVANT and self.bleu.high < RELEVANT else "not decided"


def find_searches(results: Results) -> list[Search]:
    """The searches among the cells of a study, in their order."""
    found: dict[tuple[str, str], dict[float, float | None]] = {}
    for row in results.cells:
        name, sign, rate = row.variant.rpartition("@")
        if sign and results.preset == "rates":
            key = row.model, LABELS.get(name or row.method) or name_method(row.method)
            found.setdefault(key, {})[float(rate)] = row.training.dev_loss
    return [Search(*key, dict(sorted(losses.items()))) for key, losses in found.items()]


def find_differences(results: Results) -> list[Difference]:
    """Each tuned group's difference to LoRA on the same model, in their order."""
    if results.preset != "rates":
        return []
    losses = {row.cell: row.training.dev_loss for row in results.cells}
    found = []
    for group, reference in ((g, r) for r in results.groups for g in results.groups if g.model == r.model):
        if reference.method != "lora" or reference.label or group is reference or not group.is_tuned:
            continue
        bleu = None
        if group.scores is not None and reference.scores is not None:
            bleu = bootstrap_bleu(group.scores.runs, reference.scores.runs, draw_runs=True)
        pairs = [(losses.get(one), losses.get(other)) for one, other in zip(group.cells, reference.cells)]
        apart = [one - other for one, other in pairs if one is not None and other is not None]
        name = group.label or name_method(group.method)
        rate, least = group.training.learning_rate or 0.0, None if bleu is None else find_detectable(bleu)
        found.append(Difference(group.model, name, rate, bleu, least, compute_t_interval(apart)))
    return found


def conclude(results: Results) -> list[str]:
    """The findings in sentences: the chosen learning rates, and what differs from LoRA."""
    searches = {(one.model, one.name): one for one in find_searches(results)}
    text = []
    for (model, name), lora in searches.items():
        full = searches.get((model, "full"))
        if name == "LoRA" and full is not None and lora.best and full.best:
            ten = get_rate(find_rung(full.best) + 2)
            text.append(f"The best learning rate of LoRA is {lora.best:g}, of full tuning {full.best:g}")
            if lora.known.get(ten) is not None and ten != lora.best:
                text[-1] += f"; at ten times the latter LoRA ends at {lora.known[ten]:.3f}, at its best"
                text[-1] += f" at {lora.known[lora.best]:.3f} nats per held-out token"
            text[-1] += "."
    differing = find_differences(results)
    for verdict, said in (("yes", "Differ"), ("no", "Do not differ"), ("not decided", "Undecided whether they differ")):
        if names := [one.name for one in differing if one.verdict == verdict]:
            text.append(f"{said} from LoRA by more than {100 * RELEVANT:g} BLEU: {', '.join(names)}.")
    if least := [one.detectable for one in differing if one.detectable is not None]:
        ends = " to ".join(f"{100 * end:.1f}" for end in sorted({min(least), max(least)}))
        text.append(f"Such a study finds a difference of {ends} BLEU in 4 of 5 repetitions.")
    return text


def draw_searches(results: Results) -> list[list[str]]:
    """The searches as a table, header first; the chosen learning rate's loss is marked with *."""
    searches = find_searches(results)
    rates = sorted({rate for one in searches for rate in one.losses})
    several = len({one.model for one in searches}) > 1
    rows = [["", *(f"{rate:g}" for rate in rates)]]
    for one in searches:
        name = f"{one.model} {one.name}" if several else one.name
        rows.append([name, *(one.show(rate) if rate in one.losses else "" for rate in rates)])
    return rows if searches else []


def draw_differences(results: Results) -> list[list[str]]:
    """The differences as a table, header first."""
    found = find_differences(results)
    several = len({one.model for one in found}) > 1
    head = ["minus LoRA", "learning rate", "BLEU", "detectable", f"more than {100 * RELEVANT:g}?", "held-out loss"]
    rows = [
        [
            f"{one.model} {one.name}" if several else one.name,
            f"{one.learning_rate:g}",
            show_difference(one.bleu),
            "" if one.detectable is None else f"{100 * one.detectable:.1f}",
            one.verdict,
            "" if one.loss is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*one.loss),
        ]
        for one in found
    ]
    return [head, *rows] if rows else []


def as_json(results: Results) -> dict[str, Any]:
    """What results.json holds of this experiment, beside what every study has; nothing for another preset."""
    if results.preset != "rates":
        return {}
    searches = [
        {"model": one.model, "name": one.name, "best": one.best, "losses": {f"{r:g}": v for r, v in one.losses.items()}}
        for one in find_searches(results)
    ]
    differences = [
        {**vars(one), "bleu": as_object(one.bleu), "verdict": one.verdict} for one in find_differences(results)
    ]
    return {"searches": searches, "differences": differences}


def list_tables(results: Results) -> list[tuple[str, str, list[list[str]]]]:
    """The tables of this experiment: title, meaning, and rows, header first; none for another preset."""
    tables = [
        ("Differences to LoRA", COMPARED, draw_differences(results)),
        ("Learning rates", SEARCHED, draw_searches(results)),
    ]
    return [table for table in tables if table[2]]
