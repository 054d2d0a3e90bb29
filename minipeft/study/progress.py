"""One progress bar for all cells of a study, with the time left; a cell's progress is the line count of its files.

work      = forward passes over a token x parameters: of training 2 (3 with the gradient of the weights) for each
            token of each step, of answering DECODING for each token of a question and its answer
time left = work left x seconds per unit of work so far, in which a cell counts FADE of the next;
            for the cell that runs, its own seconds count the more the further it is
"""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from minipeft.errors import escape
from minipeft.study.cells import ANSWERS, ZERO_SHOT, Cell
from minipeft.study.presets import Base

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
    ):
        self.out, self.questions = out, questions
        self.parts = {cell.name: estimate_work(cell, bases.get(cell.model), questions) for cell in cells}
        work = {name: sum(parts) for name, parts in self.parts.items()}
        self.forecast = Forecast(work, finished)
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

    def begin(self, cell: Cell) -> None:
        """Show which cell runs."""
        seed = f" seed {cell.seed}" if cell.seed else ""
        self.bar.set_description_str(escape(f"{cell.model} {cell.method}{seed}"), refresh=False)
        self.forecast.begin(cell.name, time.monotonic())

    def show(self, cell: Cell) -> None:
        """Move to the cell's progress."""
        training, answering = self.parts[cell.name]
        trained, answered = self.read_progress(cell)
        share = (training * trained + answering * answered) / max(1.0, training + answering)
        self.move(self.forecast.advance(cell.name, share, time.monotonic()))

    def read_progress(self, cell: Cell) -> tuple[float, float]:
        """Read the progress of a cell's training and of its answers, each 0 to 1."""
        folder = self.out / "cells" / cell.name
        answers = max(count_lines(folder / f"{ANSWERS}.part") - 1, count_lines(folder / ANSWERS), 0)
        steps = max(0, count_lines(folder / "run" / "log.jsonl") - 1)  # the first line is of step 0
        trained = 1.0 if answers else min(1.0, steps / (cell.steps or 1))
        return trained, min(1.0, answers / self.questions)

    def finish(self, cell: Cell) -> None:
        """Count the cell as ended, complete or failed."""
        if cell.name == self.forecast.cell:
            self.show(cell)
        self.move(self.forecast.finish(cell.name, time.monotonic()))

    def move(self, to: float) -> None:
        """Advance to an amount of work, never backwards, and show the estimated time left."""
        left = self.forecast.seconds_left(time.monotonic())
        self.bar.set_postfix_str("" if left is None else f"about {tqdm.format_interval(left)} left", refresh=False)
        self.bar.update(max(0.0, to - self.bar.n))


class Forecast:
    """Forecast the time of the remaining cells from those that ran; `work` is that of each cell."""

    def __init__(self, work: Mapping[str, float], finished: Collection[str]):
        self.work, self.over = work, set(finished)
        self.measured, self.seconds = 0.0, 0.0  # work and time of the cells that ran, each counted FADE of the next
        self.cell, self.begun = "", 0.0  # the cell that runs, and since when
        self.share = 0.0  # of its work, done
        self.at_begin: float | None = None  # the share that it was begun with

    def begin(self, cell: str, now: float) -> None:
        """Begin a cell; the progress of a resumed one is not timed."""
        self.cell, self.begun, self.share, self.at_begin = cell, now, 0.0, None

    def advance(self, cell: str, share: float, now: float) -> float:
        """Record the share of the cell's work that is done; returns the work done by all cells.

        Its time counts from its first progress: loading a model says nothing about the speed.
        """
        self.at_begin = share if self.at_begin is None else self.at_begin
        self.begun = now if share <= self.at_begin else self.begun
        self.share = max(share, self.share)
        return self.done() + share * self.work[cell]

    def finish(self, cell: str, now: float) -> float:
        """End the cell; returns the work done by all cells."""
        if cell == self.cell:
            self.measured = FADE * (self.measured + self.new_work())
            self.seconds = FADE * (self.seconds + now - self.begun)
            self.cell, self.share, self.at_begin = "", 0.0, None
        self.over.add(cell)
        return self.done()

    def done(self) -> float:
        """The work of the ended cells."""
        return sum(self.work[name] for name in self.over)

    def new_work(self) -> float:
        """The work of the running cell since it began or resumed."""
        return (self.share - (self.at_begin or 0.0)) * self.work[self.cell] if self.cell else 0.0

    def seconds_left(self, now: float) -> float | None:
        """Estimate the seconds until all cells end; None before any work is measured."""
        new, running = self.new_work(), now - self.begun if self.cell else 0.0
        if self.measured + new <= 0:
            return None
        average = (self.seconds + (running if new else 0.0)) / (self.measured + new)  # seconds per unit of work
        waiting = sum(work for name, work in self.work.items() if name not in self.over and name != self.cell)
        if not self.cell:
            return waiting * average
        own = running / new if new else average
        rate = self.share * own + (1 - self.share) * average
        return waiting * average + (1 - self.share) * self.work[self.cell] * rate


def estimate_work(cell: Cell, base: Base | None, questions: int) -> tuple[float, float]:
    """Estimate the work of a cell's training and of its answers."""
    if cell.run is None or base is None:
        return 0.0, 0.0
    packing, settings = cell.run.packing, cell.run.train
    tokens = (cell.steps or 0) * settings.accumulate * packing.batch * (packing.length or min(1024, base.context))
    passes = 2 + cell.run.method.trains_base + settings.activation_checkpointing
    training = 0.0 if cell.method == ZERO_SHOT else float(tokens * passes * base.parameters)
    new = QUESTION + cell.generate.max_new_tokens if cell.generate else 0
    return training, DECODING * questions * new * base.parameters


def count_lines(file: Path) -> int:
    """Count the lines of a file; 0 for a missing one."""
    return file.read_bytes().count(b"\n") if file.exists() else 0
