"""Turns the cells of a study into its results: differences to the untrained model, flags, means over seeds."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from minipeft.files import read_object
from minipeft.metrics.bootstrap import Interval, bootstrap_bleu
from minipeft.metrics.scores import Scores
from minipeft.study.cells import ZERO_SHOT, Cell
from minipeft.study.effects import add_effects
from minipeft.study.paper import find_reported
from minipeft.study.presets import PRESETS, StudyConfig
from minipeft.study.rates_experiment import LABELS
from minipeft.study.rows import Data, Group, Results, Row, Training
from minipeft.study.runner import Outcome
from minipeft.study.statistics import compute_mean_and_sd, flag


def assemble(outcomes: Sequence[Outcome], config: StudyConfig, out: Path, command: str) -> Results:
    """Build the results of a study."""
    rows = {outcome.cell.name: make_row(outcome, config.recipe) for outcome in outcomes}
    trivial = [(row.method, row.scores["bleu"] or 0.0) for row in rows.values() if not row.model and row.scores]
    floor = max(trivial, key=lambda pair: pair[1])
    bases: dict[str, list[Scores]] = {}  # of each model the scores of its untrained cells, one a seed
    for row in rows.values():
        if row.method == ZERO_SHOT and row.scores is not None:
            bases.setdefault(row.model, []).append(row.scores)
    for name, row in rows.items():
        if row.error is None:
            rows[name] = replace(row, difference=compute_difference(row, row.scores, bases), flags=flag(row, floor))
    alike: dict[tuple[object, ...], list[Row]] = {}
    for outcome in outcomes:
        if not (PRESETS[config.preset].searches and outcome.cell.is_silent):
            alike.setdefault(outcome.cell.key, []).append(rows[outcome.cell.name])
    groups = add_effects([make_group(same, bases) for same in alike.values()])
    return Results(
        command,
        config.preset,
        describe_data(config, groups[0], out),
        describe_environment(config),
        tuple(rows.values()),
        groups,
    )


def make_row(outcome: Outcome, recipe: str) -> Row:
    """Make a cell's row; that of a failed cell has its name and error alone."""
    cell: Cell = outcome.cell
    row = outcome.row or Row(cell.name, cell.model, cell.method, cell.seed)
    if row.training.recipe is not None and recipe != "best":
        row = replace(row, training=replace(row.training, recipe=recipe))
    paper = find_reported(cell.model, cell.method) or None
    return replace(row, cell=cell.name, variant=cell.variant, error=outcome.error, paper=paper)


def compute_difference(row: Row, scores: Scores | None, bases: dict[str, list[Scores]]) -> Interval | None:
    """Compute the BLEU difference to the untrained model on the same questions."""
    if scores is None or row.method == ZERO_SHOT or row.model not in bases:
        return None
    return bootstrap_bleu(scores.runs, [run for base in bases[row.model] for run in base.runs])


def make_group(rows: Sequence[Row], bases: dict[str, list[Scores]]) -> Group:
    """Group cells that differ only by seed."""
    done, failed = [row for row in rows if row.error is None], [row for row in rows if row.error is not None]
    first = (done or failed)[0]
    group = Group(
        first.model,
        first.method,
        seeds=tuple(row.seed for row in rows),
        cells=tuple(row.cell for row in rows),
        label=LABELS.get(first.variant or first.method, ""),
        paper=first.paper,
    )
    if not done:
        return replace(group, error=first.error)
    several = [row.scores for row in done if row.scores is not None]
    scores = Scores.mean(several) if several else None
    flags = [text for row in done for text in row.flags]
    flags += [f"seed {row.seed} failed: {row.error}" for row in failed]
    return replace(
        group,
        training=Training.mean([row.training for row in done]),
        scores=scores,
        bleu_sd=compute_sd([one["bleu"] for one in several]),
        dev_loss_sd=compute_sd([row.training.dev_loss for row in done]),
        difference=compute_difference(first, scores, bases),
        flags=tuple(dict.fromkeys(flags)),
    )


def compute_sd(values: Sequence[float | None]) -> float | None:
    """Compute the sample standard deviation of the values that are not None."""
    known = [value for value in values if value is not None]
    return compute_mean_and_sd(known)[1] if known else None


def describe_data(config: StudyConfig, baseline: Group, out: Path) -> Data:
    """Describe the test set: size and hashes; a baseline has answered all of it."""
    about, scores = read_object(out / "study.json"), baseline.scores
    assert scores is not None  # a baseline cannot fail
    source = config.data or PRESETS[config.preset].data
    return Data(source, scores.pairs, scores.questions, about["train_sha256"], about["test_sha256"])


def describe_environment(config: StudyConfig) -> dict[str, str | int | None]:
    """List versions and hardware, which affect times and the last digits of scores."""
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
