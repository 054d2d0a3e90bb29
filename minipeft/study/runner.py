"""A whole study: from a StudyConfig to results.json, report.md and report.html, a folder per cell, resumable.

check models and data -> baselines -> each cell in its own process, one bar for all -> statistics -> reports

DIR/study.json    what the study's questions are; a folder without it that holds anything is left alone
    data/         the pairs as this study uses them: train.jsonl, test.jsonl
    cells/NAME/   cells.py says what is there
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm

from minipeft.data.examples import Pair, Pairs, encode_pairs, load_pairs, split_by_question
from minipeft.data.packing import pack
from minipeft.data.tokens import load_tokenizer
from minipeft.errors import InputError
from minipeft.files import parse_json, read_object, read_text, write_json, write_whole
from minipeft.hub import fetch
from minipeft.models import FAMILIES
from minipeft.models.checkpoint import read_config
from minipeft.study.baselines import BASELINES
from minipeft.study.cells import ANSWERS, CELL, LOG, QUESTIONS, ROW, text_row
from minipeft.study.presets import FIRST_LINE, PRESETS, ZERO_SHOT, Cell, StudyConfig, cells_of, is_folder, labels

FORMAT = 1
HELD_OUT = 100  # pairs for the held-out loss, at most a tenth of the training pairs
TESTED = 500  # questions of a file that has no test split, at most a fifth of its pairs
POLL_SECONDS = 0.2
TRAINING, ANSWERING = 3.0, 1.0  # shares of a cell's time, for the bar


@dataclass(frozen=True)
class Base:
    """A model that can be loaded: from where, how large it is, and how many steps an epoch has."""

    source: str
    parameters: int
    steps: int


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: its row, or why there is none."""

    cell: Cell
    row: dict[str, Any] | None
    error: str | None = None


