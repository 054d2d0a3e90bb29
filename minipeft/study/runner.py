"""Runs a study: from a StudyConfig to the outcome of each cell, in a resumable folder.

check models and data -> lock the folder -> baselines -> each cell in its own process, under one bar

DIR/study.json    which questions the study answers; a non-empty folder without it is refused
    data/         the rows as this study uses them: train.jsonl, test.jsonl
    cells/NAME/   cells.py lists what is there
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from minipeft.data.examples import split_by_question
from minipeft.data.forms import Data
from minipeft.data.packing import pack
from minipeft.data.tokens import load_tokenizer
from minipeft.errors import InputError, check_path
from minipeft.files import (
    lock_folder,
    make_folder,
    open_plain,
    parse_json,
    read_object,
    read_text,
    write_json,
    write_whole,
)
from minipeft.hub import fetch
from minipeft.metrics import execution
from minipeft.metrics.text import find_language
from minipeft.models.checkpoint import check_device, read_config
from minipeft.runs.planning import build_on_meta
from minipeft.runs.process import ProcessConfig, stopping
from minipeft.study.baselines import BASELINES, PYTHON_ONLY
from minipeft.study.cells import ANSWERS, CELL, FIRST_LINE, LOG, RESULT, ZERO_SHOT, Cell, score_file
from minipeft.study.data import as_pairs, encode_rows, find_split, load_study_data, write_data
from minipeft.study.drafts import Base, is_folder, label_models, make_cells
from minipeft.study.executed import execute_row
from minipeft.study.plans import CellPlan, plan_cells, refuse_unfit
from minipeft.study.presets import PRESETS, StudyConfig, read_share
from minipeft.study.progress import Bar, estimate_work
from minipeft.study.rows import Row

HELD_OUT = 100  # pairs for the held-out loss, at most a tenth of the training pairs
POLL_SECONDS = 0.2
LOCK, LOCKS = "study.lock", re.compile(r"study(\.[0-9]+-[0-9]+)?\.lock")


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: its row, or why there is none. `waiting`: it belongs to another share, and is not finished."""

    cell: Cell
    row: Row | None
    error: str | None = None
    waiting: bool = False


@dataclass(frozen=True)
class Prepared:
    """What a study will do: its data, its models (None: unreadable, with the error), and every cell it expects."""

    train: Data
    test: Data
    held_out: int
    bases: Mapping[str, Base | None]
    errors: Mapping[str, str]
    cells: Sequence[Cell]


