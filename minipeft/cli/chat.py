"""`minipeft chat`: talk with a model, tuned or not, from a terminal or a pipe."""

from __future__ import annotations

import argparse
import sys

from minipeft.cli.flags import add_fields, read_typed
from minipeft.cli.streams import report
from minipeft.errors import InputError, escape

HELP = "talk with a model; /reset forgets what was said, /quit ends"
EXAMPLE = "minipeft chat --model Qwen/Qwen2.5-0.5B-Instruct --adapter runs/chat/adapter"
SKIP = ("raw", "template", "data", "split", "limit", "out")  # a conversation sets them itself
BATCHED = ("batch", "batch-invariant")  # settings of several prompts at a time


def add_flags(parser: argparse.ArgumentParser) -> None:
    from minipeft.generation import GenerateConfig
    from minipeft.runs.answers import AnswersConfig
    from minipeft.runs.config import ModelConfig
    from minipeft.runs.conversation import NEW_TOKENS, ChatConfig
    from minipeft.runs.process import ProcessConfig

    add_fields(parser, ChatConfig)
    add_fields(parser, AnswersConfig, skip=SKIP)
    add_fields(parser, ProcessConfig)
    add_fields(parser.add_argument_group("model"), ModelConfig)
    most = {"max_new_tokens": f"{NEW_TOKENS}, at most a quarter of the context"}
    add_fields(parser.add_argument_group("generation"), GenerateConfig, skip=BATCHED, defaults=most)


def main(options: argparse.Namespace) -> int:
    from minipeft.generation import GenerateConfig
    from minipeft.runs.answers import AnswersConfig
    from minipeft.runs.config import ModelConfig
    from minipeft.runs.conversation import ChatConfig, open_conversation
    from minipeft.runs.process import ProcessConfig

    ProcessConfig(**read_typed(ProcessConfig, options)).apply()
    generation = read_typed(GenerateConfig, options, skip=BATCHED)
    config = AnswersConfig(
        ModelConfig(**read_typed(ModelConfig, options)),
        GenerateConfig(**generation),
        **read_typed(AnswersConfig, options, skip=SKIP),
    )
    chat = ChatConfig(**read_typed(ChatConfig, options))
    conversation = open_conversation(config, chat, generation.get("max_new_tokens"), say=report)
    person = sys.stdin.isatty()
    while True:
        print("> " if person else "", end="", flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return 0
        if line.strip() == "/reset":
            conversation.reset()
        elif line.strip():
            stream_answer(conversation, line.rstrip("\n"))


def stream_answer(conversation: object, text: str) -> None:
    """Stream an answer to standard output; an error is printed, and the conversation continues."""
    try:
        for piece in conversation.ask(text):  # type: ignore[attr-defined]
            print("\n".join(escape(part) for part in piece.split("\n")), end="", flush=True)
        print(flush=True)
    except InputError as error:
        report(f"note: {error}")
