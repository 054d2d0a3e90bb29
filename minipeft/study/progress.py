"""One progress bar for all cells of a study, with the time left; a cell's progress is the line count of its files.

work      = forward passes over a token x parameters: of training 2 (3 with the gradient of the weights) for each
            token of each step, of answering DECODING for each token of a question and its answer
time left = work left x seconds per unit of work so far, in which a cell counts FADE of the next;
            for a cell that runs, its own seconds count the more the further it is; divided by the number of workers
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from minipeft.errors import escape
from minipeft.study.cells import ANSWERS, ZERO_SHOT, Cell
from minipeft.study.drafts import Base

DECODING = 2.0  # cost of a decoded token over that of one in a forward pass of training: 1.7 to 2.7 on the demo model
FADE = 1 / 2  # recent cells weigh most: the load of the machine changes
QUESTION = 30  # approximate tokens of a question in its template


class Bar:
    """The progress bar. `bases`: the models by label; `finished`: names of the cells that are complete at the start."""

    def __init__(
        self,
        cells: Sequence[Cell],
        bases: Mapping[str, Base | None],
        out: Path,
        questions: int,
        finished: Collection[str],
        workers: int = 1,
    ):
        self.out, self.questions, self.lock = out, questions, threading.RLock()
        self.parts = {cell.name: estimate_work(cell, bases.get(cell.model), questions) for cell in cells}
        work = {name: sum(parts) for name, parts in self.parts.items()}
        self.forecast = Forecast(work, finished, workers)
        self.bar = tqdm(
            total=sum(work.values()),
            initial=sum(work[name] for name in finished),
            file=sys.stderr,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed} elapsed{postfix}",
            mininterval=0.5 if sys.stderr.isatty() else 15.0,  # seconds between drawings
        )

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def add(self, cells: Sequence[Cell], bases: Mapping[str, Base | None], finished: Collection[str]) -> None:
        """Add cells that were not expected at the start."""
        with self.lock:
            for cell in cells:
                if cell.name not in self.parts:
                    self.parts[cell.name] = estimate_work(cell, bases.get(cell.model), self.questions)
                    work = self.forecast.work[cell.name] = sum(self.parts[cell.name])
                    self.bar.total = (self.bar.total or 0) + work
                    if cell.name in finished:
                        self.move(self.forecast.finish(cell.name, time.monotonic()))

    def begin(self, cell: Cell) -> None:
        """Show which cell runs, the last one begun of several."""
        seed = f" seed {cell.seed}" if cell.seed else ""
        with self.lock:
            self.forecast.begin(cell.name, time.monotonic())
            others = len(self.forecast.running) - 1
            also = f" and {others} more" if others else ""
            self.bar.set_description_str(escape(f"{cell.model} {cell.method}{seed}{also}"), refresh=False)

    def show(self, cell: Cell) -> None:
        """Move to the cell's progress."""
        training, answering = self.parts[cell.name]
        trained, answered = self.read_progress(cell)
        share = (training * trained + answering * answered) / max(1.0, training + answering)
        with self.lock:
            self.move(self.forecast.advance(cell.name, share, time.monotonic()))

    def read_progress(self, cell: Cell) -> tuple[float, float]:
        """Read the progress of a cell's training and of its answers, each 0 to 1."""
        folder = self.out / "cells" / cell.name
        answers = max(count_lines(folder / f"{ANSWERS}.part") - 1, count_lines(folder / ANSWERS), 0)
        steps = max(0, count_lines(folder / "run" / "log.jsonl") - 1)  # the first line is of step 0
        trained = 1.0 if answers else min(1.0, steps / (cell.steps or 1))
        return trained, min(1.0, answers / self.questions)

    def finish(self, cell: Cell) -> None:
        """Count the cell as over, done or failed."""
        with self.lock:
            if cell.name in self.forecast.running:
                self.show(cell)
            self.move(self.forecast.finish(cell.name, time.monotonic()))

    def move(self, to: float) -> None:
        """Advance to an amount of work, never backwards, and show the estimated time left."""
        left = self.forecast.seconds_left(time.monotonic())
        self.bar.set_postfix_str("" if left is None else f"about {tqdm.format_interval(left)} left", refresh=False)
        self.bar.update(max(0.0, to - self.bar.n))


@dataclass
class Running:
    """A cell that runs: since when, the share of its work that is done, and the share that it was begun with."""

    work: float
    begun: float
    share: float = 0.0
    at_begin: float | None = None

    @property
    def new(self) -> float:
        """The work since it began or resumed."""
        return (self.share - (self.at_begin or 0.0)) * self.work


class Forecast:
    """Forecast the time of the remaining cells from those that ran; `work` is that of each cell."""

    def __init__(self, work: Mapping[str, float], finished: Collection[str], workers: int = 1):
        self.work, self.over, self.workers = dict(work), set(finished), workers
        self.measured, self.seconds = 0.0, 0.0  # work and time of the cells that ran, each counted FADE of the next
        self.running: dict[str, Running] = {}

    def begin(self, cell: str, now: float) -> None:
        """A cell begins. One that is resumed has progress already, which took no time now."""
        self.running[cell] = Running(self.work[cell], now)

    def advance(self, cell: str, share: float, now: float) -> float:
        """Record the share of the cell's work that is done; returns the work done by all cells.

        Its time counts from its first progress: loading a model says nothing about the speed.
        """
        run = self.running[cell]
        run.at_begin = share if run.at_begin is None else run.at_begin
        run.begun = now if share <= run.at_begin else run.begun
        run.share = max(share, run.share)
        return self.done()

    def finish(self, cell: str, now: float) -> float:
        """End the cell; returns the work done by all cells."""
        if cell in self.running:
            run = self.running.pop(cell)
            self.measured = FADE * (self.measured + run.new)
            self.seconds = FADE * (self.seconds + now - run.begun)
        self.over.add(cell)
        return self.done()

    def done(self) -> float:
        """The work done by all cells."""
        return sum(self.work[name] for name in self.over) + sum(run.share * run.work for run in self.running.values())

    def seconds_left(self, now: float) -> float | None:
        """The seconds until all cells are over; None before any work is measured."""
        moving = [run for run in self.running.values() if run.new]
        measured = self.measured + sum(run.new for run in moving)
        if measured <= 0:
            return None
        average = (self.seconds + sum(now - run.begun for run in moving)) / measured  # seconds per unit of work
        left = average * sum(w for name, w in self.work.items() if name not in self.over and name not in self.running)
        for run in self.running.values():
            own = (now - run.begun) / run.new if run.new else average
            left += (1 - run.share) * run.work * (run.share * own + (1 - run.share) * average)
        return left / min(self.workers, max(1, len(self.work) - len(self.over)))


def estimate_work(cell: Cell, base: Base | None, questions: int) -> tuple[float, float]:
    """Estimate the work of a cell's training and of its answers."""
    if cell.run is None or base is None:
        return 0.0, 0.0
    packing, settings = cell.run.packing, cell.run.train
    tokens = (cell.steps or 0) * settings.accumulate * packing.batch * (packing.length or min(1024, base.context))
    passes = settings.passes * (2 + cell.run.method.trains_base + settings.activation_checkpointing)
    training = 0.0 if cell.method == ZERO_SHOT else float(tokens * passes * base.parameters)
    new = QUESTION + cell.generate.max_new_tokens if cell.generate else 0
    return training, DECODING * questions * new * base.parameters


def count_lines(file: Path) -> int:
    """Count the lines of a file; 0 for a missing one, or one that its cell is just renaming."""
    try:
        return file.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0
