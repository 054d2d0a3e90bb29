"""`minipeft study`: train and compare methods, and write a table and a report; the same command resumes."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator

from minipeft.cli.flags import add_fields, read_typed
from minipeft.cli.streams import report, show
from minipeft.cli.train import add_run_flags, read_run_settings
from minipeft.errors import InputError

HELP = "train and compare methods, and write a table and a report; the same command resumes"
EXAMPLE = """minipeft study --out study
  minipeft study --model gpt2 --method lora prefix --data conala --seeds 3 --out study
  minipeft study --preset paper --recipe paper --plan --gpu H100"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    from minipeft.runs.folder import FolderConfig
    from minipeft.runs.process import ProcessConfig
    from minipeft.study.presets import OWN, StudyConfig

    add_fields(parser, FolderConfig, skip=("resume", "overwrite"))  # a study always resumes
    for action in parser._actions:
        action.required = action.required and action.dest != "out"  # --plan needs none
    parser.add_argument("--plan", action="store_true", help="print what each cell would cost, and run nothing")
    parser.add_argument("--json", action="store_true", help="print results.json instead of the table")
    add_fields(parser, StudyConfig, several="+")
    add_fields(parser, ProcessConfig)
    add_run_flags(parser, skip=OWN)


def main(options: argparse.Namespace) -> int:
    """Status 0, or 2 where a cell failed, or with --plan does not fit the GPU."""
    from minipeft.runs.process import ProcessConfig
    from minipeft.study.plans import as_table, list_objects
    from minipeft.study.presets import OWN, StudyConfig
    from minipeft.study.report import as_json, as_terminal, write_report
    from minipeft.study.results import assemble
    from minipeft.study.runner import conduct, plan_study

    process = ProcessConfig(**read_typed(ProcessConfig, options))
    config = StudyConfig(
        **read_typed(StudyConfig, options), settings=read_run_settings(options, skip=OWN), process=process
    )
    if options.plan:
        plans, errors = plan_study(config)
        show(json.dumps(list_objects(plans), indent=2) if options.json else as_table(plans, config.gpu))
        for error in errors.values():
            report(f"error: {error}")
        return 2 if errors or any(one.problem for one in plans) else 0
    if not hasattr(options, "out"):
        raise InputError("must be given: the study's folder", where="out")
    try:
        outcomes = conduct(config, options.out, say=report)
    except (KeyboardInterrupt, SystemExit):
        report("stopped; the same command resumes")
        raise
    failed = any(outcome.error is not None and not outcome.waiting for outcome in outcomes)
    if left := sum(outcome.waiting for outcome in outcomes):
        report(f"{left} cells of other shares are not finished; without --cell the command finishes and reports all")
        return 2 if failed else 0
    results = assemble(outcomes, config, options.out, format_command(options))
    write_report(results, options.out)
    show(json.dumps(as_json(results), indent=2) if options.json else as_terminal(results, options.out))
    return 2 if failed else 0


def format_command(options: argparse.Namespace) -> str:
    """Format the command as shell words, without --debug and --json."""
    parser = argparse.ArgumentParser()
    add_flags(parser)
    words = ["minipeft", "study"]
    for action in parser._actions:
        if action.dest not in ("json", "help", "plan") and hasattr(options, action.dest):
            words += make_words(action, getattr(options, action.dest))
    return shlex.join(words)


def make_words(action: argparse.Action, value: object) -> Iterator[str]:
    """A flag and its value as words of a command."""
    flag = action.option_strings[0]
    if isinstance(value, bool):
        yield flag if value else action.option_strings[-1]
    elif isinstance(value, dict):
        for name, entry in value.items():
            yield from (flag, f"{name}={entry}")
    elif isinstance(value, tuple):  # one word: --layers 0,1 and --targets q_proj,v_proj
        yield from (flag, ",".join(map(str, value)))
    else:
        yield from (flag, *map(str, value if isinstance(value, list) else [value]))
