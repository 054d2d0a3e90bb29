"""`minipeft inspect`: list what the folder of an adapter or a model holds; with --html, measure its updates."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from minipeft.cli.flags import add_fields, read_typed
from minipeft.cli.streams import report, show

if TYPE_CHECKING:
    from minipeft.adapters.microscope import MicroscopeConfig

HELP = "list what the folder of an adapter or a model holds, or draw the updates of one or two adapters"
EXAMPLE = """minipeft inspect runs/lora/adapter
  minipeft inspect runs/lora/adapter runs/full/model --model gpt2 --html"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    from minipeft.adapters.microscope import MicroscopeConfig

    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of an adapter or a model")
    parser.add_argument("other", type=Path, nargs="?", metavar="OTHER", help="another one beside it, with --html")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    add_fields(parser.add_argument_group("page"), MicroscopeConfig)


def main(options: argparse.Namespace) -> int:
    from minipeft.adapters.inspection import as_table, describe
    from minipeft.adapters.microscope import MicroscopeConfig
    from minipeft.errors import InputError

    config = MicroscopeConfig(**read_typed(MicroscopeConfig, options))
    if config.html:
        return draw([folder for folder in (options.folder, options.other) if folder is not None], config)
    for name, value in (("OTHER", options.other), ("--model", config.model)):
        if value is not None:
            raise InputError("is for the page alone", where=name, hint="Add --html")
    found = describe(options.folder)
    show(json.dumps(found, indent=2) if options.json else as_table(found))
    return 0


def draw(folders: list[Path], config: MicroscopeConfig) -> int:
    """Measure the folders, write the page and report its first sentences."""
    from minipeft.adapters.microscope import describe_samples, examine
    from minipeft.files import write_whole
    from minipeft.study.adapter_page import draw_adapter_page

    samples = [examine(folder, config.model) for folder in folders]
    page = draw_adapter_page(samples).encode()
    write_whole(Path(config.out), lambda stream: stream.write(page))
    report("\n".join(describe_samples(samples)))
    show(config.out)
    return 0
