"""`minipeft tour`: build the guided tour as one HTML page and one Markdown file."""

from __future__ import annotations

import argparse

from minipeft.cli.flags import add_fields, read_typed
from minipeft.cli.streams import report, show

HELP = "build the guided tour: the source explained, with numbers computed on the demo model"
EXAMPLE = "minipeft tour --out tour"


def add_flags(parser: argparse.ArgumentParser) -> None:
    from minipeft.tour.book import TourConfig

    add_fields(parser, TourConfig)


def main(options: argparse.Namespace) -> int:
    from minipeft.tour.book import TourConfig, build_tour

    for file in build_tour(TourConfig(**read_typed(TourConfig, options)), report):
        show(str(file))
    return 0
