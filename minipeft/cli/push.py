"""`minipeft push`: upload an adapter's or a model's folder to the Hugging Face hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from minipeft.cli.streams import report

HELP = "upload an adapter or a model to the hub, as a private repository"
EXAMPLE = "minipeft push runs/lora/adapter owner/name"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of an adapter or a model")
    parser.add_argument("hub_id", metavar="OWNER/NAME", help="repository, made where there is none")
    parser.add_argument("--public", action="store_true", help="make the repository public; default private")
    parser.add_argument("--revision", metavar="TEXT", help="branch, made where there is none; default main")


def main(options: argparse.Namespace) -> int:
    from minipeft.runs.publishing import publish

    commit, left = publish(options.folder, options.hub_id, public=options.public, revision=options.revision)
    if left:
        report(f"note: not pushed: {', '.join(left[:8])}{' ...' if len(left) > 8 else ''}")
    print(f"{options.hub_id}: {commit}")
    return 0
