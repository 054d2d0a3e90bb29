"""InputError, the one exception for what a caller's input did; and the checks that the fields of all configs share.

A config is a frozen dataclass. Each field declares in one place what it may hold and what it means:

    rank: int = option(16, "rank r of the update", least=1)

and `check_fields(self)`, in `__post_init__`, checks all of them: the kind by the annotation, the range by the field.
The command line makes a flag of each field (cli/flags.py).
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any


class InputError(ValueError):
    """What the caller gave cannot be used; the text says which file or argument, where in it, why, and what to do.

    The parts that are known are joined as `FILE: WHERE: PROBLEM. HINT`. The command line prints this text after
    `error: ` and ends with status 2; nothing half-written is left behind.
    """

    def __init__(
        self, problem: str, *, file: str | Path | None = None, where: str | None = None, hint: str | None = None
    ):
        place = [str(part) for part in (file, where) if part is not None]
        text = ": ".join([*place, problem])
        whole = text if hint is None else f"{text}. {hint}"
        super().__init__(escape(whole))


def escape(text: str, kept: str = "") -> str:
    """The text with everything unprintable escaped but the characters of `kept`: a name out of a file may hold a line
    end, a terminal's escape sequence, a mark that reverses the order of what follows, or half a character."""
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
) -> Any:
    """Declare a field of a config: its default, what it means, its range, and its flag where that has another name.

    `least` and `most` belong to the range, `above` and `below` do not. `flag`: "virtual-tokens" for a field `length`;
    "" for a field without a flag. `factory` makes a default that must not be shared.
    """
    metadata = {"help": help, "flag": flag, "aliases": aliases, "choices": None if choices is None else tuple(choices),
                "least": least, "most": most, "above": above, "below": below}  # fmt: skip
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_fields(config: Any) -> None:
    """Check each field of a config dataclass by its annotation and its `option`; lists become tuples.

    Raises:
        InputError: `FIELD: VALUE must be ...`.
    """
    kind: Any = type(config)
    hints = type_hints(kind)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, list):
            value = tuple(value)
            object.__setattr__(config, field.name, value)
        check_value(value, hints[field.name], field.metadata, field.name)


@cache
def type_hints(kind: type) -> dict[str, Any]:
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
        kind = next((part for part in parts if matches(value, part)), parts[0])
        return check_value(value, kind, limits, where)
    origin, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (int, float):
        return check_number(value, origin, limits, where)
    if origin is bool and not isinstance(value, bool):
        raise InputError(f"{shown(value)} must be true or false", where=where)
    if origin is str:
        return check_text(value, limits.get("choices"), where)
    if origin is Path and not isinstance(value, Path):
        raise InputError(f"{shown(value)} must be a Path", where=where)
    if origin is tuple and parts:
        if not isinstance(value, tuple):
            raise InputError(f"{shown(value)} must be a list", where=where)
        for entry in value:
            check_value(entry, parts[0], limits, where)
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise InputError(f"{shown(value)} must be an object", where=where)
        for key, entry in value.items():
            check_value(key, parts[0] if parts else str, {}, where)
            check_value(entry, parts[1] if parts else Any, limits, f"{where} {key!r}")
    elif isinstance(origin, type) and dataclasses.is_dataclass(origin) and not isinstance(value, origin):
        raise InputError(f"{shown(value)} must be a {origin.__name__}", where=where)


def matches(value: object, hint: Any) -> bool:
    """Whether a value is of the plain kind of an annotation; an integer is a float, a boolean is neither."""
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
    number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    good = number and fits_float(value) and (kind is float or abs(value) < 2**63)  # type: ignore[arg-type]
    if good:
        v: Any = value
        good = not (
            (least is not None and v < least)
            or (most is not None and v > most)
            or (above is not None and v <= above)
            or (below is not None and v >= below)
        )
    if not good:
        raise InputError(f"{shown(value)} must be {described(kind, least, most, above, below)}", where=where)


def fits_float(value: float) -> bool:
    """Whether a number is finite as a float: an integer may be beyond 1.8e308."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def described(kind: type, least: float | None, most: float | None, above: float | None, below: float | None) -> str:
    """A range as a reader knows it."""
    low, high = least if least is not None else above, most if most is not None else below
    noun = "an integer" if kind is int else "finite and"
    if low is not None and high is not None:
        ends = f"{'[' if least is not None else '('}{power(low)}, {power(high)}{']' if most is not None else ')'}"
        return f"an integer in {ends}" if kind is int else f"in {ends}"
    if low is not None:
        return f"{noun} {'>=' if least is not None else '>'} {low:g}"
    if high is not None:
        return f"{noun} {'<=' if most is not None else '<'} {high:g}"
    return noun if kind is int else "a finite number"


def power(number: float) -> str:
    """A limit; 2^63 and not 9223372036854775808."""
    return f"2^{int(number).bit_length() - 1}" if number >= 2**20 and int(number).bit_count() == 1 else f"{number:g}"


def check_text(value: object, choices: tuple[str, ...] | None, where: str) -> None:
    """Check that a value is text, and one of the choices where there are any.

    Raises:
        InputError: `WHERE: VALUE must be text`, `WHERE: VALUE is not known (A, B)`.
    """
    if choices is not None:
        if not isinstance(value, str) or value not in choices:
            raise InputError(f"{shown(value)} is not known ({', '.join(choices)})", where=where)
    elif not isinstance(value, str):
        raise InputError(f"{shown(value)} must be text", where=where)


def shown(value: object, most: int = 200) -> str:
    """A value in an error, cut where it is long: a caller may have given megabytes, or an integer of 10,000 digits."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**64:
        return f"an integer of {value.bit_length()} bits"
    plain = isinstance(value, (str, bytes, int, float, type(None), list, tuple, dict))
    text = repr(value) if plain else f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"
