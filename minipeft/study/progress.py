"""One progress bar for all cells of a study, in units of work; a cell's progress is the lines of its files."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from minipeft.study.cells import ANSWERS, ZERO_SHOT, Cell

TRAINING, ANSWERING = 3.0, 1.0  # shares of a cell's time
FULL = 4 / 3  # training where every weight is trained, over training of an adapter


class Bar:
    """The bar. `sizes`: the parameters of each model; `finished`: the names of the cells that are done already."""

    def __init__(
        self, cells: Sequence[Cell], sizes: Mapping[str, int], out: Path, questions: int, finished: Collection[str]
    ):
        self.out, self.questions = out, questions
        self.work = {cell.name: estimate_work(cell, sizes.get(cell.model, 0)) for cell in cells}
        self.counted = set(finished)
        self.done_work = sum(self.work[name] for name in self.counted)
        self.bar = tqdm(
            total=sum(self.work.values()),
            initial=self.done_work,
            smoothing=0,
            file=sys.stderr,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed} elapsed, about {remaining} left",
            mininterval=0.5 if sys.stderr.isatty() else 15.0,  # seconds between drawings
        )

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def begin(self, cell: Cell) -> None:
        """Show which cell runs."""
        seed = f" seed {cell.seed}" if cell.seed else ""
        self.bar.set_description_str(f"{cell.model} {cell.method}{seed}", refresh=False)

    def show(self, cell: Cell) -> None:
        """Move to the cell's progress."""
        folder = self.out / "cells" / cell.name
        training = 0.0 if cell.method == ZERO_SHOT else TRAINING
        answered = max(count_lines(folder / f"{ANSWERS}.part") - 1, count_lines(folder / ANSWERS), 0) / self.questions
        logged = count_lines(folder / "run" / "log.jsonl")
        trained = 1.0 if answered else min(1.0, logged / (cell.steps or 1))
        share = (training * trained + ANSWERING * answered) / (training + ANSWERING)
        self.move(self.done_work + share * self.work[cell.name])

    def finish(self, cell: Cell) -> None:
        """Count the cell as over, done or failed."""
        if cell.name not in self.counted:
            self.counted.add(cell.name)
            self.done_work += self.work[cell.name]
        self.move(self.done_work)

    def move(self, to: float) -> None:
        """Move forward to an amount of work; never back."""
        self.bar.update(max(0.0, to - self.bar.n))


def estimate_work(cell: Cell, parameters: int) -> float:
    """A cell's work, in no unit: by parameters; training an adapter counts three times what answering does."""
    training = {ZERO_SHOT: 0.0, "full": FULL}.get(cell.method, 1.0) * TRAINING
    return (training + ANSWERING * (cell.generate is not None)) * parameters


def count_lines(file: Path) -> int:
    """The number of lines of a file; 0 where there is none."""
    return file.read_bytes().count(b"\n") if file.exists() else 0
