"""`minipeft score`: score a file of answers, execute them on request, and compare two files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from minipeft.errors import check_fields, option
from minipeft.metrics.bootstrap import Interval
from minipeft.metrics.execution import PROTECTION, Limits, run_programs
from minipeft.metrics.paired import compare, match_answers
from minipeft.metrics.programs import build_programs
from minipeft.metrics.scores import LANGUAGES, Answers, Score, Scores, score_texts
from minipeft.runs.answers import read_answer_lines, read_answers


@dataclass(frozen=True)
class ScoreConfig:
    """Settings of scoring a file of answers."""

    language: str = option(
        "auto",
        "language of the references; text gets no CodeBLEU and no validity, auto detects it",
        choices=("auto", *LANGUAGES),
    )
    against: Path | None = option(
        None, "another system's answers to the same questions: print the paired differences with intervals"
    )
    execute: str | None = option(
        None, f"run each answer against its task in this file of HumanEval, MBPP or ODEX tasks, or demo: {PROTECTION}"
    )
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        check_fields(self)


def score_answers(file: Path, config: ScoreConfig) -> tuple[Scores, list[tuple[Score, Interval]]]:
    """Score a file, and compare it with `config.against` if given; returns scores and differences.

    Raises:
        InputError: a file cannot be read, the two files answer different questions, or programs cannot be run here.
    """
    answers, scores = score_file(file, config)
    if config.against is None:
        return scores, []
    theirs, _ = score_file(config.against, config)
    mine, others = (list(zip(side.questions, side.references)) for side in (answers, theirs))
    return scores, compare(answers, reorder(theirs, match_answers(mine, others, config.against)), scores.language)


def score_file(file: Path, config: ScoreConfig) -> tuple[Answers, Scores]:
    """Read and score the answers of a file."""
    read, passed = read_answers(file), None
    if config.execute is not None:
        outcomes = run_programs(build_programs(list(read_answer_lines(file)), config.execute), config.limits)
        passed = [outcome.status == "passed" for outcome in outcomes]
    scores = score_texts(
        read.predictions,
        read.references,
        questions=read.questions,
        hit_limit=read.cut,
        language=config.language,
        passed=passed,
    )
    lists = [[texts] if isinstance(texts, str) else texts for texts in read.references]
    return Answers(read.predictions, lists, read.cut, passed, read.questions), scores


def reorder(answers: Answers, places: Sequence[int]) -> Answers:
    """Put the answers into another order."""
    return Answers(
        [answers.predictions[place] for place in places],
        [answers.references[place] for place in places],
        None if answers.hit_limit is None else [answers.hit_limit[place] for place in places],
        None if answers.passed is None else [answers.passed[place] for place in places],
        [answers.questions[place] for place in places],
    )
