"""The command line: `minipeft study`, `train`, `generate`, `score`, `inspect`; each flag is a field of a config.

Exit status: 0 done, 2 bad input (one line, `error: FILE: WHERE: PROBLEM. HINT`), 130 or 143 stopped by a signal with
the run saved. `--debug` shows the traceback instead of the line.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import shlex
import sys
import types
import typing
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from minipeft.errors import InputError

EXAMPLES = {
    "study": "minipeft study --out study\n"
    "  minipeft study --model gpt2 --method lora prefix --data conala --seeds 3 --out study",
    "train": "minipeft train --model gpt2 --method lora --data conala --out runs/lora --epochs 3",
    "generate": "minipeft generate --model gpt2 --adapter runs/lora/adapter 'sort a list of tuples by second element'\n"
    "  minipeft generate --model gpt2 --adapter runs/lora/adapter --data conala --split test --out answers.jsonl",
    "score": "minipeft score answers.jsonl",
    "inspect": "minipeft inspect runs/lora/adapter",
}
HELP = {
    "study": "compare ways of tuning, from nothing to a table and a report; the same line goes on where it was stopped",
    "train": "tune a model on pairs of intent and snippet, resumably",
    "generate": "answer prompts, or all questions of a data set",
    "score": "score a file of predictions against their references",
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
            name, help=HELP[name], description=HELP[name].capitalize() + ".", allow_abbrev=False,
            epilog=f"example:\n  {EXAMPLES[name]}", formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        fill(command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=run)
    return parser


def add_fields(
    parser: argparse.ArgumentParser, config: type, helps: dict[str, str], skip: tuple[str, ...] = ()
) -> None:
    """One flag for each field of a config dataclass: `--max-new-tokens` for max_new_tokens, `--no-isolate` for True."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if field.name in skip:
            continue
        flag, kind = "--" + field.name.replace("_", "-"), hints[field.name]
        if isinstance(kind, types.UnionType):
            kind = typing.get_args(kind)[0]
        said = helps.get(field.name, "")
        required = field.default is dataclasses.MISSING
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=said)
        elif typing.get_origin(kind) is tuple:
            parser.add_argument(flag, action="append", default=[], metavar="TEXT", help=said)
        else:
            shown = "" if required or field.default is None else f" (default {field.default})"
            parser.add_argument(flag, type=kind, required=required, default=None if required else field.default,
                                metavar=kind.__name__.upper(), help=said + shown)  # fmt: skip


def chosen(config: type, options: argparse.Namespace) -> Any:
    """The config filled from the flags."""
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(config) if hasattr(options, f.name)}
    return config(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


TRAIN_HELP = {
    "model": "folder or hub id of a GPT-2, Llama or Mistral checkpoint",
    "data": "conala, demo, or a file of pairs (JSON array or JSON lines with intent and snippet)",
    "method": "full, lora, prefix or prompt",
    "steps": "optimizer steps, instead of --epochs",
    "epochs": "passes over the data",
    "batch": "rows of --length tokens at a time",
    "accumulate": "batches a step",
    "length": "tokens of a row; default 1024, or the model's context",
    "learning_rate": "peak rate; default the method's own",
    "loss": "tokens that are learned: all or response",
    "isolate": "keep the documents of a row from seeing each other",
    "held_out": "pairs kept for evaluation, by question",
    "evaluate_every": "steps between evaluations; default once an epoch",
    "save_every": "steps between checkpoints",
    "seed": "of everything that is drawn",
    "dtype": "of the base: fp32 or bf16; default its own (fp32 where it is trained)",
    "device": "cpu, cuda, ...",
    "rank": "LoRA's r",
    "alpha": "LoRA's alpha; the update is scaled by alpha / rank",
    "dropout": "of LoRA's input",
    "targets": "LoRA's linears: all-linear, default, or names with commas between",
    "columns": "length of a prefix or prompt",
    "init": "start of a prefix or prompt: text, normal, peft (prefix), vocab (prompt)",
    "text": "what a prefix or prompt starts as",
    "reparam": "width of the network that makes a prefix or prompt while it trains (Li & Liang); default none",
    "deterministic": "on CUDA: the same bits each time, slower (a CPU gives them anyway)",
    "checkpointing": "recompute activations: less memory, more time",
    "legacy_bin": "read pytorch_model.bin where there are no safetensors",
    "eos_token": "the token that ends a text, where the tokenizer names none",
    "revision": "commit, tag or branch on the hub",
}
GENERATE_HELP = {
    "max_new_tokens": "tokens of an answer at most",
    "temperature": "0 is greedy",
    "top_p": "share of probability that is drawn from",
    "seed": "of the draws",
    "stop": "a text that ends an answer (may be given more than once)",
    "batch": "prompts at a time",
}


def fill_study(parser: argparse.ArgumentParser) -> None:
    from minipeft.study.grid import METHODS, PRESETS

    parser.add_argument("--preset", choices=PRESETS, default="demo", help="what to compare (default demo)")
    parser.add_argument("--model", nargs="+", default=[], metavar="M", help="folders, hub ids or demo")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME",
                        help="of full, lora, prefix, prompt (default all)")  # fmt: skip
    parser.add_argument("--data", metavar="DATA", help="demo, conala, or a file of pairs, a fifth of which is asked")
    parser.add_argument("--seeds", type=int, metavar="N", help="runs of each cell (default 1; prefix: 3)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the study's folder")
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps of each cell; default the preset's")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N questions only")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda, ...")
    parser.add_argument("--dtype", metavar="NAME", help="of the frozen base: fp32 or bf16; default its own")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default all cores")
    parser.add_argument("--json", action="store_true", help="print results.json instead of the table")


