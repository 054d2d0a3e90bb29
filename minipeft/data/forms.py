"""The forms of training data, recognized by a row's fields, and how each is encoded as examples.

    messages             a chat: [{"role": "user", "content": ...}, ...]    the checkpoint's own chat template
    intent, snippet      pairs, as CoNaLa                                   the paper's template
    prompt, completion   text, as it is                                     "{prompt}{completion}"
    text                 plain text, to pretrain further                    "{text}"
    any other            with a template that names the fields              its last field is the response

`minipeft_data.json` in an adapter's folder stores form and template, so that generation uses the prompts of training.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from minipeft.data.chat import ChatTemplate
from minipeft.data.encoded import Encoded, Example, as_arrays, take_together
from minipeft.data.examples import LONGEST_FIELD, TOGETHER, encode_texts, read_field, read_pair, read_question_id
from minipeft.data.messages import read_messages, read_tools
from minipeft.data.preview import draw_rows
from minipeft.data.reading import Source, find_source
from minipeft.data.templates import TEMPLATE, Template, parse_template, read_template
from minipeft.data.tokens import Tokenizer
from minipeft.errors import InputError
from minipeft.files import name_type, read_object, write_json

FORM_FILE = "minipeft_data.json"
CHAT = "messages"


@dataclass(frozen=True, slots=True)
class Item:
    """A row: the texts of its fields or, of a chat, its messages and tools. `line` is its place in the file."""

    values: Mapping[str, str] = field(default_factory=dict)
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: Any = None
    question_id: int | None = None
    line: int = field(default=0, compare=False)
    place: str = field(default="", compare=False)  # of a chat, for errors: FILE:LINE

    @property
    def content(self) -> str:
        """Its texts or messages; two rows with equal content are duplicates."""
        return json.dumps([self.values, self.messages, self.tools], sort_keys=True)

    @property
    def texts(self) -> Mapping[str, str]:
        """The texts of its fields; of a chat its turns as one text."""
        turns = "\n".join(f"{message['role']}: {message.get('content')}" for message in self.messages)
        return {CHAT: turns} if self.messages else self.values

    @property
    def question(self) -> str:
        """The question as text: the last message that is not the assistant's, or all fields but the response."""
        asked = [str(message["content"]) for message in get_question(self) if message["role"] != "assistant"]
        return asked[-1] if asked else "\n".join(list(self.values.values())[:-1])


@dataclass(frozen=True)
class DataFormat:
    """A form by name, and its template: a format string, or a chat's Jinja (None: the checkpoint's own)."""

    form: str
    template: str | None

    def __str__(self) -> str:
        if self.form == CHAT:
            return f"{self.form}; the checkpoint's own chat template; the assistant's turns are the response"
        template = "the paper's template" if self == PAIRS else f"template {self.template!r}"
        return f"{self.form}; {template}; {self.parsed.fields[-1]} is the response"

    @property
    def noun(self) -> str:
        """The word for its rows in messages."""
        return {"pairs": "pairs", CHAT: "chats"}.get(self.form, "rows")

    @property
    def parsed(self) -> Template:
        """The format string in parts."""
        assert self.template is not None
        return parse_template(self.template)

    def write(self, folder: Path) -> None:
        """Write minipeft_data.json."""
        write_json(folder / FORM_FILE, {"form": self.form, "template": self.template})


@dataclass(frozen=True)
class Data:
    """The rows of a data set in their order; `notes` says what reading changed, `sha256` is that of the files."""

    items: tuple[Item, ...]
    file: str
    sha256: str
    format: DataFormat
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    def __repr__(self) -> str:
        return f"Data({len(self):,} {self.format.noun} of {self.file})"

    def _repr_html_(self) -> str:
        return draw_rows(repr(self), (item.texts for item in self))


