"""Render chats with the checkpoint's own template, and find the tokens of the assistant's turns.

The template is Jinja, in tokenizer_config.json (`chat_template`) or chat_template.jinja. It comes from a hub, so it
runs in the sandbox that transformers uses, with the same globals and filters, and sees nothing but JSON values.

The assistant's turns are found in one of two ways. A template may mark them, {% generation %} ... {% endgeneration %}.
Else, for the assistant's turn i,

    asked    = render(messages[:i], with the generation prompt)      ...<|im_start|>assistant\\n
    answered = render(messages[:i + 1])                              ...<|im_start|>assistant\\nHi!<|im_end|>\\n

and the turn is what `answered` adds to `asked`, without a line end after the end-of-turn token. Each text must be a
prefix of the next and of the whole chat: a template that rewrites earlier turns is refused.

Noncharacters of Unicode, which no text may hold, mark the boundaries while the template is rendered.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from minipeft.data.encoded import Example
from minipeft.data.tokenizer_files import SETTINGS
from minipeft.data.tokens import ESCAPE, SAID, UNSAID, Tokenizer
from minipeft.errors import InputError
from minipeft.files import check_inside, name_type, read_object, read_text
from minipeft.hub import fetch

FILE = "chat_template.jinja"
MARKS = re.compile("[\ufdd0-\ufdd4]")
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

Message = Mapping[str, Any]


class Turn(NamedTuple):
    """A stretch of a rendered chat, in characters."""

    start: int
    stop: int


class ChatTemplate:
    """A checkpoint's chat template; `text` is its Jinja, `file` where it stands, `names` its special tokens by name."""

    def __init__(self, text: str, file: str, names: Mapping[str, str]):
        self.text, self.file, self.names = text, file, names
        from minipeft.data.sandbox import compile_template  # loads Jinja

        self.template = compile_template(text, file)

    @property
    def writes_date(self) -> bool:
        """Whether the template asks for today's date."""
        return "strftime_now" in self.text

    @property
    def marks_turns(self) -> bool:
        """Whether the template marks the assistant's turns itself."""
        return GENERATION.search(self.text) is not None

    @cached_property
    def failures(self) -> tuple[type[Exception], ...]:
        """The exceptions that rendering may raise: Jinja's, and Python's for the operations of the template."""
        import jinja2

        return (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            ArithmeticError,
            LookupError,
            AttributeError,
            RecursionError,
        )

    def render(self, messages: Sequence[Message], tools: Any = None, *, ask: bool = False) -> str:
        """Render a chat as text; with `ask`, up to the start of the assistant's next turn.

        Raises:
            InputError: the template refuses the messages, or fails on them.
        """
        try:
            return str(
                self.template.render(
                    messages=messages, tools=tools, documents=None, add_generation_prompt=ask, **self.names
                )
            )
        except self.failures as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"the chat template refuses these messages ({reason})", file=self.file) from error

    def encode(
        self, messages: Sequence[Message], tools: Any, tokenizer: Tokenizer, place: str | None = None
    ) -> Example:
        """Encode a chat: its ids, and whether each is supervised, which are the assistant's turns with a `weight`
        other than 0.

        Raises:
            InputError: no token is the assistant's, or every token is; the turns cannot be found.
        """
        try:
            safe, safe_tools = escape(messages, tokenizer), escape(tools, tokenizer)
            text, turns = mark_text(*self.find_turns(safe, safe_tools, tokenizer), tokenizer)
            ((ids, offsets),) = tokenizer.encode_marked([text])
        except InputError as error:
            raise InputError(str(error), file=place) from error
        trained = [any(start < turn.stop and stop > turn.start for turn in turns) for start, stop in offsets]
        if not any(trained[1:]):
            raise InputError("the assistant says nothing that could be trained on", file=place, where="messages")
        if all(trained):
            raise InputError("everything is said by the assistant, nothing is asked", file=place, where="messages")
        return Example(ids, trained.index(True), trained)

    def encode_prompt(self, messages: Sequence[Message], tools: Any, tokenizer: Tokenizer) -> list[int]:
        """Encode the prompt of the assistant's next turn."""
        text = self.render(escape(messages, tokenizer), escape(tools, tokenizer), ask=True)
        text, _ = mark_text(text.replace(SAID, "").replace(UNSAID, ""), [], tokenizer)
        return tokenizer.encode_marked([text])[0][0]

    def find_end(self, tokenizer: Tokenizer) -> set[int]:
        """Find the special tokens that end the assistant's turn; generation stops at them."""
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        text, turns = self.find_turns(chat, None, tokenizer)
        said = text[turns[-1].start :]
        first = tokenizer.special.search(said, said.rfind("b"))
        return set() if first is None else {int(tokenizer.backend.token_to_id(first[0]) or 0)}

    def find_turns(self, messages: Sequence[Message], tools: Any, tokenizer: Tokenizer) -> tuple[str, list[Turn]]:
        """Render a chat, and find the assistant's turns that are supervised."""
        heard = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        chosen = [messages[i].get("weight", 1) != 0 for i in heard]
        whole = self.render(messages, tools)
        if self.marks_turns:
            text, turns = take_marks(whole)
            if not all(chosen) and len(turns) != len(heard):
                problem = f"the template marks {len(turns)} turns of {len(heard)}, and weights need each"
                raise InputError(problem, where="messages")
            return text, [turn for turn, keep in zip(turns, chosen) if keep] if not all(chosen) else turns
        turns = [self.find_turn(messages, tools, i, whole, tokenizer) for i, keep in zip(heard, chosen) if keep]
        return whole, turns

    def find_turn(self, messages: Sequence[Message], tools: Any, i: int, whole: str, tokenizer: Tokenizer) -> Turn:
        """Find the assistant's turn i from the texts that end before and after it."""
        asked, answered = self.render(messages[:i], tools, ask=True), self.render(messages[: i + 1], tools)
        for first, second, what in ((asked, answered, "answered"), (answered, whole, "followed by more")):
            if not second.startswith(first):
                at = next((n for n, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
                raise InputError(
                    f"the chat template writes what comes before turn {i + 1} otherwise once it is {what}: "
                    f"{first[at : at + 30]!r} becomes {second[at : at + 30]!r}",
                    where="messages",
                    hint="Mark the assistant's turns with {% generation %} in the template",
                )
        said = answered[len(asked) :]
        ends = [found.end() for found in tokenizer.special.finditer(said)]
        if ends and not said[ends[-1] :].strip():
            said = said[: ends[-1]]
        return Turn(len(asked), len(asked) + len(said))


def take_marks(text: str) -> tuple[str, list[Turn]]:
    """Remove the marks of {% generation %}; returns the text and the turns between them."""
    parts, turns, length, start = re.split(f"([{SAID}{UNSAID}])", text), [], 0, 0
    for part in parts:
        if part == SAID:
            start = length
        elif part == UNSAID:
            turns.append(Turn(start, length))
        else:
            length += len(part)
    return "".join(part for part in parts if part not in (SAID, UNSAID)), turns


def mark_text(text: str, turns: Sequence[Turn], tokenizer: Tokenizer) -> tuple[str, list[Turn]]:
    """Replace special tokens by their marks and drop the escapes; the turns move with the text."""
    edges = sorted({edge for turn in turns for edge in turn})
    places: dict[int, int] = {}
    parts, length, last = [], 0, 0

    def put(part: str) -> None:
        nonlocal length
        parts.append(part)
        length += len(part)

    def copy_to(stop: int) -> None:
        nonlocal last
        while edges and edges[0] <= stop:
            edge = edges.pop(0)
            put(text[last:edge].replace(ESCAPE, ""))
            places[edge], last = length, max(last, edge)
        put(text[last:stop].replace(ESCAPE, ""))
        last = stop

    for found in tokenizer.special.finditer(text):
        copy_to(found.start())
        put(tokenizer.mark(found[0]))
        last = found.end()
    copy_to(len(text))
    return "".join(parts), [Turn(places[turn.start], places[turn.stop]) for turn in turns]


def escape(value: Any, tokenizer: Tokenizer) -> Any:
    """Put an ESCAPE into the name of each special token in the data of a chat; roles belong to the template.

    Raises:
        InputError: a text holds one of our marks.
    """
    if isinstance(value, str):
        if found := MARKS.search(value):
            raise InputError(f"holds U+{ord(found[0]):04X}, which is no character", where="messages")
        return tokenizer.special.sub(lambda name: name[0][0] + ESCAPE + name[0][1:], value)
    if isinstance(value, Mapping):
        return {name: entry if name == "role" else escape(entry, tokenizer) for name, entry in value.items()}
    return [escape(entry, tokenizer) for entry in value] if isinstance(value, list | tuple) else value


def load_chat_template(source: str | Path, *, revision: str | None = None, text: str | None = None) -> ChatTemplate:
    """The chat template of a model folder or hub id; `text` is one that stands in its place.

    Raises:
        InputError: there is none, or it is no Jinja.
    """
    folder = fetch(source, [], revision=revision, optional=[FILE, *SETTINGS])
    given, special = (read_object(folder / name) if (folder / name).exists() else {} for name in SETTINGS[:2])
    names = {}
    for name, token in (special | given).items():
        token = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(token, str):
            names[name] = token
    if text is not None:
        return ChatTemplate(text, "chat template", names)
    if (folder / FILE).exists():
        check_inside(folder / FILE, folder)
        return ChatTemplate(read_text(folder / FILE), str(folder / FILE), names)
    file, found = folder / SETTINGS[0], given.get("chat_template")
    if isinstance(found, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    if found is None:
        hint = "Take the chat version of the model, or write prompts with --template"
        raise InputError(
            f"the model has no chat template ({FILE}, or chat_template in {file.name})", file=folder, hint=hint
        )
    if not isinstance(found, str):
        raise InputError(f"must be text, is {name_type(found)}", file=file, where="chat_template")
    return ChatTemplate(found, f"{file}: chat_template", names)
