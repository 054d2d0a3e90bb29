"""`minipeft inspect`: list what the folder of an adapter or a model holds, without loading it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from minipeft.cli.streams import show

HELP = "list what the folder of an adapter or a model holds, without loading it"
EXAMPLE = "minipeft inspect runs/lora/adapter"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of an adapter or a model")
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def main(options: argparse.Namespace) -> int:
    from minipeft.adapters.inspection import as_table, describe

    found = describe(options.folder)
    lines = json.dumps(found, indent=2) if options.json else as_table(found)
    show(lines)
    return 0
