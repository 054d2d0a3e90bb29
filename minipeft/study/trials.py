"""What an experiment of a preset is made of: trials, training runs that differ in method, settings and seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Losses = Mapping[tuple[str, str], float | None]  # (method, variant) -> held-out loss; None: training failed


class Trial(Protocol):
    """One training run of an experiment; it becomes a cell of each model."""

    @property
    def method(self) -> str: ...
    @property
    def variant(self) -> str: ...  # what differs from the other trials of its method, unique
    @property
    def seed(self) -> int: ...
    @property
    def answers(self) -> bool: ...  # whether it answers the test questions; else its held-out loss is its result

    def settings(self) -> dict[str, Any]: ...  # its own, by the names of run_config


@dataclass(frozen=True)
class Wanted:
    """What an experiment on one model is made from.

    `start`: the learning rate of a method's recipe. `losses`: of the cells that are over; None: nothing is known yet,
    and the experiment lists as many trials as it expects, for an estimate of the whole.
    """

    methods: Sequence[str]
    seeds: int
    settings: Mapping[str, Any]  # of the caller
    start: Callable[[str], float]
    losses: Losses | None = None