def prepare(config: StudyConfig) -> Prepared:
    """Read the data and the models' small files, and make the cells.

    Raises:
        InputError: the data cannot be used, or no model can.
    """
    check_device(config.device)
    preset = PRESETS[config.preset]
    train, test = load_study_data(config.data or preset.data, config.limit, config.settings)
    held_out = config.settings.get("held_out", find_split(train, min(HELD_OUT, len(train) // 10)))
    models = label_models(config.model or preset.models)
    bases, errors = read_models(models, train, held_out, config.settings.get("length"))
    return Prepared(train, test, held_out, bases, errors, make_cells(config, bases, held_out))


def plan_study(config: StudyConfig) -> tuple[list[CellPlan], Mapping[str, str]]:
    """Plan every cell of a study without running it; returns the plans, and the errors of models that cannot be read.

    Raises:
        InputError: as `prepare`; the adapter or the rows do not fit a model.
    """
    found = prepare(config)
    return plan_cells(found.cells, len(found.test), config.gpu), found.errors


def conduct(config: StudyConfig, out: Path, say: Callable[[str], None] = print) -> list[Outcome]:
    """Run the unfinished cells of a study in the folder `out`; returns the outcome of every cell, baselines first.

    Raises:
        InputError: the folder belongs to something else or is in use, the data cannot be used, or no model can.
        KeyboardInterrupt, SystemExit: stopped by a signal; the same call resumes.
    """
    out = check_path(out, "out")
    prepared = prepare(config)
    train, test, cells = prepared.train, prepared.test, prepared.cells
    unfit = refuse_unfit(cells, len(test), config.gpu)
    with open_folder(out, train, test, config.cell), stopping() as stop:
        outcomes = [Outcome(cell, answer_trivially(out, cell, train, test)) for cell in make_baselines(test)]
        ended: dict[str, list[Outcome]] = {}  # by cell
        rows: dict[str, Row | None] = {}  # None: it failed
        own = cells if config.cell is None else take_share(cells, prepared.bases, len(test), *read_share(config.cell))
        with Bar(own, prepared.bases, out, len(test), list_finished(own, out), config.workers) as bar:

            def work(cell: Cell) -> list[Outcome]:
                exit_if_signalled(stop)
                done = read_finished(out / "cells" / cell.name, say) is not None
                if cell.name not in bar.parts and not done:
                    return [Outcome(cell, None, "not finished by its share", waiting=True)]
                error = prepared.errors.get(cell.model)
                if error is None and not done:
                    error = unfit.get(cell.key) or run_cell(cell, out, config.cell_process, bar, stop)
                if cell.name in bar.parts:
                    bar.finish(cell)
                return read_outcomes(cell, out, error, say)

            for new in list_rounds(config, prepared, rows):
                check_settings(out, new)
                if PRESETS[config.preset].searches:
                    bar.add(new, prepared.bases, list_finished(new, out))
                ended |= {cell.name: found for cell, found in zip(new, run_each(work, new, config.workers))}
                rows |= {name: found[0].row for name, found in ended.items()}
        places = {cell.name: place for place, cell in enumerate(cells)}  # of what was not expected: the last
        for name in sorted(ended, key=lambda name: places.get(name, len(places))):
            outcomes += ended[name]
        exit_if_signalled(stop)
        if config.execute:
            ran: dict[str, execution.Outcome] = {}
            outcomes = [replace(one, row=one.row and execute_row(one.row, out, ran)) for one in outcomes]
    return outcomes


def list_rounds(config: StudyConfig, prepared: Prepared, rows: Mapping[str, Row | None]) -> Iterator[list[Cell]]:
    """The cells in rounds: those that depend on no other, then those that the held-out losses of `rows` ask for."""
    seen: dict[str, Cell] = {}
    while True:
        losses: dict[str, dict[tuple[str, str], float | None]] = {}
        for name, cell in seen.items():
            row = rows.get(name)
            losses.setdefault(cell.model, {})[cell.method, cell.variant] = row.training.dev_loss if row else None
        cells = make_cells(config, prepared.bases, prepared.held_out, losses)
        if not (new := [cell for cell in cells if cell.name not in seen]):
            return
        seen |= {cell.name: cell for cell in new}
        yield new


def list_finished(cells: Sequence[Cell], out: Path) -> set[str]:
    """The names of the cells whose result.json is valid."""
    return {cell.name for cell in cells if read_finished(out / "cells" / cell.name) is not None}


def run_each(work: Callable[[Cell], list[Outcome]], cells: Sequence[Cell], workers: int) -> list[list[Outcome]]:
    """Do the work of every cell, of so many at once; each worker is a thread that waits for its cell's process."""
    if workers == 1:
        return [work(cell) for cell in cells]
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, cell) for cell in cells]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()


def take_share(
    cells: Sequence[Cell], bases: Mapping[str, Base | None], questions: int, number: int, shares: int
) -> list[Cell]:
    """The cells of share 1, 2, ...: each cell, the largest first, goes to the share with the least work."""
    work = {cell.name: sum(estimate_work(cell, bases.get(cell.model), questions)) for cell in cells}
    loads, own = [0.0] * shares, set()
    for cell in sorted(cells, key=lambda cell: -work[cell.name]):
        least = loads.index(min(loads))
        loads[least] += max(work[cell.name], 1.0)
        if least == number - 1:
            own.add(cell.name)
    return [cell for cell in cells if cell.name in own]


def exit_if_signalled(stop: list[int]) -> None:
    """Raise SystemExit where a signal came."""
    if stop:
        raise SystemExit(128 + stop[0])


def read_models(
    models: dict[str, str], train: Data, held_out: int, length: int | None = None
) -> tuple[dict[str, Base | None], dict[str, str]]:
    """Read each model's config.json and tokenizer; returns Base or None for each, and the errors of the latter.

    Raises:
        InputError: no model can be read.
    """
    bases: dict[str, Base | None] = {}
    errors, first = {}, None
    for label, model in models.items():
        source = str(Path(model).resolve()) if is_folder(model) else model
        try:
            bases[label] = read_base(source, train, held_out, length)
        except InputError as error:
            bases[label], errors[label], first = None, str(error), first or error
    if first is not None and len(errors) == len(bases):
        raise first
    return bases, errors


def read_base(source: str, train: Data, held_out: int, length: int | None = None) -> Base:
    """Read the size of a model, and the number of rows that its tokenizer makes of the training pairs, of `length`
    tokens or what the model has room for.

    Raises:
        InputError: config.json or the tokenizer cannot be read.
    """
    tokenizer, config = load_tokenizer(source), read_config(fetch(source, ["config.json"]) / "config.json")
    kept = split_by_question(train, held_out)[0] if held_out else train
    rows = pack(encode_rows(kept, source, tokenizer), tokenizer, length=min(length or 1024, config.context), batch=1)
    size = sum(p.numel() for p in build_on_meta(config).parameters())
    return Base(source, size, config.model_type, len(rows), config.context)


@contextmanager
def open_folder(out: Path, train: Data, test: Data, share: str | None = None) -> Iterator[None]:
    """Lock the study's folder, created with its parents if missing, and check that it belongs to this study.

    Each share has a lock of its own; the cells of both are locked by their processes.

    Raises:
        InputError: it is a file, in use, another study's, or holds something else; it cannot be created.
    """
    marker = out / "study.json"
    if out.exists() and not out.is_dir():
        raise InputError("is a file; a study needs a folder", file=out)
    if not marker.exists() and out.exists() and any(LOCKS.fullmatch(file.name) is None for file in out.iterdir()):
        raise InputError("is not empty and holds no study", file=out, hint="Name another --out")
    try:
        make_folder(out)
    except OSError as error:
        raise InputError(f"cannot be created: {error.strerror}", file=out) from error
    with lock_folder(out, LOCK if share is None else f"study.{share.replace('/', '-')}.lock"):
        write_data(out, train, test)
        yield


def check_settings(out: Path, cells: Sequence[Cell]) -> None:
    """Refuse to continue cells that were started with other settings.

    Raises:
        InputError: the folder of a cell, and the settings that differ.
    """
    for cell in cells:
        file = out / "cells" / cell.name / CELL
        if cell.run is not None and file.exists() and (begun := read_object(file)) != cell.as_json():
            names = ", ".join(dict.fromkeys(find_differences(begun, json.loads(json.dumps(cell.as_json())))))
            if names:
                problem = f"was made with other settings ({names})"
                raise InputError(problem, file=file.parent, hint="Name another --out, or remove this folder")


def find_differences(one: Any, other: Any, name: str = "") -> Iterator[str]:
    """Name the leaves in which two JSON values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one | other:
            yield from find_differences(one.get(key), other.get(key), key)
    elif one != other:
        yield name


def read_finished(folder: Path, say: Callable[[str], None] = lambda line: None) -> Row | None:
    """Read the row of a finished cell; None, with a note, if its result.json is invalid."""
    if not (folder / RESULT).exists():
        return None
    try:
        return Row.from_json(read_object(folder / RESULT))
    except InputError as error:
        say(f"note: {folder / RESULT}: {error}; the cell is not finished and resumes")
        return None


def make_baselines(test: Data) -> list[Cell]:
    """Make the cells of the baselines, which need no model."""
    language = find_language([[pair.snippet] for pair in as_pairs(test)])
    return [Cell("", method) for method in BASELINES if language == "python" or method != PYTHON_ONLY]


def answer_trivially(out: Path, cell: Cell, train: Data, test: Data) -> Row:
    """Answer and score a baseline."""
    questions = as_pairs(test)
    answers = BASELINES[cell.method](as_pairs(train), questions)
    rows = [
        {"prediction": answer, "reference": pair.snippet, "question_id": pair.question_id, "intent": pair.intent}
        for answer, pair in zip(answers, questions)
    ]
    return score_rows(out, Row(cell.name, cell.model, cell.method, cell.seed), rows)


def answer_first_line(out: Path, cell: Cell, whole: Row) -> Row:
    """The untrained model's answers, each cut at its first newline: its score if it knew where to stop."""
    lines = read_text(out / "cells" / whole.cell / ANSWERS).splitlines()
    rows = [parse_json(line, ANSWERS) for line in lines]
    rows = [row | {"prediction": take_first_line(row["prediction"]), "ended": "stop"} for row in rows]
    return score_rows(out, replace(whole, cell=cell.name, method=cell.method), rows)


def take_first_line(text: str) -> str:
    """The first line of a text, leading newlines skipped."""
    return text.lstrip("\n").split("\n", 1)[0]


def score_rows(out: Path, row: Row, rows: list[dict[str, Any]]) -> Row:
    """Write and score answers made without a model, unless the cell is complete."""
    folder, text = out / "cells" / row.cell, "".join(json.dumps(answer) + "\n" for answer in rows)
    same = (folder / ANSWERS).exists() and read_text(folder / ANSWERS) == text
    before = read_finished(folder) if same else None
    if before is not None:
        return replace(row, scores=before.scores)
    write_whole(folder / ANSWERS, lambda stream: stream.write(text.encode()))
    row = replace(row, scores=score_file(folder / ANSWERS))
    write_json(folder / RESULT, row.as_json(counts=True))
    return row


def read_outcomes(cell: Cell, out: Path, error: str | None, say: Callable[[str], None]) -> list[Outcome]:
    """Read how a cell ended; the first lines of the untrained model's answers are a cell of their own."""
    row = read_finished(out / "cells" / cell.name, say) if error is None else None
    if row is None:
        error = error or f"{RESULT} does not hold a row"
        say(f"note: {cell.model} {cell.method} failed: {error}")
        return [Outcome(cell, None, error)]
    if cell.method != ZERO_SHOT:
        return [Outcome(cell, row)]
    cut = Cell(cell.model, FIRST_LINE, cell.seed)
    return [Outcome(cell, row), Outcome(cut, answer_first_line(out, cut, row))]


def run_cell(cell: Cell, out: Path, settings: ProcessConfig, bar: Bar, stop: list[int]) -> str | None:
    """Run a cell in its own process; returns its error, or None.

    Raises:
        SystemExit: a signal was received; the cell has saved its state.
    """
    folder = out / "cells" / cell.name
    write_json(folder / CELL, cell.as_json())
    (folder / RESULT).unlink(missing_ok=True)
    bar.begin(cell)
    command = [sys.executable, "-P", "-m", "minipeft.study.cells", str(out), f"cells/{cell.name}"]
    command += [json.dumps(asdict(settings))]
    with open(folder / LOG, "a", encoding="utf-8", opener=open_plain) as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "TQDM_DISABLE": "1"})
        try:
            while process.poll() is None and not stop:
                bar.show(cell)
                time.sleep(POLL_SECONDS)
        finally:  # Ctrl-C reaches the cell as well; kill PID does not
            terminate(process)
    exit_if_signalled(stop)
    if process.returncode == 0:
        return None
    if process.returncode < 0:
        return f"its process was killed by {signal.Signals(-process.returncode).name} (out of memory?)"
    printed = [line for line in read_text(folder / LOG).splitlines() if line.strip()]
    return (printed[-1] if printed else f"exit status {process.returncode}").removeprefix("error: ")


def terminate(process: subprocess.Popen[bytes]) -> None:
    """Terminate a process and wait until it has saved its state."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait()
        finally:
            process.kill()
