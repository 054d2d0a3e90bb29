"""`minipeft data`: show which tokens of a data set are supervised, before training."""

from __future__ import annotations

import argparse
import json
import sys

from minipeft.cli.flags import add_fields, read_typed

HELP = "show the supervised tokens of a data set, its lengths, cut examples, and held-out rows that are also trained on"
EXAMPLE = "minipeft data chats.jsonl --model Qwen/Qwen2.5-0.5B-Instruct --length 2048"
SKIP_MODEL = ("dtype", "device", "legacy-bin")  # no weights are loaded
SKIP_DATA = ("data",)
SKIP_ROWS = ("batch", "isolate")


def add_flags(parser: argparse.ArgumentParser) -> None:
    from minipeft.data.packing import PackConfig
    from minipeft.runs.config import DataConfig, ModelConfig
    from minipeft.runs.survey import SurveyConfig

    parser.add_argument("source", metavar="FILE", help="data set, as for train --data")
    add_fields(parser, SurveyConfig)
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    add_fields(parser.add_argument_group("model"), ModelConfig, skip=SKIP_MODEL)
    add_fields(parser.add_argument_group("data"), DataConfig, skip=SKIP_DATA)
    add_fields(parser.add_argument_group("packing"), PackConfig, skip=SKIP_ROWS)


def main(options: argparse.Namespace) -> int:
    from minipeft.data.packing import PackConfig
    from minipeft.runs.config import DataConfig, ModelConfig
    from minipeft.runs.survey import SurveyConfig, survey

    config = SurveyConfig(
        ModelConfig(**read_typed(ModelConfig, options, skip=SKIP_MODEL)),
        DataConfig(options.source, **read_typed(DataConfig, options, skip=SKIP_DATA)),
        PackConfig(**read_typed(PackConfig, options, skip=SKIP_ROWS)),
        **read_typed(SurveyConfig, options),
    )
    found = survey(config)
    print(json.dumps(found.as_json(), indent=2) if options.json else found.as_text(colour=sys.stdout.isatty()))
    return 0
