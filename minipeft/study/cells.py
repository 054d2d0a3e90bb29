"""One cell of a study, in its own process: train, answer, score; each part is resumable.

    python -P -m minipeft.study.cells STUDY cells/NAME '{"threads": 1, "onednn": true}'

    cells/NAME/cell.json          the Cell
               run/               its training run (runs/folder.py); none for the untrained model
               predictions.jsonl  its answers (runs/answers.py)
               log.txt            everything that was printed
               result.json        its Row; it marks completion

A process of its own has a peak memory of its own, and whatever kills it does not kill the study. -P keeps the current
folder off sys.path: a file named tqdm.py or statistics.py that lies there is never imported.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from minipeft.adapters.peft_format import WEIGHTS
from minipeft.data.examples import split_by_question
from minipeft.data.forms import load_data
from minipeft.errors import InputError
from minipeft.files import lock_folder, parse_json, read_object, read_text, write_json
from minipeft.generation import GenerateConfig
from minipeft.metrics.scores import Scores, score_texts
from minipeft.runs.answers import AnswersConfig, answer_data, load_tuned, read_answers
from minipeft.runs.config import RunConfig
from minipeft.runs.finetune import finetune
from minipeft.runs.preparation import pack_held_out
from minipeft.runs.process import ProcessConfig, Stopped, peak_memory
from minipeft.study.data import QUESTIONS, encode_rows
from minipeft.study.rows import Row, Training
from minipeft.tensor_files import read_header
from minipeft.training.loop import evaluate

CELL, ANSWERS, RESULT, LOG = "cell.json", "predictions.jsonl", "result.json", "log.txt"
ZERO_SHOT, FIRST_LINE = "zero-shot", "zero-shot, first line"  # the second is the first's answers, cut at a newline


@dataclass(frozen=True)
class Cell:
    """One row of the table: a model, a method and a seed, with the settings of its training run and its answers."""

    model: str  # its label; "" for a baseline
    method: str
    seed: int = 0
    run: RunConfig | None = None  # None for a baseline, and where the model cannot be read
    generate: GenerateConfig | None = None  # None: it gives no answers
    variant: str = ""  # what differs from the other cells of its method

    @property
    def name(self) -> str:
        """The cell's folder."""
        parts = [re.sub(r"[^\w.]+", "-", part).strip("-") for part in (self.model, self.method, self.variant) if part]
        return "--".join([*parts, f"seed{self.seed}"] if self.model else parts)

    @property
    def key(self) -> tuple[str, str, str]:
        """The fields that all seeds of a group share."""
        return self.model, self.method, self.variant

    @property
    def is_silent(self) -> bool:
        """Whether it is trained for its held-out loss alone, and answers nothing."""
        return self.run is not None and self.generate is None

    @property
    def steps(self) -> int | None:
        return self.run.train.steps if self.run else None

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "method": self.method,
            "seed": self.seed,
            "variant": self.variant,
            "run": self.run.as_json() if self.run else None,
            "generate": asdict(self.generate) if self.generate else None,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Cell:
        """Read cell.json.

        Raises:
            InputError: a setting is invalid.
        """
        if data["run"] is None:
            raise InputError("there is no training run", where="run")
        generate = GenerateConfig(**data["generate"]) if data["generate"] else None
        run = RunConfig.from_json(data["run"])
        return Cell(data["model"], data["method"], data["seed"], run, generate, data["variant"])


def perform(folder: Path) -> Row:
    """Train, answer and score the cell that `folder`/cell.json describes, from the study's folder.

    Raises:
        InputError: a file or setting that the cell names cannot be used.
        Stopped: a signal came; the same call resumes.
    """
    with lock_folder(folder):  # another share, or another study of this folder, may want it too
        cell = Cell.from_json(read_object(folder / CELL))
        row = Row(folder.name, cell.model, cell.method, cell.seed, describe_untrained(cell))
        if cell.method != ZERO_SHOT:
            row = train(cell, folder, row)
        if cell.generate is not None:
            row = answer_questions(cell, folder, row)
            row = replace(row, scores=score_file(folder / ANSWERS))
        write_json(folder / RESULT, row.as_json(counts=True))
        shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)  # needed only to resume
        return row


def describe_untrained(cell: Cell) -> Training:
    """Fill the training fields that are known before training; the untrained model has no others."""
    assert cell.run is not None
    adapter: Any = cell.run.adapter
    virtual = cell.method != ZERO_SHOT and hasattr(adapter, "reparam")  # a prefix or prompt
    return Training(
        recipe="minipeft",
        init=adapter.init if virtual else None,
        reparam=adapter.reparam if virtual else None,
        steps=0,
        trainable=0,
        trainable_percent=0.0,
        stored=0,
        train_seconds=0.0,
    )


def train(cell: Cell, folder: Path, row: Row) -> Row:
    """Run the training and add its result to the row."""
    assert cell.run is not None
    result = finetune(cell.run, folder / "run", resume=(folder / "run").exists())
    names = ["learning_rate", "steps", "trainable", "trainable_percent", "train_seconds", "tokens_per_second"]
    names += ["dev_loss", "peak_memory_bytes"]
    first = parse_json(read_text(folder / "run" / "log.jsonl").splitlines()[0], "log.jsonl")
    adapter = folder / "run" / "adapter" / WEIGHTS
    stored = sum(math.prod(t.shape) for t in read_header(adapter).values()) if adapter.exists() else result["trainable"]
    return replace(
        row,
        training=replace(
            row.training, **{name: result[name] for name in names}, stored=stored, dev_loss_start=first.get("dev_loss")
        ),
        loss=result["loss"],
        resumed_at=result["resumed_at"],
        adapter_movement=result["adapter_movement"],
    )


def answer_questions(cell: Cell, folder: Path, row: Row) -> Row:
    """Write an answer to every question to predictions.jsonl, with the trained adapter or model.

    The held-out loss and peak memory of the untrained model are measured here; a tuned one has those of its training.
    """
    run, untrained, out = cell.run, cell.method == ZERO_SHOT, folder / ANSWERS
    assert run is not None
    assert cell.generate is not None
    if out.exists() and not untrained:
        return row
    source, adapter = run.model, None
    if not untrained and run.method.trains_base:
        source = replace(run.model, source=str(folder / "run" / "model"))
    elif not untrained:
        adapter = folder / "run" / "adapter"
    template = run.data.template if untrained else None  # a tuned one has that of its training in its folder
    config = AnswersConfig(source, cell.generate, adapter=adapter, data=QUESTIONS, template=template, out=out)
    model, tokenizer = load_tuned(config)
    if not out.exists():
        answer_data(model, tokenizer, config)
    if not untrained:
        return row
    loss = None
    if run.data.held_out:
        _, held = split_by_question(load_data(run.data.source, template=run.data.template), run.data.held_out)
        encoded = encode_rows(held, run.model.source, tokenizer)
        loss = evaluate(model, pack_held_out(run.packing, model, tokenizer, encoded))
    return replace(row, training=replace(row.training, dev_loss=loss, peak_memory_bytes=peak_memory(run.model.device)))


def score_file(file: Path) -> Scores:
    """Score a file of answers."""
    found = read_answers(file)
    return score_texts(found.predictions, found.references, questions=found.questions, hit_limit=found.cut)


def main(arguments: Sequence[str]) -> int:
    """Run one cell; returns the exit status that the command line would have."""
    study, folder, process = arguments
    os.chdir(study)
    ProcessConfig(**json.loads(process)).apply()
    try:
        perform(Path(folder))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.number
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
