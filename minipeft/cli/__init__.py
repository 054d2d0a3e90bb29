"""The command line: `minipeft study`, `train`, `generate`, `score`, `plan`, `inspect`.

Exit status: 0 done, 2 bad input (one line, `error: FILE: WHERE: PROBLEM. HINT`), 130 or 143 stopped by a signal with
the run saved. `--debug` shows the traceback instead of the line.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from minipeft.cli.commands import COMMANDS, report
from minipeft.errors import InputError

EXAMPLES = {
    "study": "minipeft study --out study\n"
    "  minipeft study --model gpt2 --method lora prefix --data conala --seeds 3 --out study",
    "train": "minipeft train --model gpt2 --method lora --data conala --out runs/lora --epochs 3",
    "generate": "minipeft generate --model gpt2 --adapter runs/lora/adapter 'sort a list of tuples by second element'\n"
    "  minipeft generate --model gpt2 --adapter runs/lora/adapter --data conala --split test --out answers.jsonl",
    "score": "minipeft score answers.jsonl",
    "plan": "minipeft plan gpt2 --method lora --length 1024 --batch 4\n"
    "  minipeft plan --preset paper --activation-checkpointing",
    "inspect": "minipeft inspect runs/lora/adapter",
}
HELP = {
    "study": "compare ways of tuning, from nothing to a table and a report; the same line goes on where it was stopped",
    "train": "tune a model on pairs of intent and snippet, resumably",
    "generate": "answer prompts, or all questions of a data set",
    "score": "score a file of predictions against their references",
    "plan": "say what training would take, from config.json alone: parameters, memory, time",
    "inspect": "say what an adapter's or a model's folder holds, without loading it",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = make_parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        if sys.stdout is not None:  # None where it was closed before we began
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (InputError, OSError) as error:
        if options.debug:
            raise
        place = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        report(f"error: {place}{error.strerror or error if isinstance(error, OSError) else error}")
        return 2


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the flags in one line, as all other errors, and which flag may have been meant."""

    def error(self, message: str) -> NoReturn:
        hints = [f"See {self.prog} --help"]
        if message.startswith("unrecognized arguments: "):
            unknown = message.split(": ", 1)[1].split()[0].split("=")[0]
            near = difflib.get_close_matches(unknown, self.flags(), 1, 0.5)
            message = f"{unknown} is not known"
            hints = [f"Did you mean {flag}? " for flag in near] + hints
        report(f"error: {self.prog}: {' '.join(message.split())}. {''.join(hints)}")
        raise SystemExit(2)

    def flags(self) -> list[str]:
        """All flags of this parser and of its commands."""
        subparsers = [a for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        below: list[Parser] = [parser for action in subparsers for parser in action.choices.values()]
        own = [flag for action in self._actions for flag in action.option_strings]
        return own + [flag for parser in below for flag in parser.flags()]


def make_parser() -> argparse.ArgumentParser:
    """All commands and flags."""
    parser = Parser(prog="minipeft", description="Parameter-efficient fine-tuning from scratch in plain PyTorch.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (run, fill) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=HELP[name],
            description=HELP[name].capitalize() + ".",
            allow_abbrev=False,
            epilog=f"example:\n  {EXAMPLES[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        fill(command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=run)
    return parser
