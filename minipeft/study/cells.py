"""One cell of a study, in a process of its own: train, answer, score; each part goes on where it was stopped.

    python -m minipeft.study.cells STUDY cells/NAME [THREADS]

    cells/NAME/cell.json          what the cell is
               run/               its training run (runs/checkpoints.py); none for the untrained model
               predictions.jsonl  its answers (answering.py)
               log.txt            all that was said
               result.json        its row of the table; its being there says: finished

A process of its own has a peak memory of its own, and whatever kills it does not kill the study.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from minipeft.adapters.peft_format import WEIGHTS
from minipeft.data.examples import load_pairs, split_by_question
from minipeft.errors import InputError
from minipeft.files import parse_json, read_header, read_object, read_text, write_json
from minipeft.generation import GenerateConfig
from minipeft.metrics.bleu import LENGTH, REFERENCE_LENGTH, count_pairs
from minipeft.metrics.text import score_texts
from minipeft.runs.answers import answer_data, answers_in, load_tuned
from minipeft.runs.config import TuneConfig
from minipeft.runs.finetune import held_rows, tune
from minipeft.runs.process import Stopped, peak_memory
from minipeft.study.presets import ZERO_SHOT
from minipeft.training.loop import evaluate

CELL, ANSWERS, ROW, LOG = "cell.json", "predictions.jsonl", "result.json", "log.txt"
QUESTIONS = "data/test.jsonl"  # from the study's folder, which is where a cell runs
TEMPLATE_PARTS = ("### Instruction", "### Response")


def work(folder: Path) -> dict[str, Any]:
    """Do the cell that `folder`/cell.json describes, from the study's folder; returns its row.

    Raises:
        InputError: what the cell names cannot be used.
        Stopped: a signal came; the same call goes on.
    """
    cell = read_object(folder / CELL)
    config = TuneConfig(**cell["tune"])
    untrained = cell["method"] == ZERO_SHOT
    trained = {} if untrained else train_row(tune(config, folder / "run", resume=(folder / "run").exists()), folder)
    row = {**described(cell, config), **trained}
    if cell["generate"]:
        row |= answer(config, GenerateConfig(**cell["generate"]), folder, untrained)
        row |= text_row(folder / ANSWERS)
    write_json(folder / ROW, row)
    shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)  # they were there to go on from
    return row


def described(cell: dict[str, Any], config: TuneConfig) -> dict[str, Any]:
    """What a row says of its cell; null for what the method has not."""
    virtual_tokens = cell["method"] in ("prefix", "prompt")
    return {
        "model": cell["model"],
        "method": cell["method"],
        "seed": cell["seed"],
        "recipe": "minipeft",
        "init": config.init if virtual_tokens else None,
        "reparam": config.reparam if virtual_tokens else None,
        "learning_rate": None,
        "steps": 0,
        "trainable": 0,
        "trainable_percent": 0.0,
        "train_seconds": 0.0,
        "tokens_per_second": None,
        "dev_loss": None,
        "dev_loss_start": None,
        "stored": 0,
        "adapter_movement": None,
    }


def train_row(result: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The part of a row that training gives. `stored`: the numbers on disk; of a prefix or prompt the network that
    makes it is not among them. `dev_loss_start`: before the first step."""
    names = (
        "learning_rate",
        "steps",
        "trainable",
        "trainable_percent",
        "train_seconds",
        "tokens_per_second",
        "resumed_at",
        "loss",
        "dev_loss",
        "adapter_movement",
        "peak_memory_bytes",
    )
    first = parse_json(read_text(folder / "run" / "log.jsonl").splitlines()[0], "log.jsonl")
    adapter = folder / "run" / "adapter" / WEIGHTS
    stored = sum(math.prod(t.shape) for t in read_header(adapter).values()) if adapter.exists() else result["trainable"]
    return {name: result[name] for name in names} | {"stored": stored, "dev_loss_start": first.get("dev_loss")}


def answer(config: TuneConfig, generate: GenerateConfig, folder: Path, untrained: bool) -> dict[str, Any]:
    """Answer every question into predictions.jsonl, from what training left on disk.

    The untrained model's held-out loss and peak memory are taken here; a tuned one has those of its training.
    """
    full = config.method == "full" and not untrained
    options = Namespace(
        model=str(folder / "run" / "model") if full else config.model,
        adapter=None if full or untrained else folder / "run" / "adapter",
        merge=False,
        device=config.device,
        dtype=config.dtype,
        revision=config.revision,
        legacy_bin=config.legacy_bin,
        data=QUESTIONS,
        split="test",
        limit=None,
        out=folder / ANSWERS,
    )
    if options.out.exists() and not untrained:
        return {}
    model, tokenizer = load_tuned(options)
    if not options.out.exists():
        answer_data(model, tokenizer, generate, options)
    if not untrained:
        return {}
    loss = None
    if config.held_out:
        _, held = split_by_question(load_pairs(config.data), config.held_out)
        loss = evaluate(model, held_rows(config, model, tokenizer, held))
    return {"dev_loss": loss, "peak_memory_bytes": peak_memory(config.device)}


def text_row(file: Path) -> dict[str, Any]:
    """The part of a row that a file of answers gives. `length_ratio`: tokens of all answers / of all references."""
    rows = list(answers_in(file))
    predictions, references = [row["prediction"] for row in rows], [row["reference"] for row in rows]
    cut = [row["ended"] == "limit" for row in rows] if all("ended" in row for row in rows) else None
    scores = score_texts(predictions, references, hit_limit=cut)
    sums = count_pairs(predictions, references).sum(axis=0)
    names = (
        "pairs",
        "bleu",
        "codebleu",
        "codebleu_compat",
        "ngram",
        "weighted_ngram",
        "syntax",
        "dataflow",
        "exact_match",
        "chrf",
        "valid_python",
        "empty",
        "repeated",
        "hit_limit",
    )
    return {
        **{name: getattr(scores, name) for name in names},
        "leaked": sum(any(part in text for part in TEMPLATE_PARTS) for text in predictions),
        "distinct": len(set(predictions)),
        "length_ratio": float(sums[LENGTH] / sums[REFERENCE_LENGTH]),
        "signatures": list(scores.signatures),
    }


def main(arguments: Sequence[str]) -> int:
    """Run one cell; returns the exit status that the command line would have."""
    study, folder, *threads = arguments
    os.chdir(study)
    if threads:
        torch.set_num_threads(int(threads[0]))
    try:
        work(Path(folder))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.number
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