PAIRS = DataFormat("pairs", TEMPLATE + "{snippet}")
# a form by a field that only it has, in the order in which they are looked for
FORMS: dict[str, DataFormat] = {
    "messages": DataFormat(CHAT, None),
    "snippet": PAIRS,
    "completion": DataFormat("prompt and completion", "{prompt}{completion}"),
    "text": DataFormat("text", "{text}"),
}


def read_format(folder: Path) -> DataFormat | None:
    """Read the form and template that an adapter or model was trained with; None if its folder has no such file.

    Raises:
        InputError: minipeft_data.json is not ours.
    """
    file = folder / FORM_FILE
    if not file.exists():
        return None
    given = read_object(file)
    form, template = given.get("form"), given.get("template")
    if set(given) != {"form", "template"} or not isinstance(form, str) or not isinstance(template, str):
        raise InputError("must hold form and template, two texts", file=file)
    found = DataFormat(form, template)
    if form != CHAT:
        try:
            parse_template(template)
        except InputError as error:
            raise InputError(str(error), file=file) from error
    return found


def load_data(
    source: str | Path,
    *,
    template: str | None = None,
    split: str = "train",
    file: str | None = None,
    revision: str | None = None,
    longest_field: int = LONGEST_FIELD,
) -> Data:
    """Read a data set of any form: a name, a file, a folder of files, or a hub data set's `file` at a `revision`.

    `template` is a format string, or a file that holds one, for rows with other fields than a form's.

    Raises:
        InputError: `FILE:LINE: ...`: a row cannot be used, or is of another form than the rows before it.
    """
    stream = open_data(
        source, template=template, split=split, file=file, revision=revision, longest_field=longest_field
    )
    return Data(tuple(stream), stream.file, stream.sha256, stream.format, stream.notes)


class DataStream:
    """The rows of a data set, read and checked one after the other, once; `format` is that of the first.

    `part` selects the rows of one split from a file that holds several.
    """

    def __init__(self, found: Source, form: DataFormat | None, part: str | None, longest_field: int):
        self.file, self.sha256, self.part, self.longest_field = found.name, found.sha256, part, longest_field
        rows = (row for row in found.rows(20 * longest_field) if part is None or row[2]["split"] == part)
        first = next(rows, None)
        if first is None:
            raise InputError("holds no examples", file=found.name)
        self.first, _, held = first  # its place
        self.chosen, self.format = form, form or find_form(held, self.first)
        self.rows = chain([first], rows)
        self.count = self.replaced = 0

    def __iter__(self) -> Iterator[Item]:
        """Read the rows.

        Raises:
            InputError: as `load_data`.
        """
        for place, line, row in self.rows:
            own = self.chosen or find_form(row, place)
            if own != self.format:
                problem = f"holds {own.form}, but {self.first} holds {self.format.form}"
                raise InputError(problem, file=place, hint="One form in a data set")
            item, was_null = read_item(row, own, place, line, self.longest_field)
            self.count += 1
            self.replaced += was_null
            yield item

    @property
    def notes(self) -> tuple[str, ...]:
        """What reading changed in the rows so far."""
        if not self.replaced:
            return ()
        return (f"{self.replaced} of {self.count} rows have no rewritten_intent; their intent was used",)


def open_data(
    source: str | Path,
    *,
    template: str | None = None,
    split: str = "train",
    file: str | None = None,
    revision: str | None = None,
    longest_field: int = LONGEST_FIELD,
) -> DataStream:
    """Open a data set as `load_data` does, to read it row by row.

    Raises:
        InputError: no such file, a hub id without a revision, or no rows; the first row is of no known form.
    """
    chosen = None if template is None else DataFormat("template", read_template(template).text)
    part = split if source == "demo" else None
    return DataStream(find_source(source, split, file, revision), chosen, part, longest_field)


def find_form(row: Any, place: str) -> DataFormat:
    """Recognize the form of a row by its fields."""
    if not isinstance(row, dict):
        raise InputError(f"must be an object, is {name_type(row)}", file=place)
    for name, form in FORMS.items():
        if name in row:
            return form
    has = ", ".join(list(row)[:8]) or "nothing"
    hint = "A row holds messages, intent and snippet, prompt and completion, or text; --template names other fields"
    raise InputError(f"is of no known form (the row has: {has})", file=place, hint=hint)


