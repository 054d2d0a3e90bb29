"""`minipeft train`: fine-tune a model on a data set; resumable."""

from __future__ import annotations

import argparse
import json
from typing import Any

from minipeft.cli.flags import add_fields, add_flag, add_method_flags, read_method_settings, read_typed
from minipeft.cli.streams import report, show

HELP = "fine-tune a model on pairs of intent and snippet, resumably"
EXAMPLE = """minipeft train --model gpt2 --method lora --data conala --out runs/lora --epochs 3
  torchrun --nproc_per_node=4 -m minipeft train --model gpt2 --data conala --accumulate 4 --out runs/four"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    from minipeft.adapters import list_method_names
    from minipeft.runs.folder import FolderConfig
    from minipeft.runs.process import ProcessConfig
    from minipeft.training.processes import ParallelConfig

    add_fields(parser, FolderConfig)
    add_fields(parser, ProcessConfig)
    add_fields(parser.add_argument_group("several processes, which torchrun starts"), ParallelConfig)
    parser.add_argument(
        "--method", default="lora", metavar="NAME", help=f"{', '.join(list_method_names())} (default lora)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    add_run_flags(parser)


def add_run_flags(parser: argparse.ArgumentParser, skip: tuple[str, ...] = ()) -> None:
    """Add the flags of every setting of a training run, in groups, except those in `skip`."""
    from minipeft.adapters.method import Recipe
    from minipeft.runs.config import SECTIONS, RunConfig, list_settings

    defaults = dict.fromkeys(Recipe.__dataclass_fields__, "the method's own")
    for section, config in SECTIONS.items():
        group = parser.add_argument_group(section if section != "train" else "training")
        add_fields(group, config, skip=skip, defaults=defaults if section == "train" else None)
    for setting in list_settings(RunConfig, "run"):  # the last group is the training's
        if setting.name not in skip:
            add_flag(group, setting)
    add_method_flags(parser, skip)


def read_run_settings(options: argparse.Namespace, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read the given flags of `add_run_flags`, under run_config's names."""
    from minipeft.runs.config import SECTIONS, RunConfig, list_settings

    names = {setting.name for config in (*SECTIONS.values(), RunConfig) for setting in list_settings(config, "")}
    chosen = {name.replace("-", "_"): None for name in sorted(names) if name not in skip}
    return {
        **{name: getattr(options, name) for name in chosen if hasattr(options, name)},
        **read_method_settings(options),
    }


def main(options: argparse.Namespace) -> int:
    from minipeft.runs.config import run_config
    from minipeft.runs.finetune import finetune
    from minipeft.runs.folder import FolderConfig
    from minipeft.runs.process import ProcessConfig, Stopped
    from minipeft.training.launch import join
    from minipeft.training.processes import ParallelConfig
    from minipeft.training.watch import LOST_STATUS, LostProcess

    ProcessConfig(**read_typed(ProcessConfig, options)).apply()
    folder = FolderConfig(**read_typed(FolderConfig, options))
    config = run_config(options.method, **read_run_settings(options))
    parallel = ParallelConfig(**read_typed(ParallelConfig, options))
    try:
        with join(parallel) as processes:
            result = finetune(config, **vars(folder), say=report, processes=processes)
    except Stopped as stopped:
        report(f"{stopped}; continue with --resume")
        return 128 + stopped.number
    except LostProcess as lost:
        report(f"error: {lost}")
        return LOST_STATUS
    if processes.rank:
        return 0
    if options.json:
        print(json.dumps(result, indent=2))
        return 0
    speed = f", {result['tokens_per_second']:.0f} tokens/s" if result["tokens_per_second"] else ""
    held_out = f", held-out loss {result['dev_loss']:.3f}" if result["dev_loss"] is not None else ""
    kind = "model" if config.method.trains_base else "adapter"
    show(
        f"{folder.out / kind}: {result['steps']} steps, loss {result['loss']:.3f}{held_out}{speed}, "
        f"peak {result['peak_memory_bytes'] / 1e9:.1f} GB"
    )
    return 0
