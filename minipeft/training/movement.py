"""How far training moved each tensor, compared with how far it could: the check that detects a dead adapter.

AdamW moves a weight by about the learning rate per step, whatever the gradient's size, so training has a budget:

    budget = sum of the learning rates of its steps        |w_end - w_init| <~ budget

A tensor whose init has a standard deviation above ten budgets ends close to its init. HF PEFT initializes a prefix as
N(0, 1): at LoRA's 2e-4 and 60 steps the budget is 0.006, and the trained prefix is still its initial noise. The report
warns of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minipeft.errors import InputError
from minipeft.training.loop import TrainConfig, learning_rate_at, trained

STUCK = 0.1  # training cannot leave an init with a standard deviation above budget / STUCK
FEW_STEPS = 200  # optimizer steps


@dataclass(frozen=True)
class TensorMovement:
    """One trained tensor: mean and largest |end - init|, and the standard deviation of its init."""

    name: str
    count: int
    mean: float
    largest: float
    start_std: float


@dataclass(frozen=True)
class MovementReport:
    """How far training moved its tensors, with warnings. `str(report)` is for people, `as_json()` for files."""

    steps: int
    budget: float  # sum of the learning rates
    whole: bool  # full tuning: the init is a checkpoint, so its standard deviation is no criterion
    tensors: tuple[TensorMovement, ...]

    @property
    def mean(self) -> float:
        return sum(t.mean * t.count for t in self.tensors) / sum(t.count for t in self.tensors)

    @property
    def largest(self) -> float:
        return max(t.largest for t in self.tensors)

    @property
    def start_std(self) -> float:
        """The smallest standard deviation of an init: a budget too small for this tensor is too small for all."""
        return min(t.start_std for t in self.tensors)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Reasons to believe that training had no effect; empty if there are none."""
        found = []
        still = [t.name for t in self.tensors if t.largest == 0]
        if still:
            found.append(f"{len(still)} of {len(self.tensors)} trained tensors did not move, the first is {still[0]!r}")
        if not self.whole and self.budget < STUCK * self.start_std:
            found.append(
                f"dead adapter: the learning rates of all {self.steps} steps add up to {self.budget:.3g}, under a "
                f"tenth of the spread of the adapter's init (standard deviation {self.start_std:.3g}): it is still at "
                "its init. Raise the learning rate or the steps, or initialize it from text"
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
        head = f"{'tensor':<56} {'mean':>9} {'largest':>9} {'init std':>9}"
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
    """A copy of the tensors before training; full tuning makes none, and `measure` takes the base instead."""

    tensors: Mapping[str, Tensor] | None
    whole: bool

    @staticmethod
    def start(model: nn.Module) -> Movement:
        """Copy the trainable parameters; call it after add_adapter and before the first step or a restored state."""
        parameters = trained(model)
        if not parameters:
            raise InputError("nothing is trainable", where="movement", hint="add_adapter(model, ...) first")
        whole = all(p.requires_grad for p in model.parameters())
        return Movement(None if whole else {name: p.detach().clone() for name, p in parameters.items()}, whole)

    @torch.no_grad()
    def measure(
        self, model: nn.Module, config: TrainConfig, base: Mapping[str, Tensor] | None = None
    ) -> MovementReport:
        """Compare the model with its init after `config.steps` steps. `base`: the init, if no copy was kept.

        Raises:
            InputError: there is no init, or a trained tensor is missing from it or has another shape.
        """
        assert config.steps is not None  # `train` refuses it
        init = self.tensors if base is None else base
        if init is None:
            hint = "measure(model, config, base=load_model(source).state_dict())"
            raise InputError(
                "no copy of the init was kept, because every parameter is trained", where="base", hint=hint
            )
        moved = []
        for name, p in trained(model).items():
            if name not in init or init[name].shape != p.shape:
                held = f"shape {list(init[name].shape)}" if name in init else "nothing"
                raise InputError(f"the init holds {held} for it, the model {list(p.shape)}", where=name)
            first = init[name].to(p.device, torch.float32)
            change = (p.float() - first).abs()
            spread = first.std(correction=0).item()
            moved.append(TensorMovement(name, p.numel(), change.mean().item(), change.max().item(), spread))
        budget = sum(learning_rate_at(step, config) for step in range(config.steps))
        return MovementReport(config.steps, budget, self.whole, tuple(moved))
