"""A conversation with a base or tuned model: the messages so far, and a streamed answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from minipeft.data.chat import ChatTemplate
from minipeft.data.forms import CHAT
from minipeft.data.tokens import Tokenizer
from minipeft.errors import InputError, check_fields, option
from minipeft.generation import GenerateConfig, pack_for, stream
from minipeft.models import Decoder
from minipeft.runs.answers import AnswersConfig, find_format, load_chat, load_tuned

NEW_TOKENS = 512  # default limit of an answer


@dataclass(frozen=True)
class ChatConfig:
    """Settings of a conversation."""

    system: str | None = option(None, "system prompt")

    def __post_init__(self) -> None:
        check_fields(self)


class Conversation:
    """`ask` streams the answer to a message and keeps both; `reset` drops all but the system prompt."""

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        chat: ChatTemplate,
        config: GenerateConfig,
        system: str | None = None,
    ):
        self.model, self.tokenizer, self.chat, self.config = model, tokenizer, chat, config
        self.begin: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self.begin)
        self.ends = chat.find_end(tokenizer)
        self.packed = pack_for(model, config)

    def reset(self) -> None:
        """Drop all messages but the system prompt."""
        self.messages = list(self.begin)

    def ask(self, text: str) -> Iterator[str]:
        """Yield the answer in pieces. After an error, or if it is not read to its end, neither message is kept.

        Raises:
            InputError: the conversation no longer fits in the context, or the template refuses it.
        """
        said = [*self.messages, {"role": "user", "content": text}]
        prompt = self.chat.encode_prompt(said, None, self.tokenizer)
        pieces = []
        try:
            for piece in stream(self.model, self.tokenizer, prompt, self.config, self.ends, self.packed):
                pieces.append(piece)
                yield piece
        except InputError as error:
            raise InputError(str(error), hint="/reset begins a new conversation") from error
        self.messages = [*said, {"role": "assistant", "content": "".join(pieces)}]


def open_conversation(
    config: AnswersConfig, chat: ChatConfig, new_tokens: int | None, say: Callable[[str], None]
) -> Conversation:
    """Load the model and begin a conversation. `new_tokens` None: a quarter of the context, at most 512.

    Raises:
        InputError: the adapter was not trained on chats, or the model has no chat template.
    """
    text = None
    if (found := find_format(config)) is not None:
        if found.form != CHAT:
            hint = "minipeft generate answers single prompts"
            raise InputError(
                f"was trained on {found.form}, not on chats", file=config.adapter or config.model.source, hint=hint
            )
        text = found.template
    template = load_chat(config.model, text)
    model, tokenizer = load_tuned(config, say=say)
    most = new_tokens or max(1, min(NEW_TOKENS, model.config.context // 4))
    return Conversation(model, tokenizer, template, replace(config.generate, max_new_tokens=most), chat.system)
