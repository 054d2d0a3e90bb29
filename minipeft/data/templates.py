"""Text templates: the paper's, and any format string. Chat templates are in chat.py.

    ### Instruction:                    the template of Männistö, Attieh and Tiedemann (2025)
    {intent}
    ### Response:
    {snippet}EOS

The last field and the text after it are the response, which is supervised; the text before it is the prompt.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from minipeft.data.tokens import Piece
from minipeft.errors import InputError, check_value, format_value
from minipeft.files import read_text

TEMPLATE = "### Instruction:\n{intent}\n### Response:\n"
ESCAPES = {r"\n": "\n", r"\t": "\t"}  # of a format string that a shell passes on as it is


def format_prompt(intent: str, template: str = TEMPLATE) -> str:
    """The prompt that asks for a snippet: the start of a training text, and all that generation is given.

    Raises:
        InputError: the intent is empty or blank; the template does not hold {intent} exactly once.
    """
    for name, text in (("intent", intent), ("template", template)):
        check_value(text, str, {}, name)
    if not intent.strip():
        raise InputError("is blank" if intent else "is empty", where="intent")
    if template.count("{intent}") != 1:
        raise InputError(f"must hold {{intent}} once, is {format_value(template)}", where="template")
    return template.replace("{intent}", intent)


@dataclass(frozen=True)
class Template:
    """A format string as literal texts and fields: `literals[i]` stands before `fields[i]`, the last after all."""

    text: str
    literals: tuple[str, ...]
    fields: tuple[str, ...]

    @property
    def asked(self) -> tuple[str, ...]:
        """The fields of the prompt."""
        return self.fields[:-1]

    def prompt(self, values: Mapping[str, str]) -> list[Piece]:
        """The pieces before the last field, with the values of a row: literals are template, values are data."""
        before = [((literal, True), (values[field], False)) for literal, field in zip(self.literals, self.asked)]
        return [*(piece for both in before for piece in both), (self.literals[-2], True)]

    def response(self, values: Mapping[str, str]) -> list[Piece]:
        """The pieces from the last field on."""
        return [(values[self.fields[-1]], False), (self.literals[-1], True)]


def parse_template(text: str) -> Template:
    """A format string with names in braces, such as "{question}\\n{answer}"; {{ and }} are braces themselves.

    Raises:
        InputError: no field, a field that is no plain name, or a brace without its other.
    """
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise InputError(f"{error} in {text!r}", where="template", hint="Write {{ and }} for braces") from error
    literals, fields = [""], []
    for literal, field, form, conversion in parts:
        literals[-1] += literal
        if field is None:
            continue
        if not field.isidentifier() or form or conversion:
            raise InputError(f"{{{field}}} is no plain field name", where="template", hint="Write {{ and }} for braces")
        fields.append(field)
        literals.append("")
    if not fields:
        raise InputError(f"holds no field, is {text!r}", where="template", hint="Such as '{question}\\n{answer}'")
    return Template(text, tuple(literals), tuple(fields))


def read_template(given: str) -> Template:
    """Read a template: a format string (\\n and \\t are line end and tab), or a file that holds one.

    The last line end of a file is dropped.
    """
    if "{" not in given:
        return parse_template(read_text(Path(given)).removesuffix("\n"))
    for written, meant in ESCAPES.items():
        given = given.replace(written, meant)
    return parse_template(given)