def read_item(row: Any, form: DataFormat, place: str, line: int, longest: int) -> tuple[Item, bool]:
    """Read and check a row; also returns whether its rewritten_intent was null."""
    if form == PAIRS:
        pair, was_null = read_pair(row, line, place, longest)
        values = {"intent": pair.intent, "snippet": pair.snippet}
        return Item(values, question_id=pair.question_id, line=line), was_null
    if not isinstance(row, dict):
        raise InputError(f"must be an object, is {name_type(row)}", file=place)
    question = read_question_id(row, place)
    if form.form == CHAT:
        messages = tuple(read_messages(row["messages"], place, longest))
        return Item({}, messages, read_tools(row.get("tools"), place), question, line, place), False
    hint = f"The template needs {', '.join(form.parsed.fields)}"
    values = {name: read_field(row, name, place, longest, hint) for name in form.parsed.fields}
    return Item(values, question_id=question, line=line), False


def encode_data(
    items: Iterable[Item], form: DataFormat, tokenizer: Tokenizer, chat: ChatTemplate | None = None
) -> Encoded:
    """Encode the rows as examples. A text ends with EOS, a chat as its template ends it.

    Raises:
        InputError: a chat without `chat`, or one that its template refuses; names the row.
    """
    if form.form == CHAT:
        template = require_chat(chat)
        return as_arrays(template.encode(item.messages, item.tools, tokenizer, item.place) for item in items)
    parsed = form.parsed

    def encode() -> Iterator[Example]:
        for some in take_together(items, TOGETHER):
            prompts, responses = [[part(item.values) for item in some] for part in (parsed.prompt, parsed.response)]
            yield from encode_texts(prompts, responses, tokenizer)

    return as_arrays(encode())


def require_chat(chat: ChatTemplate | None) -> ChatTemplate:
    """Return the chat template, or refuse: chats need one."""
    if chat is None:
        raise InputError("chats need the chat template of a model", where="messages")
    return chat


def encode_questions(
    items: Sequence[Item], form: DataFormat, tokenizer: Tokenizer, chat: ChatTemplate | None = None
) -> list[list[int]]:
    """Encode the prompt of each row, as in training."""
    if form.form == CHAT:
        template = require_chat(chat)
        return [template.encode_prompt(get_question(item), item.tools, tokenizer) for item in items]
    parsed = form.parsed
    return tokenizer.encode_pieces([parsed.prompt(item.values) for item in items])


def get_question(item: Item) -> tuple[Mapping[str, Any], ...]:
    """A chat's messages before the assistant's last turn."""
    last = max((i for i, message in enumerate(item.messages) if message["role"] == "assistant"), default=None)
    return item.messages if last is None else item.messages[:last]


def get_reference(item: Item, form: DataFormat) -> str:
    """The reference of an answer: the last field, or the assistant's last turn."""
    if form.form != CHAT:
        return item.values[form.parsed.fields[-1]]
    said = [str(message["content"]) for message in item.messages if message["role"] == "assistant"]
    if not said:
        raise InputError("holds no turn of the assistant", file=item.place, where="messages")
    return said[-1]


def make_prompt_item(prompt: str, form: DataFormat) -> Item:
    """Make a row of a typed prompt.

    Raises:
        InputError: the prompt is empty or blank, or the template has more than one field.
    """
    if form.form == CHAT:
        return Item(messages=({"role": "user", "content": prompt},))
    if not prompt.strip():
        raise InputError("is blank" if prompt else "is empty", where="intent")
    asked = form.parsed.asked
    if len(asked) > 1:
        problem = f"the adapter's template asks for {', '.join(asked)}, not one PROMPT"
        raise InputError(problem, where="prompts", hint="Give a file of rows as --data, or the whole text with --raw")
    return Item({name: prompt for name in asked})
