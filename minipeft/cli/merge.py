"""`minipeft merge`: merge an adapter into its model's weights, and report the change before anything is written."""

from __future__ import annotations

import argparse
import dataclasses
import json

from minipeft.cli.flags import add_fields, read_typed
from minipeft.cli.streams import report as say

HELP = "merge an adapter into its model, and report the change before anything is written"
EXAMPLE = "minipeft merge --model gpt2 --adapter runs/lora/adapter --data conala --out merged"
SKIP = ("dtype",)  # the model is loaded in its own dtype; MergeConfig's is the dtype of the written weights


def add_flags(parser: argparse.ArgumentParser) -> None:
    from minipeft.runs.config import ModelConfig
    from minipeft.runs.process import ProcessConfig
    from minipeft.runs.publishing import MergeConfig

    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    add_fields(parser, MergeConfig)
    add_fields(parser, ProcessConfig)
    add_fields(parser.add_argument_group("model"), ModelConfig, skip=SKIP)


def main(options: argparse.Namespace) -> int:
    from minipeft.runs.config import ModelConfig
    from minipeft.runs.process import ProcessConfig
    from minipeft.runs.publishing import MergeConfig, merge_into_folder

    model = ModelConfig(**read_typed(ModelConfig, options, skip=SKIP))
    config = MergeConfig(model, **read_typed(MergeConfig, options))
    ProcessConfig(**read_typed(ProcessConfig, options)).apply()
    report = merge_into_folder(config, say)
    print(json.dumps(dataclasses.asdict(report), indent=2) if options.json else config.out)
    return 0
