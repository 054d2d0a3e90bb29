"""`minipeft compare`: name the first tensor in which two models part."""

from __future__ import annotations

import argparse
import dataclasses
import json

from minipeft.cli.flags import add_fields, read_typed
from minipeft.cli.streams import show

HELP = "find the first tensor, forward and backward, in which two models differ"
EXAMPLE = """minipeft compare models/mine models/mine --transformers
  minipeft compare gpt2 gpt2 --dtype-b bf16"""
SKIP = ("model-a", "model-b")


def add_flags(parser: argparse.ArgumentParser) -> None:
    from minipeft.runs.comparison import CompareConfig

    parser.add_argument("first", metavar="MODEL_A", help="folder or hub id of a checkpoint, or demo")
    parser.add_argument("second", metavar="MODEL_B", help="the model to compare it with")
    add_fields(parser, CompareConfig, skip=SKIP)
    parser.add_argument("--json", action="store_true", help="print all tensors as JSON")


def main(options: argparse.Namespace) -> int:
    from minipeft.runs.comparison import STAGES, CompareConfig, as_text, compare

    config = CompareConfig(options.first, options.second, **read_typed(CompareConfig, options, skip=SKIP))
    found = compare(config)
    if options.json:
        parted = {stage: dataclasses.asdict(row) for stage in STAGES if (row := found.first(stage))}
        show(json.dumps({"equal": found.equal, "first": parted, **dataclasses.asdict(found)}, indent=2))
    else:
        show(as_text(found, config.every))
    return 0