def conduct(config: StudyConfig, out: Path, say: Callable[[str], None] = print) -> list[Outcome]:
    """Do what is not done yet of a study in the folder `out`; returns how each cell ended, baselines first.

    Raises:
        InputError: the folder is something else's or in use, the data cannot be used, or no model can.
        KeyboardInterrupt, SystemExit: stopped; the same call goes on.
    """
    preset = PRESETS[config.preset]
    train, test = load_data(config.data or preset.data, config.limit)
    held_out = feasible(train, min(HELD_OUT, len(train) // 10))
    models = labels(config.model or preset.models)
    bases, failed = look_at(models, train, held_out)
    with opened(out, train, test):
        outcomes = [Outcome(cell, baseline_row(out, cell, train, test)) for cell in baselines()]
        sources = {label: bases[label].source if label in bases else model for label, model in models.items()}
        cells = [with_steps(cell, bases.get(cell.model)) for cell in cells_of(config, sources, held_out)]
        check_settings(out, cells)
        with stoppable(), Bar(cells, bases, out) as bar:
            for cell in cells:
                outcomes += run_cell(cell, out, config, failed.get(cell.model), bar, say)
    return outcomes


def load_data(source: str, limit: int | None) -> tuple[Pairs, Pairs]:
    """The pairs to train on and those to answer: the source's own split, or a fifth of a file's questions."""
    if source in ("demo", "conala") or Path(source).is_dir():
        train, test = load_pairs(source, split="train"), load_pairs(source, split="test")
    else:
        whole = load_pairs(source)
        train, test = split_by_question(whole, feasible(whole, min(TESTED, len(whole) // 5)), seed=0)
        if not test.items:
            raise InputError(f"{len(whole)} pairs are too few to keep a fifth of them as questions", file=source)
    return train, Pairs(test.items[:limit], test.file, test.sha256, test.notes)


def feasible(pairs: Pairs, wanted: int) -> int:
    """The largest number <= wanted of pairs that whole questions make."""
    for number in range(wanted, 0, -1):
        try:
            split_by_question(pairs, number)
        except InputError:
            continue
        return number
    return 0


def look_at(models: dict[str, str], train: Pairs, held_out: int) -> tuple[dict[str, Base], dict[str, str]]:
    """The models that can be loaded, as far as their small files tell, and why the others cannot.

    Raises:
        InputError: none can.
    """
    bases, failed, first = {}, {}, None
    for label, model in models.items():
        source = str(Path(model).resolve()) if is_folder(model) else model
        try:
            tokenizer, base = load_tokenizer(source), read_config(fetch(source, ["config.json"]) / "config.json")
            kept = split_by_question(train, held_out)[0] if held_out else train
            rows = pack(encode_pairs(kept, tokenizer), tokenizer, length=min(1024, base.context), batch=1)
        except InputError as error:
            failed[label], first = str(error), first or error
            continue
        with torch.device("meta"):
            size = sum(p.numel() for p in FAMILIES[base.model_type][1](base).parameters())
        bases[label] = Base(source, size, len(rows))
    if first is not None and not bases:
        raise first
    return bases, failed


def with_steps(cell: Cell, base: Base | None) -> Cell:
    """The cell with its number of steps: the same for each method, whatever columns an adapter takes from a row."""
    if base is None or cell.method == ZERO_SHOT or "steps" in cell.tune:
        return cell
    steps = max(1, round(cell.tune["epochs"] * base.steps))
    return replace(cell, tune={**cell.tune, "steps": steps})


@contextmanager
def opened(out: Path, train: Pairs, test: Pairs) -> Iterator[None]:
    """Make the study's folder, or check that it is this study's, and keep other processes out of it."""
    about = {
        "format": FORMAT,
        "train_sha256": train.sha256,
        "test_sha256": test.sha256,
        "train": len(train),
        "questions": len(test),
    }
    marker = out / "study.json"
    if out.exists() and not out.is_dir():
        raise InputError("is a file; a study needs a folder", file=out)
    if not marker.exists() and out.exists() and any(out.iterdir()):
        raise InputError("holds something else than a study", file=out, hint="Name another --out")
    if not marker.exists():
        write_json(marker, about)
    if read_object(marker) != about:
        raise InputError("holds a study of other data or other questions", file=out, hint="Name another --out")
    for pairs, name in ((train, "data/train.jsonl"), (test, QUESTIONS)):
        text = "".join(json.dumps(fields(pair)) + "\n" for pair in pairs)
        if not (out / name).exists() or read_text(out / name) != text:
            write_whole(out / name, lambda stream, text=text: stream.write(text.encode()))  # type: ignore[misc]
    with open(out / "study.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError("is in use by another study", file=out) from error
        yield


def check_settings(out: Path, cells: Sequence[Cell]) -> None:
    """Refuse to mix cells that were made with other settings than are asked for now."""
    for cell in cells:
        file = out / "cells" / cell.name / CELL
        if file.exists() and (begun := read_object(file)) != asdict(cell):
            odd = [name for name in begun["tune"] | dict(cell.tune) if begun["tune"].get(name) != cell.tune.get(name)]
            problem = f"was made with other settings ({', '.join(odd) or 'of generation'})"
            raise InputError(problem, file=file.parent, hint="Name another --out, or remove this folder")


def fields(pair: Pair) -> dict[str, Any]:
    """A pair as a row of JSON."""
    row = {"intent": pair.intent, "snippet": pair.snippet}
    return row if pair.question_id is None else {**row, "question_id": pair.question_id}


def baselines() -> list[Cell]:
    """The cells that need no model."""
    return [Cell("", method) for method in BASELINES]


def baseline_row(out: Path, cell: Cell, train: Pairs, test: Pairs) -> dict[str, Any]:
    """Answer and score without a model."""
    answers = BASELINES[cell.method](train.items, test.items)
    rows = [
        {"prediction": answer, "reference": pair.snippet, "question_id": pair.question_id, "intent": pair.intent}
        for answer, pair in zip(answers, test)
    ]
    return written_row(out, cell, rows)


def first_line_row(out: Path, cell: Cell, whole: Cell) -> dict[str, Any]:
    """The untrained model's answers, each cut at its first newline: what is left when it need not know where to end."""
    lines = read_text(out / "cells" / whole.name / ANSWERS).splitlines()
    rows = [parse_json(line, ANSWERS) for line in lines]
    return written_row(
        out, cell, [row | {"prediction": first_line(row["prediction"]), "ended": "stop"} for row in rows]
    )


def first_line(text: str) -> str:
    """The text up to its first newline, after those that it begins with."""
    return text.lstrip("\n").split("\n", 1)[0]


def written_row(out: Path, cell: Cell, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Write answers that took no model into the cell's folder, and score them, unless that was done before."""
    folder, text = out / "cells" / cell.name, "".join(json.dumps(row) + "\n" for row in rows)
    if not (folder / ROW).exists() or not (folder / ANSWERS).exists() or read_text(folder / ANSWERS) != text:
        write_whole(folder / ANSWERS, lambda stream: stream.write(text.encode()))
        about = {"model": cell.model, "method": cell.method, "seed": cell.seed}
        write_json(folder / ROW, {**about, **text_row(folder / ANSWERS)})
    return read_object(folder / ROW)


def run_cell(
    cell: Cell, out: Path, config: StudyConfig, refused: str | None, bar: Bar, say: Callable[[str], None]
) -> list[Outcome]:
    """Run a cell in its own process unless it is finished; the untrained model's first lines are another cell."""
    folder = out / "cells" / cell.name
    if refused is None and not (folder / ROW).exists():
        write_json(folder / CELL, asdict(cell))
        bar.begin(cell)
        refused = apart(out, cell, config.threads, bar)
    bar.done(cell)
    if refused is not None:
        say(f"note: {cell.model} {cell.method} failed: {refused}")
        return [Outcome(cell, None, refused)]
    outcome = Outcome(cell, read_object(folder / ROW))
    if cell.method != ZERO_SHOT:
        return [outcome]
    cut = Cell(cell.model, FIRST_LINE, cell.seed)
    return [outcome, Outcome(cut, {**outcome.row, **first_line_row(out, cut, cell)})]  # type: ignore[dict-item]


def apart(out: Path, cell: Cell, threads: int | None, bar: Bar) -> str | None:
    """Run a cell's process to its end; returns why it failed."""
    command = [sys.executable, "-m", "minipeft.study.cells", str(out), f"cells/{cell.name}"]
    command += [] if threads is None else [str(threads)]
    with open(out / "cells" / cell.name / LOG, "a", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "TQDM_DISABLE": "1"})
        try:
            while process.poll() is None:
                bar.show(cell)
                time.sleep(POLL_SECONDS)
        finally:  # Ctrl-C reaches the cell as well; kill PID does not
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait()
                finally:
                    process.kill()
    if process.returncode == 0:
        return None
    if process.returncode < 0:
        return f"its process was ended by {signal.Signals(-process.returncode).name} (out of memory?)"
    said = [line for line in read_text(out / "cells" / cell.name / LOG).splitlines() if line.strip()]
    return (said[-1] if said else f"exit status {process.returncode}").removeprefix("error: ")


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM end the study as Ctrl-C does: the cell that runs is saved first."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    kept = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, kept)


class Bar:
    """One bar for all cells, in units of work; what a cell has done is read from the lines of its files."""

    def __init__(self, cells: Sequence[Cell], bases: dict[str, Base], out: Path):
        self.out, self.questions = out, read_text(out / QUESTIONS).count("\n")
        self.work = {cell.name: cost(cell, bases.get(cell.model)) for cell in cells}
        self.counted = {cell.name for cell in cells if (out / "cells" / cell.name / ROW).exists()}
        self.finished = sum(self.work[name] for name in self.counted)
        shown = "{desc} {percentage:3.0f}%|{bar}| {elapsed} gone, about {remaining} left"
        total = sum(self.work.values())
        often = 0.5 if sys.stderr.isatty() else 15.0  # seconds between drawings
        self.bar = tqdm(
            total=total, initial=self.finished, smoothing=0, file=sys.stderr, bar_format=shown, mininterval=often
        )

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def begin(self, cell: Cell) -> None:
        """Name the cell that runs."""
        seed = f" seed {cell.seed}" if cell.seed else ""
        self.bar.set_description_str(f"{cell.model} {cell.method}{seed}", refresh=False)

    def show(self, cell: Cell) -> None:
        """Move to where the cell stands."""
        folder = self.out / "cells" / cell.name
        training = 0.0 if cell.method == ZERO_SHOT else TRAINING
        answers = max(lines(folder / f"{ANSWERS}.part") - 1, lines(folder / ANSWERS), 0) / self.questions
        steps = 1.0 if answers else min(1.0, lines(folder / "run" / "log.jsonl") / cell.tune.get("steps", 1))
        share = (training * steps + ANSWERING * answers) / (training + ANSWERING)
        self.move(self.finished + share * self.work[cell.name])

    def done(self, cell: Cell) -> None:
        """Count the cell as over, finished or failed."""
        if cell.name not in self.counted:
            self.counted.add(cell.name)
            self.finished += self.work[cell.name]
        self.move(self.finished)

    def move(self, to: float) -> None:
        self.bar.update(max(0.0, to - self.bar.n))


def cost(cell: Cell, base: Base | None) -> float:
    """A cell's work, in no unit: training counts three times, or four where every weight is trained."""
    training = {ZERO_SHOT: 0.0, "full": 4 / 3}.get(cell.method, 1.0) * TRAINING
    return (training + ANSWERING * bool(cell.generate)) * base.parameters if base else 0.0


def lines(file: Path) -> int:
    """The number of lines of a file that may not be there."""
    return file.read_bytes().count(b"\n") if file.exists() else 0
