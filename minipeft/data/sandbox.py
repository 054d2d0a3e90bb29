"""Jinja's sandbox for chat templates, with transformers' globals, filters and tag {% generation %}.

A template comes from a hub and is not trusted: it cannot reach Python's types or files, nor change its input.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minipeft.data.tokens import SAID, UNSAID
from minipeft.errors import InputError

LARGEST_TEMPLATE = 2**20  # characters


def compile_template(text: str, file: str) -> jinja2.Template:
    """Compile a template in the sandbox.

    Raises:
        InputError: it is no Jinja; names the line.
    """
    if len(text) > LARGEST_TEMPLATE:
        raise InputError(f"has {len(text):,} characters, more than {LARGEST_TEMPLATE:,}", file=file)
    try:
        return make_sandbox().from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"no valid Jinja: {error.message}", file=file, where=f"line {error.lineno}") from error
    except RecursionError as error:
        raise InputError("no valid Jinja: nested too deep", file=file) from error


def make_sandbox() -> ImmutableSandboxedEnvironment:
    """Make the environment that chat templates expect."""
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    sandbox.filters["tojson"] = to_json
    sandbox.globals.update(
        raise_exception=refuse,
        strftime_now=lambda form: datetime.now().strftime(form),
        dict=Dict(),
        namespace=Namespace,
    )
    return sandbox


class Generation(jinja2.ext.Extension):
    """{% generation %} puts marks around its content."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own interface)

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        """Parse the tag as a call of `put_marks` on the content up to {% endgeneration %}."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("put_marks"), [], [], body).set_lineno(line)

    def put_marks(self, caller: Callable[[], str]) -> str:
        """The text between SAID and UNSAID."""
        return f"{SAID}{caller()}{UNSAID}"


class Namespace(jinja2.utils.Namespace):
    """Jinja's, without names that begin with an underscore."""

    def __init__(*given: Any, **named: Any) -> None:  # a template may call it with self=...
        values = dict(*given[1:], **named)
        for name in values:
            check_public(name)
        jinja2.utils.Namespace.__init__(given[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        check_public(name)
        super().__setitem__(name, value)


class Dict:
    """`dict` in a template: calls and fromkeys work, the type is out of reach."""

    def __call__(self, *given: Any, **named: Any) -> dict[Any, Any]:
        return dict(*given, **named)

    def fromkeys(self, *given: Any) -> dict[Any, Any]:
        """Python's dict.fromkeys."""
        return dict.fromkeys(*given)


def check_public(name: object) -> None:
    """Refuse a name that leads into Python."""
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace takes no name that begins with _, such as {name!r}")


def refuse(message: str) -> None:
    """`raise_exception` in a template."""
    raise jinja2.TemplateError(message)


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """The filter `tojson`; Jinja's own would escape <, > and & for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
