"""The rows of results.json, typed: Row (one cell), Group (the cells that differ only by seed) and Results (all).

    Row = cell + Training + Scores + comparison with the untrained model + flags     (or the error that ended the cell)

In JSON a row is one flat object. A cell's own result.json also holds its BLEU counts by question, so that intervals
over several cells are computed without tokenizing the answers again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from minipeft.errors import InputError, check_value, resolve_hints
from minipeft.metrics.bootstrap import Interval
from minipeft.metrics.scores import Scores

FORMAT = 1


def averaged() -> Any:
    """Declare a field whose value in a group is the mean over seeds; of the other fields all seeds have the same."""
    return field(default=None, metadata={"averaged": True})


@dataclass(frozen=True)
class Training:
    """How a cell was trained, and its cost; None where it does not apply, as for baselines."""

    recipe: str | None = None
    init: str | None = None  # of a prefix or prompt
    reparam: int | None = None  # width of its reparameterization MLP
    learning_rate: float | None = None  # peak
    steps: int | None = None
    trainable: int | None = None  # parameters
    trainable_percent: float | None = None
    stored: int | None = None  # parameters on disk; the reparameterization MLP is not among them
    train_seconds: float | None = averaged()  # of training alone
    tokens_per_second: float | None = averaged()
    peak_memory_bytes: float | None = averaged()  # of the process, or on the GPU
    dev_loss: float | None = averaged()  # held-out loss
    dev_loss_start: float | None = averaged()  # before the first step

    @staticmethod
    def mean(runs: Sequence[Training]) -> Training:
        """Average the training of several seeds."""
        means: dict[str, Any] = {}
        for f in fields(Training):
            values = [value for run in runs if (value := getattr(run, f.name)) is not None]
            if f.metadata.get("averaged") and values:
                means[f.name] = float(np.mean(values))
        return replace(runs[0], **means)


@dataclass(frozen=True)
class Row:
    """One cell. Without `scores` it gave no answers; with `error` it failed."""

    cell: str
    model: str  # "" for a baseline
    method: str
    seed: int = 0
    training: Training = Training()
    loss: float | None = None  # of the last step
    resumed_at: int | None = None  # the step that the last process began at
    adapter_movement: Mapping[str, Any] | None = None
    scores: Scores | None = None
    difference: Interval | None = None  # BLEU difference to the untrained model on the same questions
    flags: tuple[str, ...] = ()
    error: str | None = None
    paper: Mapping[str, float] | None = None  # what the paper reports
    variant: str = ""  # what differs from the other cells of its method

    def as_json(self, *, counts: bool = False) -> dict[str, Any]:
        """The row as one flat object; `counts`: with the BLEU counts by question."""
        own = ("cell", "model", "method", "seed")
        rest = ("loss", "resumed_at", "adapter_movement", "variant")
        row = {name: getattr(self, name) for name in own} | vars(self.training)
        row |= {name: getattr(self, name) for name in rest} | list_verdicts(self)
        if counts and self.scores is not None:
            row["bleu_counts"] = [run.tolist() for run in self.scores.runs]
        return row

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Row:
        """Read the row in a cell's result.json: trained and scored, not yet compared.

        Raises:
            InputError: a field is missing or has the wrong type.
        """
        own = ("cell", "model", "method", "seed", "loss", "resumed_at", "adapter_movement")
        row = Row(**read_fields(Row, data, own))
        training = Training(**read_fields(Training, data, [f.name for f in fields(Training)]))
        return replace(row, training=training, scores=Scores.from_json(data) if "bleu" in data else None)


@dataclass(frozen=True)
class Group:
    """Cells that differ only by seed: means, spreads, and one interval for the mean BLEU."""

    model: str
    method: str
    seeds: tuple[int, ...] = (0,)
    cells: tuple[str, ...] = ()
    training: Training = Training()
    scores: Scores | None = None
    bleu_sd: float | None = None  # over seeds
    dev_loss_sd: float | None = None
    difference: Interval | None = None
    flags: tuple[str, ...] = ()
    error: str | None = None  # where every seed failed
    paper: Mapping[str, float] | None = None
    reference: str = ""  # name of the baseline or untrained model with the highest BLEU
    effect: Interval | None = None  # BLEU difference to the reference, paired by question
    behind: Interval | None = None  # BLEU difference to the best tuned group (None for that group)
    label: str = ""  # its name in tables, where it is not the method's

    @property
    def is_tuned(self) -> bool:
        return bool(self.training.trainable)

    @property
    def bleu(self) -> float | None:
        return None if self.scores is None else self.scores["bleu"]

    @property
    def dev_loss(self) -> float:
        """The held-out loss of a group that has one."""
        assert self.training.dev_loss is not None
        return self.training.dev_loss

    def as_json(self) -> dict[str, Any]:
        """The group as one flat object."""
        own = {"model": self.model, "method": self.method, "label": self.label, "seeds": list(self.seeds),
               "cells": list(self.cells)}  # fmt: skip
        spread = {"bleu_sd": self.bleu_sd, "dev_loss_sd": self.dev_loss_sd}
        effects = {"reference": self.reference, "effect": as_object(self.effect), "behind": as_object(self.behind)}
        return own | vars(self.training) | spread | list_verdicts(self) | effects


@dataclass(frozen=True)
class Data:
    """The test set, and the sha256 of the data files."""

    source: str
    pairs: int
    questions: int
    train_sha256: str
    test_sha256: str


@dataclass(frozen=True)
class Results:
    """A whole study, as results.json holds it. Shares and BLEU are 0..1."""

    command: str
    preset: str
    data: Data
    environment: Mapping[str, str | int | None]
    cells: tuple[Row, ...]
    groups: tuple[Group, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "command": self.command,
            "preset": self.preset,
            "data": vars(self.data),
            "environment": dict(self.environment),
            "cells": [row.as_json() for row in self.cells],
            "groups": [group.as_json() for group in self.groups],
        }


def list_verdicts(row: Row | Group) -> dict[str, Any]:
    """The fields of scores, difference and flags; a row without answers has no scores."""
    scores = {"questions": 0, "bleu_interval": None} if row.scores is None else row.scores.as_dict()
    rest = {"flags": list(row.flags), "error": row.error, "paper": row.paper}
    return {**scores, "difference": as_object(row.difference), **rest}


def as_object(found: Interval | None) -> dict[str, float | None] | None:
    """Convert a difference to a JSON object."""
    return (
        None
        if found is None
        else {"value": found.value, "low": found.low, "high": found.high, "p_value": found.p_value}
    )


def read_fields(kind: type, data: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Read the named fields of a dataclass from a JSON object and check their types.

    Raises:
        InputError: a field is missing or of another type.
    """
    hints = resolve_hints(kind)
    for name in names:
        if name not in data:
            raise InputError(f"field {name!r} is missing")
        check_value(data[name], hints[name], {}, name)
    return {name: data[name] for name in names}
