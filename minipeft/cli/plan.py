"""`minipeft plan`: predict parameters, memory and time of training from config.json alone."""

from __future__ import annotations

import argparse
import json

from minipeft.cli.flags import add_fields, add_flag, add_method_flags, read_method_settings, read_typed, was_typed
from minipeft.cli.streams import show

HELP = "predict parameters, memory and time of training from config.json alone"
EXAMPLE = """minipeft plan gpt2 --method lora --length 1024 --batch 4
  minipeft plan --preset paper --activation-checkpointing
  minipeft study --preset paper --plan   # the cells as the study runs them"""
SKIP = ("model", "legacy-bin", "eos-token")  # settings of a model that a plan does not use
ROWS = ("isolate", "loss-mask")  # settings of packing without effect on a plan: each row counts as one document
TRAIN = ("activation-checkpointing", "optimizer-in-backward", "clip")  # settings of training that a plan depends on


def add_flags(parser: argparse.ArgumentParser) -> None:
    from minipeft.data.packing import PackConfig
    from minipeft.runs.config import ModelConfig, collect_settings
    from minipeft.study.presets import PlanConfig

    parser.add_argument("models", nargs="*", metavar="M", help="folders, hub ids or demo; only config.json is read")
    add_fields(parser, PlanConfig, several="+")
    parser.add_argument("--json", action="store_true", help="print the plans as JSON")
    add_fields(parser.add_argument_group("model"), ModelConfig, skip=SKIP)
    group = parser.add_argument_group("training")
    add_fields(group, PackConfig, skip=ROWS)
    for name in TRAIN:
        add_flag(group, collect_settings()[name])
    add_method_flags(parser)


def main(options: argparse.Namespace) -> int:
    from minipeft.data.packing import PackConfig
    from minipeft.runs.config import ModelConfig, make_method_config, share_settings
    from minipeft.runs.estimates import plan_row
    from minipeft.runs.planning import as_table
    from minipeft.study.presets import PlanConfig
    from minipeft.training.loop import TrainConfig

    config = PlanConfig(**read_typed(PlanConfig, options), named=tuple(options.models))
    shared, packing = (
        read_typed(ModelConfig, options, skip=SKIP),
        PackConfig(**read_typed(PackConfig, options, skip=ROWS)),
    )
    names = [flag.replace("-", "_") for flag in TRAIN if was_typed(flag, options)]
    train = TrainConfig(**{name: getattr(options, name) for name in names})
    each = share_settings(config.method, read_method_settings(options))
    rows = []
    for source in config.models:
        for name in config.method:
            adapter = make_method_config(name, each[name])
            rows.append(plan_row(ModelConfig(source, **shared), adapter, packing, train))
    show(json.dumps(rows, indent=2) if options.json else as_table(rows))
    return 0
