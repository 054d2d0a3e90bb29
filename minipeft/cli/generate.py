"""`minipeft generate`: answer prompts, or all questions of a data set."""

from __future__ import annotations

import argparse

from minipeft.cli.flags import add_fields, read_typed, was_typed
from minipeft.cli.streams import report, show
from minipeft.errors import InputError

HELP = "answer prompts, or all questions of a data set"
EXAMPLE = """minipeft generate --model gpt2 --adapter runs/lora/adapter 'sort a list of tuples by second element'
  minipeft generate --model gpt2 --adapter runs/lora/adapter --data conala --split test --out answers.jsonl"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    from minipeft.generation import GenerateConfig
    from minipeft.runs.answers import AnswersConfig
    from minipeft.runs.config import ModelConfig
    from minipeft.runs.process import ProcessConfig

    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="intent to write code for")
    add_fields(parser, AnswersConfig)
    add_fields(parser, ProcessConfig)
    add_fields(parser.add_argument_group("model"), ModelConfig)
    add_fields(parser.add_argument_group("generation"), GenerateConfig)


def main(options: argparse.Namespace) -> int:
    from minipeft.generation import GenerateConfig
    from minipeft.runs.answers import AnswersConfig, answer_data, answer_prompts, load_tuned
    from minipeft.runs.config import ModelConfig
    from minipeft.runs.process import ProcessConfig
    from minipeft.training.launch import join
    from minipeft.training.watch import LOST_STATUS, LostProcess

    if bool(options.prompts) == was_typed("data", options):
        raise InputError("give PROMPTs, or --data", where="generate")
    parts = {"model": ModelConfig, "generate": GenerateConfig}
    nested = {name: config(**read_typed(config, options)) for name, config in parts.items()}
    config = AnswersConfig(**nested, **read_typed(AnswersConfig, options))
    ProcessConfig(**read_typed(ProcessConfig, options)).apply()
    try:
        with join() as processes:
            if processes.size > 1 and config.data is None:
                raise InputError("several processes share the questions of a data set", where="generate", hint="--data")
            model, tokenizer = load_tuned(config, say=report if processes.rank == 0 else lambda line: None)
            if config.data is not None:
                answered = answer_data(model, tokenizer, config, processes)
                if processes.rank == 0:
                    report(f"{config.out}: {answered} answers")
                return 0
    except LostProcess as lost:
        report(f"error: {lost}")
        return LOST_STATUS
    for text in answer_prompts(model, tokenizer, config, options.prompts):
        show(text, as_is=True)
    return 0
