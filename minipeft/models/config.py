"""Reading config.json: the checks and the activations that the families' configs share."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor

from minipeft.errors import InputError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}

DTYPES = ("float32", "float16", "bfloat16")
WIDEST = 2**20  # of a width: three of them multiplied, in bytes, still fit in 63 bits

C = TypeVar("C")


def config_from(cls: type[C], given: Mapping[str, object]) -> C:
    """Fill a family's config dataclass from the object of config.json; unknown keys have no effect and are ignored.

    Raises:
        InputError: a field has the wrong type or value, or asks for what is not implemented.
    """
    if given.get("quantization_config") is not None:
        raise InputError("quantized weights are not supported", where="quantization_config")
    for name in ("dtype", "torch_dtype"):  # the weights' own dtype counts, but a file must not say what cannot be
        if given.get(name) not in (None, *DTYPES):
            raise InputError(f"{given[name]!r} is not supported ({', '.join(DTYPES)})", where=name)
    fields = cls.from_json(given)  # type: ignore[attr-defined]
    hints = typing.get_type_hints(cls)
    chosen = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name in fields:
            value = fields[field.name]
            if not fits(value, hints[field.name]):
                raise InputError(f"{value!r} is not {described(hints[field.name])}", where=field.name)
            chosen[field.name] = value
    return cls(**chosen)


def fits(value: object, hint: Any) -> bool:
    """Whether a JSON value is of the annotated type; an integer is a float, a boolean is not an integer."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(fits(value, part) for part in typing.get_args(hint))
    plain = typing.get_origin(hint) or hint
    if isinstance(value, bool):
        return plain is bool
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return isinstance(value, (int, float) if plain is float else plain)


def described(hint: Any) -> str:
    """A type as a user reads it."""
    return str(getattr(hint, "__name__", hint)).replace("NoneType", "null").replace("None", "null")


def at_least(config: object, name: str, least: int, most: int = 2**31 - 1) -> None:
    value = getattr(config, name)
    if not least <= value <= most:
        raise InputError(f"{value} must be {f'>= {least}' if value < least else f'<= {most}'}", where=name)


def positive(config: object, name: str) -> None:
    value = getattr(config, name)
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{value} must be finite and > 0", where=name)


def fraction(config: object, name: str) -> None:
    if not 0 <= getattr(config, name) < 1:
        raise InputError(f"{getattr(config, name)} must be in [0, 1)", where=name)


def choice(config: object, name: str, allowed: Mapping[str, object]) -> None:
    if getattr(config, name) not in allowed:
        raise InputError(f"{getattr(config, name)!r} is not supported ({', '.join(allowed)})", where=name)


def divides(config: object, name: str, whole: str) -> None:
    if getattr(config, whole) % getattr(config, name):
        raise InputError(f"{getattr(config, name)} does not divide {whole} {getattr(config, whole)}", where=name)
