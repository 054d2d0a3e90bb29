"""Flags from config dataclasses: one per field, with the help, choices and range that the field declares.

    rank: int = option(16, "rank r of the update")       --rank INT            int, float, text
    isolate: bool = option(True, ...)                    --isolate, --no-isolate
    layers: tuple[int, ...]                              --layers 0,1,2
    stop: tuple[str, ...]                                --stop TEXT --stop TEXT
    targets: str | tuple[str, ...]                       --targets q_proj,v_proj, or a regular expression
    lr_multipliers: Mapping[str, float]                  --lr-multiplier lora_B=16, once for each name

Flags have no defaults: a flag that is not given is absent from the result, and the config's default applies.
"""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from minipeft.errors import InputError


class Pairs(argparse.Action):
    """Collects NAME=VALUE flags into a dict."""

    def __call__(self, parser: Any, namespace: Any, value: Any, flag: str | None = None) -> None:
        setattr(namespace, self.dest, {**getattr(namespace, self.dest, {}), value[0]: value[1]})


def add_fields(
    parser: Any,
    config: type,
    *,
    skip: Iterable[str] = (),
    several: str | None = None,
    defaults: Mapping[str, str] | None = None,
) -> None:
    """Add a flag for each field of a config, except the flags in `skip`.

    `several`: "+" lets a flag for a list of texts take several values (--model A B); no positional argument may follow.
    `defaults`: the help text for a field's default, if it differs from the config's.
    """
    from minipeft.runs.config import list_settings

    for setting in list_settings(config, ""):
        if setting.name not in skip:
            add_flag(parser, setting, explain(setting, (defaults or {}).get(setting.field)), several)


def add_flag(parser: Any, setting: Any, help: str | None = None, several: str | None = None) -> None:
    """Add the flag of one setting to a parser or argument group."""
    names = [f"--{name}" for name in (setting.name, *(setting.metadata.get("aliases") or ()))]
    how: dict[str, Any] = {"dest": setting.name.replace("-", "_"), "default": argparse.SUPPRESS}
    how["help"] = (explain(setting) if help is None else help).replace("%", "%%")
    parser.add_argument(*names, **how, **choose_reader(setting, several))


def choose_reader(setting: Any, several: str | None) -> dict[str, Any]:
    """Choose argparse's action, type and metavar for a flag."""
    from minipeft.runs.config import is_required

    parts = [part for part in list_alternatives(setting.hint) if part is not type(None)]
    kind, origin = parts[0], typing.get_origin(parts[0]) or parts[0]
    if len(parts) > 1:  # str | tuple[str, ...]
        return {"type": read_targets, "metavar": "NAMES"}
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if origin is tuple and typing.get_args(kind)[0] is int:
        return {"type": read_integers, "metavar": "N,N"}
    if origin is tuple:
        return {"action": "append" if several is None else "extend", "nargs": several, "metavar": "TEXT"}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"action": Pairs, "type": make_pair_reader(typing.get_args(kind)[1]), "metavar": "NAME=VALUE"}
    return {"type": kind, "metavar": "TEXT" if kind is str else kind.__name__.upper(), "required": is_required(setting)}


def list_alternatives(hint: Any) -> tuple[Any, ...]:
    """The alternatives of an annotation: int | None -> (int, None)."""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if union else (hint,)


def explain(setting: Any, default_text: str | None = None) -> str:
    """Build the help of a flag: the field's text, its choices and its default."""
    from minipeft.runs.config import is_required

    text, choices = setting.metadata["help"], setting.metadata.get("choices") or ()
    if choices and not all(choice in text for choice in choices):
        text = f"{text}: {', '.join(choices)}"
    if default_text is not None:
        return f"{text} (default {default_text})"
    default = setting.default
    if is_required(setting) or default is None or isinstance(default, bool | Mapping) or default in ("", ()):
        return f"{text} (default yes)" if default is True else str(text)
    return f"{text} (default {' '.join(default) if isinstance(default, tuple) else default})"


def read_targets(text: str) -> Any:
    """Parse --targets: comma-separated names, a keyword, or a regular expression."""
    from minipeft.adapters.targets import parse_targets

    try:
        return parse_targets(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def read_integers(text: str) -> tuple[int, ...]:
    """Parse comma-separated integers."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be comma-separated integers") from None


def make_pair_reader(kind: type) -> Callable[[str], tuple[str, Any]]:
    """Make a function that parses NAME=VALUE; the name may contain "="."""

    def read(text: str) -> tuple[str, Any]:
        name, equals, value = text.rpartition("=")
        try:
            if not (name and equals):
                raise ValueError
            return name, kind(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} must be NAME=VALUE, such as lora_B=16") from None

    return read


def read_typed(config: type, options: argparse.Namespace, skip: Iterable[str] = ()) -> dict[str, Any]:
    """Read the fields of a config that were given on the command line, by field name."""
    from minipeft.runs.config import list_settings

    found = [setting for setting in list_settings(config, "") if setting.name not in skip]
    return {s.field: getattr(options, s.name.replace("-", "_")) for s in found if was_typed(s.name, options)}


def was_typed(flag: str, options: argparse.Namespace) -> bool:
    """Whether a flag was given on the command line."""
    return hasattr(options, flag.replace("-", "_"))


def add_method_flags(parser: argparse.ArgumentParser, skip: Iterable[str] = ()) -> None:
    """Add the flags of every method's config, in one group per set of methods that share them.

    A flag with different help in two methods gets both texts: --init.
    """
    from minipeft.adapters import METHODS
    from minipeft.runs.config import list_settings

    found: dict[str, dict[str, Any]] = {}  # flag -> method -> setting
    for method in METHODS.values():
        for setting in list_settings(method.config, "adapter"):
            if setting.name not in skip:
                found.setdefault(setting.name, {})[method.name] = setting
    sharing: dict[tuple[str, ...], list[str]] = {}
    for flag, having in found.items():
        sharing.setdefault(tuple(having), []).append(flag)
    for methods, flags in sharing.items():
        names = [name for method in methods for name in (method, *METHODS[method].presets)]
        group = parser.add_argument_group(f"with --method {', '.join(names)}")
        for flag in flags:
            texts = {method: explain(setting) for method, setting in found[flag].items()}
            differing = len(set(texts.values())) > 1
            text = "; ".join(f"{method}: {text}" for method, text in texts.items()) if differing else None
            add_flag(group, found[flag][methods[0]], text)


def read_method_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Read the methods' flags that were given, by name; run_config checks that the method has them."""
    from minipeft.adapters import METHODS
    from minipeft.runs.config import list_settings

    flags = {setting.name for method in METHODS.values() for setting in list_settings(method.config, "adapter")}
    return {
        name: getattr(options, name)
        for name in (flag.replace("-", "_") for flag in sorted(flags))
        if hasattr(options, name)
    }
