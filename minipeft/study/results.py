"""What results.json holds: each cell's row with its interval, its difference to the untrained model and its flags.

    {"format", "command", "preset", "data", "environment", "cells": [a row for each cell and seed],
     "groups": [the same over seeds: mean, spread, one interval]}

All shares and BLEU are 0..1. A failed cell is a row with "error" and no scores.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minipeft.files import read_object
from minipeft.metrics.bleu import Interval, count_pairs
from minipeft.runs.answers import answers_in
from minipeft.study.cells import ANSWERS
from minipeft.study.presets import PRESETS, ZERO_SHOT, Cell, StudyConfig, printed
from minipeft.study.runner import FORMAT, Outcome
from minipeft.study.statistics import by_question, flags, interval, mean_and_sd

AVERAGED = (
    "bleu", "codebleu", "codebleu_compat", "exact_match", "chrf", "valid_python", "empty", "repeated", "hit_limit",
    "leaked", "length_ratio", "dev_loss", "dev_loss_start", "train_seconds", "tokens_per_second", "peak_memory_bytes",
)  # fmt: skip
ALIKE = (
    "model", "method", "recipe", "init", "reparam", "learning_rate", "steps", "trainable", "trainable_percent",
    "stored", "pairs", "signatures",
)  # fmt: skip


def assemble(outcomes: Sequence[Outcome], config: StudyConfig, out: Path, command: str) -> dict[str, Any]:
    """All that is known of a study, as results.json holds it."""
    done = [outcome for outcome in outcomes if outcome.row is not None]
    answers = {outcome.cell.name: out / "cells" / outcome.cell.name / ANSWERS for outcome in done}
    counts = {name: counted(file) for name, file in answers.items() if file.exists()}
    rows = {outcome.cell.name: row_of(outcome) for outcome in outcomes}
    floor = max(((row["method"], row["bleu"]) for row in rows.values() if not row["model"]), key=lambda pair: pair[1])
    bases: dict[str, list[np.ndarray]] = {}
    for outcome in done:
        if outcome.cell.method == ZERO_SHOT:
            bases.setdefault(outcome.cell.model, []).append(counts[outcome.cell.name])
    for name in answers:
        own = [counts[name]] if name in counts else []
        rows[name] |= compared(rows[name], own, bases) | {"flags": flags(rows[name], floor)}
    alike: dict[tuple[object, ...], list[str]] = {}
    for outcome in outcomes:
        alike.setdefault(key_of(outcome.cell), []).append(outcome.cell.name)
    groups = [group_of([rows[name] for name in names], counts, bases) for names in alike.values()]
    return {
        "format": FORMAT,
        "command": command,
        "preset": config.preset,
        "data": about_data(config, groups, out),
        "environment": environment(config),
        "cells": list(rows.values()),
        "groups": groups,
    }


def key_of(cell: Cell) -> tuple[object, ...]:
    """What the seeds of one thing have in common: all but the seed."""
    return (cell.model, cell.method, *sorted((name, value) for name, value in cell.tune.items() if name != "seed"))


def counted(file: Path) -> np.ndarray:
    """BLEU's counts of a file of answers, a row a question. -> [Q, 10]"""
    rows = list(answers_in(file))
    counts = count_pairs([row["prediction"] for row in rows], [row["reference"] for row in rows])
    questions = [place if row["question_id"] is None else row["question_id"] for place, row in enumerate(rows)]
    return by_question(counts, questions)


def row_of(outcome: Outcome) -> dict[str, Any]:
    """A cell's row, or what there is to say of one that failed."""
    cell = outcome.cell
    row = outcome.row or {"model": cell.model, "method": cell.method, "seed": cell.seed}
    return {"cell": cell.name, **row, "error": outcome.error, "paper": printed(cell.model, cell.method) or None}


def compared(row: dict[str, Any], own: list[np.ndarray], bases: dict[str, list[np.ndarray]]) -> dict[str, Any]:
    """The interval of a BLEU, and of its difference to the untrained model over the same questions."""
    if not own:
        return {"bleu_interval": None, "questions": 0, "difference": None}
    value, base = interval(own), bases.get(row["model"])
    other = None if base is None or row["method"] == ZERO_SHOT else interval(own, base)
    return {"bleu_interval": [value.low, value.high], "questions": len(own[0]), "difference": as_json(other)}


def as_json(found: Interval | None) -> dict[str, float | None] | None:
    """An interval as results.json holds it."""
    if found is None:
        return None
    return {"value": found.value, "low": found.low, "high": found.high, "p_value": found.p_value}


def group_of(
    rows: list[dict[str, Any]], counts: dict[str, np.ndarray], bases: dict[str, list[np.ndarray]]
) -> dict[str, Any]:
    """Several seeds of one thing as one row: means, the spread of BLEU, an interval over questions for the mean."""
    done = [row for row in rows if row["error"] is None]
    first = (done or rows)[0]
    group: dict[str, Any] = {name: first.get(name) for name in ALIKE}
    group |= {"seeds": [row["seed"] for row in rows], "cells": [row["cell"] for row in rows], "paper": first["paper"]}
    group["error"] = next((row["error"] for row in rows if row["error"] is not None), None) if not done else None
    if not done:
        return group
    for name in AVERAGED:
        values = [row[name] for row in done if row.get(name) is not None]
        group[name] = float(np.mean(values)) if values else None
    scored = [row for row in done if row["cell"] in counts]
    group["bleu_sd"] = mean_and_sd([row["bleu"] for row in scored])[1] if scored else None
    held = [row["dev_loss"] for row in done if row.get("dev_loss") is not None]
    group["dev_loss_sd"] = mean_and_sd(held)[1] if held else None
    group |= compared(first, [counts[row["cell"]] for row in scored], bases)
    group["flags"] = list(dict.fromkeys(flag for row in done for flag in row["flags"]))
    failed = [row for row in rows if row["error"] is not None]
    group["flags"] += [f"seed {row['seed']} failed: {row['error']}" for row in failed]
    return group


def about_data(config: StudyConfig, groups: list[dict[str, Any]], out: Path) -> dict[str, Any]:
    """What was answered; the first group is a baseline, which cannot fail."""
    source = config.data or PRESETS[config.preset].data
    about = read_object(out / "study.json")
    digests = {name: about[name] for name in ("train_sha256", "test_sha256")}  # of the files that they come from
    return {"source": source, "pairs": groups[0]["pairs"], "questions": groups[0]["questions"], **digests}


def environment(config: StudyConfig) -> dict[str, Any]:
    """What the times and the last digits depend on."""
    return {
        "minipeft": version("minipeft"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": config.threads or torch.get_num_threads(),
        "device": config.device,
        "gpu": torch.cuda.get_device_name() if config.device.startswith("cuda") else None,
    }
