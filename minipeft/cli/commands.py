"""What each command of the command line does: `fill_NAME` gives a parser its flags, `run_NAME` does the work."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

from minipeft.cli.flags import GENERATE_HELP, TRAIN_HELP, add_fields, chosen
from minipeft.errors import InputError


def fill_study(parser: argparse.ArgumentParser) -> None:
    from minipeft.study.presets import METHODS, PRESETS

    parser.add_argument("--preset", choices=PRESETS, default="demo", help="what to compare (default demo)")
    parser.add_argument("--model", nargs="+", default=[], metavar="M", help="folders, hub ids or demo")
    parser.add_argument(
        "--method",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="NAME",
        help="of full, lora, prefix, prompt (default all)",
    )
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
    from minipeft.study.presets import StudyConfig
    from minipeft.study.report import terminal, write_report
    from minipeft.study.results import assemble
    from minipeft.study.runner import conduct

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
    from minipeft.runs.config import TuneConfig

    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the run's folder")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default all cores")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    add_fields(parser, TuneConfig, TRAIN_HELP)


def run_train(options: argparse.Namespace) -> int:
    """`minipeft train`"""
    from minipeft.runs.config import TuneConfig
    from minipeft.runs.finetune import tune
    from minipeft.runs.process import Stopped

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
    print(
        f"{options.out / kind}: {result['steps']} steps, loss {result['loss']:.3f}{dev}{speed}, "
        f"peak {result['peak_memory_bytes'] / 1e9:.1f} GB"
    )
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
    from minipeft.generation import GenerateConfig
    from minipeft.runs.answers import answer_data, answer_prompts, load_tuned

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
    from minipeft.metrics.text import score_texts
    from minipeft.runs.answers import read_answers, scores_in_words

    predictions, references, cut = read_answers(options.file)
    scores = score_texts(predictions, references, hit_limit=cut)
    print(json.dumps(scores.as_dict(), indent=2) if options.json else scores_in_words(scores))
    return 0


PLANNED = ("batch", "length", "dtype", "rank", "targets", "columns", "reparam", "activation_checkpointing", "revision")


def fill_plan(parser: argparse.ArgumentParser) -> None:
    from minipeft.runs.config import TuneConfig
    from minipeft.study.presets import METHODS

    parser.add_argument("models", nargs="*", metavar="M", help="folders, hub ids or demo; of each, config.json is read")
    parser.add_argument("--preset", choices=["paper"], help="the eight models of the paper")
    parser.add_argument(
        "--method",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="NAME",
        help="of full, lora, prefix, prompt (default all)",
    )
    parser.add_argument("--device", default="cpu", metavar="NAME", help="whose speed is probed: cpu, cuda, ...")
    parser.add_argument("--json", action="store_true", help="print the plans as JSON")
    others = tuple(field.name for field in fields(TuneConfig) if field.name not in PLANNED)
    add_fields(parser, TuneConfig, TRAIN_HELP, skip=others)


def run_plan(options: argparse.Namespace) -> int:
    """`minipeft plan`"""
    from minipeft.runs.config import TuneConfig
    from minipeft.runs.estimates import plan_of
    from minipeft.runs.planning import as_table
    from minipeft.study.presets import MODELS

    models = [*options.models, *(MODELS.values() if options.preset else ())]
    if not models:
        raise InputError("give models, or --preset paper", where="plan")
    given = {name: getattr(options, name) for name in PLANNED}
    of_method = {
        "full": {**given, "dtype": None}
    }  # --dtype is of the frozen base; full tuning trains the weights, in fp32
    rows = [
        plan_of(TuneConfig(model=model, data="", method=method, device=options.device, **of_method.get(method, given)))
        for model in models
        for method in options.method
    ]
    print(json.dumps(rows, indent=2) if options.json else as_table(rows))
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
    "plan": (run_plan, fill_plan),
    "inspect": (run_inspect, fill_inspect),
}
