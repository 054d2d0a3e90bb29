"""A conversation with a model, tuned or not: what has been said so far, and the next answer piece by piece."""

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

NEW_TOKENS = 512  # of an answer, where the caller does not say


@dataclass(frozen=True)
class ChatConfig:
    """How a conversation begins."""

    system: str | None = option(None, "system prompt")

    def __post_init__(self) -> None:
        check_fields(self)


class Conversation:
    """`ask` streams the answer to what is said and remembers both; `reset` forgets all but the system prompt."""

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
        """Forget what was said."""
        self.messages = list(self.begin)

    def ask(self, text: str) -> Iterator[str]:
        """The answer, in pieces. Where it cannot be given, or is not read to its end, nothing is remembered.

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
    """Load the model and begin a conversation. `new_tokens` None: as many as a quarter of the context, at most 512.

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
