"""`minipeft generate`: answer prompts, or all questions of a data set."""

from __future__ import annotations

import argparse
from pathlib import Path

from minipeft.cli.flags import add_fields, add_threads, set_threads, typed
from minipeft.cli.streams import report
from minipeft.errors import InputError

HELP = "answer prompts, or all questions of a data set"
EXAMPLE = """minipeft generate --model gpt2 --adapter runs/lora/adapter 'sort a list of tuples by second element'
  minipeft generate --model gpt2 --adapter runs/lora/adapter --data conala --split test --out answers.jsonl"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    from minipeft.generation import GenerateConfig
    from minipeft.runs.config import ModelConfig

    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to write code for")
    parser.add_argument("--raw", action="store_true", help="continue PROMPT as it is, without the training template")
    parser.add_argument("--data", metavar="DATA", help="answer the questions of this data set instead of PROMPT")
    parser.add_argument("--split", default="test", metavar="NAME", help="split of conala (default test)")
    parser.add_argument("--limit", type=int, metavar="N", help="answer the first N questions only")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON lines with prediction and reference; resumable")
    add_threads(parser)
    group = parser.add_argument_group("model")
    add_fields(group, ModelConfig)
    group.add_argument("--adapter", type=Path, metavar="DIR", help="folder of an adapter, ours or PEFT's")
    group.add_argument("--merge", action="store_true", help="merge the adapter into the weights first")
    add_fields(parser.add_argument_group("generation"), GenerateConfig)


def main(options: argparse.Namespace) -> int:
    from minipeft.data.templates import prompt_text
    from minipeft.generation import GenerateConfig, generate
    from minipeft.runs.answers import answer_data, load_tuned
    from minipeft.runs.config import ModelConfig

    set_threads(options.threads)
    if bool(options.prompts) == bool(options.data):
        raise InputError("give PROMPTs, or --data", where="generate")
    if options.data and options.out is None:
        raise InputError("--data needs --out FILE for the answers", where="generate")
    if options.limit is not None and options.limit < 1:
        raise InputError(f"{options.limit} must be an integer >= 1", where="limit")
    config = GenerateConfig(**typed(GenerateConfig, options))
    source = ModelConfig(**typed(ModelConfig, options))
    model, tokenizer = load_tuned(source, options.adapter, merge=options.merge, say=report)
    if options.data:
        about = {"model": source.source, "adapter": str(options.adapter), "merge": options.merge}
        split, limit = options.split, options.limit
        count = answer_data(model, tokenizer, config, options.data, options.out, split=split, limit=limit, about=about)
        report(f"{options.out}: {count} answers")
        return 0
    prompts = options.prompts if options.raw else [prompt_text(prompt) for prompt in options.prompts]
    for text in generate(model, tokenizer, prompts, config):
        print(text)
    return 0
