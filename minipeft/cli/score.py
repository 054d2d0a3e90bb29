"""`minipeft score`: score a file of predictions against their references."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HELP = "score a file of predictions against their references"
EXAMPLE = "minipeft score answers.jsonl"


def add_flags(parser: argparse.ArgumentParser) -> None:
    example = '{"prediction": TEXT, "reference": TEXT or list}'
    parser.add_argument("file", type=Path, metavar="FILE", help=f"JSON lines: {example}, and question_id where known")
    what = "of the references; text has no CodeBLEU and no validity (default: found from the references)"
    parser.add_argument("--language", choices=("auto", "python", "text"), default="auto", help=what)
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")


def main(options: argparse.Namespace) -> int:
    from minipeft.metrics.scores import as_text, score_texts
    from minipeft.runs.answers import read_answers

    read = read_answers(options.file)
    scores = score_texts(
        read.predictions, read.references, questions=read.questions, hit_limit=read.cut, language=options.language
    )
    print(json.dumps(scores.as_dict(), indent=2) if options.json else as_text(scores))
    return 0
