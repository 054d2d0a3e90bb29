"""`minipeft push`: upload an adapter's or a model's folder to the Hugging Face hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from minipeft.cli.flags import add_fields, read_typed
from minipeft.cli.streams import report

HELP = "upload an adapter or a model to the hub, as a private repository"
EXAMPLE = "minipeft push runs/lora/adapter owner/name"


def add_flags(parser: argparse.ArgumentParser) -> None:
    from minipeft.runs.publishing import PushConfig

    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of an adapter or a model")
    parser.add_argument("hub_id", metavar="OWNER/NAME", help="repository, created if it does not exist")
    add_fields(parser, PushConfig)


def main(options: argparse.Namespace) -> int:
    from minipeft.runs.publishing import PushConfig, publish

    commit, left = publish(options.folder, options.hub_id, PushConfig(**read_typed(PushConfig, options)))
    if left:
        report(f"note: not pushed: {', '.join(left[:8])}{' ...' if len(left) > 8 else ''}")
    print(f"{options.hub_id}: {commit}")
    return 0
