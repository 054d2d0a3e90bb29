"""`minipeft score`: score a file of predictions against their references, and compare two files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from minipeft.cli.flags import add_fields, read_typed

HELP = "score a file of predictions against their references"
EXAMPLE = """minipeft score answers.jsonl
  minipeft score lora.jsonl --against full.jsonl
  minipeft score answers.jsonl --execute tasks.jsonl"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    from minipeft.metrics.execution import Limits
    from minipeft.study.scoring import ScoreConfig

    example = '{"prediction": TEXT, "reference": TEXT or list}'
    parser.add_argument("file", type=Path, metavar="FILE", help=f"JSON lines: {example}, and question_id where known")
    add_fields(parser, ScoreConfig)
    add_fields(parser, Limits)
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")


def main(options: argparse.Namespace) -> int:
    from minipeft.metrics import paired
    from minipeft.metrics.execution import Limits
    from minipeft.metrics.scores import as_text
    from minipeft.study.scoring import ScoreConfig, score_answers

    limits = Limits(**read_typed(Limits, options))
    config = ScoreConfig(**read_typed(ScoreConfig, options), limits=limits)
    scores, differences = score_answers(options.file, config)
    if options.json:
        extra = {"against": {score.name: vars(interval) for score, interval in differences}} if differences else {}
        print(json.dumps(scores.as_dict() | extra, indent=2))
        return 0
    print(as_text(scores))
    if differences:
        print(paired.as_text(differences, str(options.file), str(config.against), scores.questions))
    return 0