def run_study(options: argparse.Namespace) -> int:
    """`minipeft study`: status 0, or 2 where a cell failed."""
    from minipeft.study.conduct import conduct
    from minipeft.study.grid import StudyConfig
    from minipeft.study.report import terminal, write_report
    from minipeft.study.results import assemble

    config = chosen(StudyConfig, options)
    try:
        outcomes = conduct(config, options.out, say=report)
    except (KeyboardInterrupt, SystemExit):
        report("stopped; the same line goes on from here")
        raise
    results = assemble(outcomes, config, options.out, command_line(options))
    write_report(results, options.out)
    print(json.dumps(results, indent=2) if options.json else terminal(results, options.out))
    return 2 if any(outcome.error is not None for outcome in outcomes) else 0


def command_line(options: argparse.Namespace) -> str:
    """The line that was typed, without --debug and --json, as a shell would take it."""
    parser = argparse.ArgumentParser()
    fill_study(parser)
    words = ["minipeft", "study"]
    for action in parser._actions:
        value = getattr(options, action.dest, None)
        if action.dest in ("json", "help") or value in (None, action.default):
            continue
        words += [action.option_strings[0], *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def fill_train(parser: argparse.ArgumentParser) -> None:
    from minipeft.tuning import TuneConfig

    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the run's folder")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default all cores")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    add_fields(parser, TuneConfig, TRAIN_HELP)


def run_train(options: argparse.Namespace) -> int:
    """`minipeft train`"""
    from minipeft.tuning import Stopped, TuneConfig, tune

    set_threads(options.threads)
    try:
        result = tune(
            chosen(TuneConfig, options), options.out, resume=options.resume, overwrite=options.overwrite, say=report
        )
    except Stopped as stopped:
        print(f"{stopped}; go on with --resume", file=sys.stderr)
        return 128 + stopped.number
    if options.json:
        print(json.dumps(result, indent=2))
        return 0
    speed = f", {result['tokens_per_second']:.0f} tokens/s" if result["tokens_per_second"] else ""
    dev = f", held-out loss {result['dev_loss']:.3f}" if result["dev_loss"] is not None else ""
    kind = "model" if options.method == "full" else "adapter"
    print(f"{options.out / kind}: {result['steps']} steps, loss {result['loss']:.3f}{dev}{speed}, "
          f"peak {result['peak_memory_bytes'] / 1e9:.1f} GB")  # fmt: skip
    return 0


def fill_generate(parser: argparse.ArgumentParser) -> None:
    from minipeft.generation import GenerateConfig

    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to write code for")
    parser.add_argument("--model", required=True, metavar="M", help="folder or hub id")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="an adapter's folder, ours or PEFT's")
    parser.add_argument("--merge", action="store_true", help="fold a LoRA adapter into the weights first")
    parser.add_argument(
        "--raw", action="store_true", help="continue PROMPT as it stands, without the training template"
    )
    parser.add_argument("--data", metavar="DATA", help="answer the questions of this data set instead of PROMPT")
    parser.add_argument("--split", default="test", metavar="NAME", help="of conala (default test)")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N questions only")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON lines with prediction and reference; resumable")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default all cores")
    parser.add_argument("--dtype", metavar="NAME", help="fp32 or bf16; default the checkpoint's own")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda, ...")
    parser.add_argument("--revision", metavar="REV", help="commit, tag or branch on the hub")
    parser.add_argument(
        "--legacy-bin", action="store_true", help="read pytorch_model.bin where there are no safetensors"
    )
    add_fields(parser, GenerateConfig, GENERATE_HELP)


def run_generate(options: argparse.Namespace) -> int:
    """`minipeft generate`"""
    from minipeft.answering import answer_data, answer_prompts, load_tuned
    from minipeft.generation import GenerateConfig

    set_threads(options.threads)
    if bool(options.prompts) == bool(options.data):
        raise InputError("give PROMPTs, or --data", where="generate")
    if options.data and options.out is None:
        raise InputError("--data needs --out FILE for the answers", where="generate")
    config = chosen(GenerateConfig, options)
    model, tokenizer = load_tuned(options)
    if options.data:
        answer_data(model, tokenizer, config, options)
    else:
        for text in answer_prompts(model, tokenizer, config, options):
            print(text)
    return 0


def fill_score(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", type=Path, metavar="FILE", help='JSON lines: {"prediction": TEXT, "reference": TEXT or list}'
    )
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")


def run_score(options: argparse.Namespace) -> int:
    """`minipeft score`"""
    from minipeft.answering import read_answers, scores_in_words
    from minipeft.metrics.text import score_texts

    predictions, references, cut = read_answers(options.file)
    scores = score_texts(predictions, references, hit_limit=cut)
    print(json.dumps(scores.as_dict(), indent=2) if options.json else scores_in_words(scores))
    return 0


def fill_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="an adapter's or a model's folder")
    parser.add_argument("--json", action="store_true", help="print what it holds as JSON")


def run_inspect(options: argparse.Namespace) -> int:
    """`minipeft inspect`"""
    from minipeft.adapters.inspection import as_table, describe

    held = describe(options.folder)
    print(json.dumps(held, indent=2) if options.json else as_table(held))
    return 0


def set_threads(threads: int | None) -> None:
    """Use this many CPU threads."""
    import torch

    if threads is not None:
        if threads < 1:
            raise InputError(f"{threads} must be >= 1", where="threads")
        torch.set_num_threads(threads)


def report(line: str) -> None:
    """What a person should read while a program reads standard output. If nobody does, the work goes on."""
    with suppress(BrokenPipeError):
        print(line, file=sys.stderr, flush=True)


COMMANDS = {
    "study": (run_study, fill_study),
    "train": (run_train, fill_train),
    "generate": (run_generate, fill_generate),
    "score": (run_score, fill_score),
    "inspect": (run_inspect, fill_inspect),
}
