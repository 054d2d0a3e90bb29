"""The command line: `minipeft study`, `data`, `train`, `generate`, `chat`, ..., `tour`; one file for each command.

Exit status: 0 done, 2 bad input (one line, `error: FILE: WHERE: PROBLEM. HINT`), 130 or 143 stopped by a signal with
the run saved, 75 another process of the training is lost. `--debug` shows the traceback instead of the line.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

from minipeft.cli import chat, compare, data, exercise, generate, inspect, merge, plan, push, score, study, tour, train
from minipeft.cli.streams import report
from minipeft.errors import InputError

COMMANDS: dict[str, Any] = {"study": study, "data": data, "train": train, "generate": generate, "chat": chat,
            "score": score, "plan": plan, "inspect": inspect, "merge": merge, "push": push,
             "compare": compare, "tour": tour, "exercise": exercise}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    from minipeft.runs.process import lossy_stderr

    with lossy_stderr():
        return run_command(arguments)


def run_command(arguments: Sequence[str] | None) -> int:
    """Parse the arguments and run the command; an error becomes a line and a status."""
    from minipeft.runs.process import is_out_of_memory

    options = argparse.Namespace(debug=False)
    try:
        given = sys.argv[1:] if arguments is None else list(arguments)
        options = make_parser(given[:1]).parse_args(given)
        status: int = options.run(options)
        if sys.stdout is not None:  # None if it was closed before the process began
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader closed the pipe, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MemoryError, RuntimeError, ImportError, InputError, OSError) as error:
        if options.debug:
            raise
        if is_out_of_memory(error):
            report("error: out of memory. What was written is whole: free memory and give the command again")
            return 2
        if not isinstance(error, InputError | OSError):
            raise
        place = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        report(f"error: {place}{error.strerror or error if isinstance(error, OSError) else error}".replace("\n", "\\n"))
        return 2


class Parser(argparse.ArgumentParser):
    """Reports an unknown flag in one line, like every other error, and suggests a similar one."""

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


def make_parser(chosen: Collection[str] = COMMANDS) -> argparse.ArgumentParser:
    """Build the parser of all commands, and of the chosen ones' flags: each imports what declares its flags."""
    parser = Parser(prog="minipeft", description="Parameter-efficient fine-tuning from scratch in plain PyTorch.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.HELP.capitalize() + ".",
            allow_abbrev=False,
            epilog=f"example:\n  {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name in chosen:
            module.add_flags(command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=module.main)
    return parser
