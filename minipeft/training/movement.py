"""How far training moved each tensor, against how far it could: the check that tells a dead adapter from a trained one.

AdamW moves a number by about the learning rate in a step, whatever the gradient's size, so that a run has a budget:

    budget = sum of the rates of its steps = learning_rate * sum(schedule)        |w_end - w_start| <~ budget

A tensor whose start is spread wider than ten budgets ends as it began. HF PEFT's prefix starts as N(0, 1): at LoRA's
2e-4 and 60 steps the budget is 0.006, and the trained prefix is the noise that it started from. One line says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minipeft.errors import InputError
from minipeft.training.loop import TrainConfig, learning_rate_at, trained

STUCK = 0.1  # a start spread over more than 1 / STUCK budgets cannot be left
FEW_STEPS = 200  # optimizer steps


@dataclass(frozen=True)
class TensorMovement:
    """One trained tensor: mean and largest |end - start|, and the standard deviation of its start."""

    name: str
    count: int
    mean: float
    largest: float
    start_std: float


@dataclass(frozen=True)
class MovementReport:
    """How far a run moved what it trained, and what that says. `str(report)` is for people, `as_json()` for files."""

    steps: int
    budget: float  # learning_rate * sum(schedule)
    whole: bool  # every parameter was trained: the start is a checkpoint, and its spread says nothing
    tensors: tuple[TensorMovement, ...]

    @property
    def mean(self) -> float:
        return sum(t.mean * t.count for t in self.tensors) / sum(t.count for t in self.tensors)

    @property
    def largest(self) -> float:
        return max(t.largest for t in self.tensors)

    @property
    def start_std(self) -> float:
        """The narrowest start: if the budget is too small for this tensor, it is too small for all."""
        return min(t.start_std for t in self.tensors)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What makes it doubtful that this run trained anything; empty where nothing does."""
        found = []
        still = [t.name for t in self.tensors if t.largest == 0]
        if still:
            found.append(f"{len(still)} of {len(self.tensors)} trained tensors did not move, the first is {still[0]!r}")
        if not self.whole and self.budget < STUCK * self.start_std:
            found.append(
                f"dead adapter: the learning rates of all {self.steps} steps add up to {self.budget:.3g}, under a "
                f"tenth of the spread that the adapter started with (standard deviation {self.start_std:.3g}): it is "
                "still its start. Raise the learning rate or the steps, or start from text"
            )
        if self.steps < FEW_STEPS:
            found.append(f"{self.steps} optimizer steps are few (under {FEW_STEPS}): take smaller batches or more data")
        return tuple(found)

    def as_json(self) -> dict[str, object]:
        """The totals and the warnings, as log.jsonl and results.json hold them."""
        return {
            "steps": self.steps,
            "budget": self.budget,
            "mean": self.mean,
            "largest": self.largest,
            "largest_at": max(self.tensors, key=lambda t: t.largest).name,
            "start_std": self.start_std,
            "tensors": len(self.tensors),
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        head = f"{'tensor':<56} {'mean':>9} {'largest':>9} {'start std':>9}"
        shown = sorted(self.tensors, key=lambda t: -t.largest)[:5]
        lines = [f"{t.name:<56} {t.mean:>9.3g} {t.largest:>9.3g} {t.start_std:>9.3g}" for t in shown]
        total = (
            f"{len(self.tensors)} tensors, mean {self.mean:.3g}, largest {self.largest:.3g}, budget {self.budget:.3g}"
        )
        return "\n".join(
            [f"movement in {self.steps} steps: {total}", head, *lines, *(f"warning: {w}" for w in self.warnings)]
        )


@dataclass(frozen=True)
class Movement:
    """The start of a run. Of a run that trains every parameter no copy is kept: `measure` is given the base again."""

    tensors: Mapping[str, Tensor] | None
    whole: bool

    @staticmethod
    def start(model: nn.Module) -> Movement:
        """Remember what will be trained: after add_adapter, before the first step or the state of a resumed run."""
        parameters = trained(model)
        if not parameters:
            raise InputError("nothing is trainable", where="movement", hint="add_adapter(model, ...) first")
        whole = all(p.requires_grad for p in model.parameters())
        return Movement(None if whole else {name: p.detach().clone() for name, p in parameters.items()}, whole)

    @torch.no_grad()
    def measure(
        self, model: nn.Module, config: TrainConfig, base: Mapping[str, Tensor] | None = None
    ) -> MovementReport:
        """Compare the model with the start, after `config.steps` steps. `base`: the start, where none was kept.

        Raises:
            InputError: no start, or it lacks a trained tensor or has another shape of it.
        """
        start = self.tensors if base is None else base
        if start is None:
            hint = "measure(model, config, base=load_model(source).state_dict())"
            raise InputError(
                "no copy of the start was kept, because every parameter is trained", where="base", hint=hint
            )
        moved = []
        for name, p in trained(model).items():
            if name not in start or start[name].shape != p.shape:
                held = f"shape {list(start[name].shape)}" if name in start else "nothing"
                raise InputError(f"the start holds {held} for it, the model {list(p.shape)}", where=name)
            first = start[name].to(p.device, torch.float32)
            change = (p.float() - first).abs()
            spread = first.std(correction=0).item()
            moved.append(TensorMovement(name, p.numel(), change.mean().item(), change.max().item(), spread))
        budget = sum(learning_rate_at(step, config) for step in range(config.steps))
        return MovementReport(config.steps, budget, self.whole, tuple(moved))
