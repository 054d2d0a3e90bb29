"""InputError, the exception for invalid input, and the checks of config fields and function arguments.

A config is a frozen dataclass. Each field declares in one place what it may hold and what it means:

    rank: int = option(16, "rank r of the update", least=1)

and `check_fields(self)`, in `__post_init__`, checks all of them: the kind by the annotation, the range by the field.
The command line makes a flag of each field (cli/flags.py). Arguments of functions pass the same checks: `check_value`
with an annotation, `check_items` for lists of texts and of objects, `check_path`.

    int, float    a Python number, not a boolean, a torch scalar or a numpy scalar (except float64, a Python float).
                  Computations run in float32: a number that underflows to 0 or overflows there is refused
    str           without NUL and without half of a surrogate pair, which no file, tokenizer or path can hold
    tuple         a tuple or list, never a text
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
LONGEST_TEXT = 3_000  # characters of an error
MOST_ITEMS = 1 << 27  # of a list that is given: a longer one, such as range(10**12), would fill the memory
LONGEST_PATH, LONGEST_NAME = 4096, 255  # bytes; Linux's limits
SMALLEST, LARGEST = 2.0**-126, 2.0**128 - 2.0**104  # of float32, normal and finite


class InputError(ValueError):
    """Invalid input; the text names the file or argument, the place in it, the problem and the remedy.

    The parts that are known are joined as `FILE: WHERE: PROBLEM. HINT`. The command line prints this text after
    `error: ` and ends with status 2; nothing half-written is left behind.
    """

    def __init__(
        self, problem: str, *, file: str | Path | None = None, where: str | None = None, hint: str | None = None
    ):
        place = [str(part) for part in (file, where) if part is not None]
        text = ": ".join([*place, problem])
        if len(text) > LONGEST_TEXT:  # a message may quote a value of megabytes
            text = f"{text[: LONGEST_TEXT // 2]} ... {text[-LONGEST_TEXT // 2 :]}"
        whole = text if hint is None else f"{text}. {hint}"
        super().__init__(escape(whole))

    def _render_traceback_(self) -> list[str]:
        """What IPython and a notebook print instead of a traceback."""
        return [f"{type(self).__name__}: {self}"]


def escape(text: str, kept: str = "") -> str:
    """Escape all unprintable characters except those in `kept`: a name from a file may hold a newline, a terminal
    escape sequence, a bidirectional control character or a lone surrogate."""
    return "".join(sign if sign.isprintable() or sign in kept else repr(sign)[1:-1] for sign in text)


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    factory: Callable[[], Any] | None = None,
    flag: str | None = None,
    aliases: tuple[str, ...] = (),
    choices: Iterable[str] | None = None,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    limit: int | None = None,
) -> Any:
    """Declare a field of a config: its default, what it means, its range, and its flag where that has another name.

    `least` and `most` are inclusive bounds, `above` and `below` exclusive ones. `limit`: an upper bound on a number
    that only memory and time limit. `flag`: "virtual-tokens" for a field `length`; "" for a field without a flag.
    `factory` makes a mutable default.
    """
    metadata = {"help": help, "flag": flag, "aliases": aliases, "choices": None if choices is None else tuple(choices),
                "least": least, "most": most, "above": above, "below": below, "limit": limit}  # fmt: skip
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_fields(config: Any) -> None:
    """Check each field of a config dataclass by its annotation and its `option`; lists become tuples.

    Raises:
        InputError: `FIELD: VALUE must be ...`.
    """
    kind: Any = type(config)
    hints = resolve_hints(kind)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, list):
            value = tuple(value)
            object.__setattr__(config, field.name, value)
        check_value(value, hints[field.name], field.metadata, field.name)


@cache
def resolve_hints(kind: type) -> dict[str, Any]:
    """The annotations of a dataclass, resolved."""
    return typing.get_type_hints(kind)


def check_value(value: object, hint: Any, limits: Mapping[str, Any], where: str) -> None:
    """Check one value against an annotation and the limits of an `option`.

    Raises:
        InputError: `WHERE: VALUE must be ...`.
    """
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        parts = typing.get_args(hint)
        if value is None and type(None) in parts:
            return
        parts = tuple(part for part in parts if part is not type(None))
        kind = next((part for part in parts if has_type(value, part)), parts[0])
        return check_value(value, kind, limits, where)
    origin, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (int, float):
        return check_number(value, origin, limits, where)
    if origin is bool and not isinstance(value, bool):
        raise InputError(f"{format_value(value)} must be true or false", where=where)
    if origin is str:
        return check_text(value, limits.get("choices"), where)
    if origin is Path and not isinstance(value, Path):
        raise InputError(f"{format_value(value)} must be a Path", where=where)
    if origin is tuple and parts:
        if not isinstance(value, tuple):
            raise InputError(f"{format_value(value)} must be a list", where=where)
        for entry in value:
            check_value(entry, parts[0], limits, where)
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise InputError(f"{format_value(value)} must be an object", where=where)
        for key, entry in value.items():
            check_value(key, parts[0] if parts else str, {}, where)
            check_value(entry, parts[1] if parts else Any, limits, f"{where} {key!r}")
    elif isinstance(origin, type) and issubclass(origin, Path):
        check_path(value, where)
    elif isinstance(origin, type) and origin is not Any:
        check_kind(value, origin, where)


def has_type(value: object, hint: Any) -> bool:
    """Whether a value has the type of an annotation; an integer matches float, a boolean neither int nor float."""
    plain = typing.get_origin(hint) or hint
    if isinstance(value, bool):
        return plain is bool
    return isinstance(value, (int, float) if plain is float else plain)


def check_number(value: object, kind: type, limits: Mapping[str, Any], where: str) -> None:
    """Check that a value is an integer, or a finite number, within the limits.

    Raises:
        InputError: `WHERE: VALUE must be an integer >= 1`, `... must be in [0, 1)`, ...
    """
    least, most, above, below = (limits.get(name) for name in ("least", "most", "above", "below"))
    wanted = format_range(kind, least, most, above, below)
    number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    v: Any = value
    if not number or v != v or (kind is int and abs(v) >= 2**63):
        raise InputError(f"{format_value(value)} must be {wanted}", where=where)
    if (
        (least is not None and v < least)
        or (most is not None and v > most)
        or (above is not None and v <= above)
        or (below is not None and v >= below)
    ):
        raise InputError(f"{format_value(value)} must be {wanted}", where=where)
    limit = limits.get("limit")
    if limit is not None and v > limit:
        raise InputError(f"{format_value(value)} is beyond the limit of {limit:,}", where=where)
    if kind is float and (abs(v) > LARGEST or (above == 0 and v < SMALLEST)):
        finite = isinstance(v, float) and math.isfinite(v)  # in range, but not in float32's
        raise InputError(f"{format_value(value)} must be {wanted}{' in float32' if finite else ''}", where=where)


def format_range(kind: type, least: float | None, most: float | None, above: float | None, below: float | None) -> str:
    """Format a range for an error: "an integer >= 1", "in [0, 1)"."""
    low, high = least if least is not None else above, most if most is not None else below
    noun = "an integer" if kind is int else "finite and"
    if low is not None and high is not None:
        start, stop = "(" if least is None else "[", ")" if most is None else "]"
        ends = f"{start}{format_bound(low)}, {format_bound(high)}{stop}"
        return f"an integer in {ends}" if kind is int else f"in {ends}"
    if low is not None:
        return f"{noun} {'>=' if least is not None else '>'} {low:g}"
    if high is not None:
        return f"{noun} {'<=' if most is not None else '<'} {high:g}"
    return noun if kind is int else "a finite number"


def format_bound(number: float) -> str:
    """Format a bound: 2^63 instead of 9223372036854775808."""
    return f"2^{int(number).bit_length() - 1}" if number >= 2**20 and int(number).bit_count() == 1 else f"{number:g}"


def check_text(value: object, choices: tuple[str, ...] | None, where: str) -> None:
    """Check that a value is text, and one of the choices where there are any.

    Raises:
        InputError: `WHERE: VALUE must be text`, `WHERE: VALUE is not known (A, B)`.
    """
    if choices is not None:
        if not isinstance(value, str) or value not in choices:
            raise InputError(f"{format_value(value)} is not known ({', '.join(choices)})", where=where)
    elif not isinstance(value, str):
        raise InputError(f"{format_value(value)} must be text", where=where)
    else:
        check_characters(value, where)


def check_characters(text: str, where: str) -> None:
    """Check that a text holds no NUL and no lone surrogate.

    Raises:
        InputError: `WHERE: holds a NUL character at N`, `WHERE: holds a lone surrogate, '\\ud800', ...`.
    """
    if "\0" in text:
        raise InputError(f"holds a NUL character at {text.index(chr(0))}", where=where)
    if not text.isascii():
        lone = next((sign for sign in text if "\ud800" <= sign <= "\udfff"), None)
        if lone is not None:
            raise InputError(f"holds a lone surrogate, {lone!r}, which is no character", where=where)


def check_items(given: Any, kind: type[T], where: str, noun: str | None = None) -> list[T]:
    """Check a list (or any sequence) of texts, or of objects of a class, and return it as a list.

    A single text is refused, and so is a generator: it has no length and may be infinite.

    Raises:
        InputError: `WHERE: VALUE must be a list of ...`, `WHERE[N]: VALUE must be ...`.
    """
    noun = noun or ("text" if kind is str else "integer" if kind is int else kind.__name__)
    loose = isinstance(given, str | bytes | bytearray | Mapping | set | frozenset)
    if loose or not (hasattr(given, "__len__") and hasattr(given, "__iter__")):
        hint = "Put it in a list" if kind is not object and isinstance(given, kind) else None
        raise InputError(f"{format_value(given)} must be a list of {noun}s", where=where, hint=hint)
    try:
        too_many = len(given) > MOST_ITEMS
        entries = [] if too_many else list(given)
    except TypeError as error:  # a tensor or array of no dimension
        raise InputError(f"{format_value(given)} must be a list of {noun}s", where=where) from error
    except OverflowError:  # len(range(10**30))
        too_many, entries = True, []
    if too_many:
        raise InputError(f"holds over {MOST_ITEMS:,} {noun}s", where=where)
    for number, entry in enumerate(entries):
        if not isinstance(entry, kind):
            check_kind(entry, kind, f"{where}[{number}]")
    return entries


def check_kind(value: object, kind: Any, where: str) -> None:
    """Check that an argument is text, or an object of a class; the text itself is not checked.

    Raises:
        InputError: `WHERE: VALUE must be text`, `WHERE: VALUE must be a TrainConfig`.
    """
    if not isinstance(value, kind):
        raise InputError(
            f"{format_value(value)} must be {'text' if kind is str else add_article(kind.__name__)}", where=where
        )


def check_methods(value: object, names: Iterable[str], kind: str, where: str) -> None:
    """Check that an argument has the required methods; its class does not matter, but texts have an `encode` too.

    Raises:
        InputError: `WHERE: VALUE must be a Tokenizer`.
    """
    if isinstance(value, type | str | bytes) or not all(hasattr(value, name) for name in names):
        raise InputError(f"{format_value(value)} must be {add_article(kind)}", where=where)


def check_memory(size: int, where: str) -> None:
    """Check that an allocation fits in this machine's memory; a larger one may end the process.

    Raises:
        InputError: with both numbers.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise InputError(f"takes {size:,} bytes, and this machine has {memory:,}", where=where)


def check_path(value: object, where: str) -> Path:
    """Convert a text or path object to a Path.

    Raises:
        InputError: another type, an empty text, or characters that no path can hold.
    """
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise InputError(f"{format_value(value)} must be a path", where=where)
    if not text:
        raise InputError("is empty", where=where)
    check_characters(text, f"{where}: {format_value(text, 60)}")
    path = Path(text)
    if len(text.encode()) >= LONGEST_PATH or any(len(part.encode()) > LONGEST_NAME for part in path.parts):
        problem = f"{format_value(text, 60)} is too long for a path ({LONGEST_PATH} bytes, {LONGEST_NAME} for a name)"
        raise InputError(problem, where=where)
    return path


def add_article(noun: str) -> str:
    """The noun with its article, "a" or "an"."""
    return f"{'an' if noun[0] in 'AEIOUaeiou' else 'a'} {noun}"


def format_value(value: object, most: int = 200) -> str:
    """Format a value for an error, truncated: the caller may have passed megabytes, or an integer of 10,000 digits."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**64:
        return f"an integer of {value.bit_length()} bits"
    plain = isinstance(value, (str, bytes, int, float, type(None), list, tuple, dict))
    text = repr(value) if plain else f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"
