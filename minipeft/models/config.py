"""Reading config.json: the fields, limits and activations that the families' configs share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from operator import attrgetter
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor

from minipeft.errors import InputError, check_value, option, resolve_hints

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}

DTYPES = ("float32", "float16", "bfloat16")
WIDEST = 2**20  # largest width: the product of three, in bytes, fits in 63 bits

C = TypeVar("C")


def parse_config(cls: type[C], given: Mapping[str, object]) -> C:
    """Fill a family's config dataclass from the object of config.json; unknown keys have no effect and are ignored.

    Raises:
        InputError: a field has the wrong type or value, or is an unsupported setting.
    """
    if given.get("quantization_config") is not None:
        raise InputError("quantized weights are not supported", where="quantization_config")
    for name in ("dtype", "torch_dtype"):  # the weights' own dtype decides, but an impossible value is an error
        if given.get(name) not in (None, *DTYPES):
            raise InputError(f"{given[name]!r} is not supported ({', '.join(DTYPES)})", where=name)
    fields = cls.from_json(given)  # type: ignore[attr-defined]
    hints: dict[str, Any] = resolve_hints(cls)  # type: ignore[arg-type]
    chosen = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name in fields:
            value = fields[field.name]
            chosen[field.name] = tuple(value) if isinstance(value, list) else value
            check_value(chosen[field.name], hints[field.name], field.metadata, find_key(cls, field.name))
    return cls(**chosen)


def count(default: int | None) -> Any:
    """A field that holds a count."""
    return option(default, least=1, below=2**31)


def width(default: int | None) -> Any:
    """A field that holds a width or a number of heads."""
    return option(default, least=1, most=WIDEST)


def dropout(default: float) -> Any:
    """A field that holds a dropout probability."""
    return option(default, least=0, below=1)


def alias(name: str) -> Any:
    """A read-only property that returns another field, under the name that all families share."""
    return property(attrgetter(name), doc=f"`{name}`")


def find_key(config: object, name: str) -> str:
    """A field's key in the family's config.json."""
    return str(getattr(config, "spelling", {}).get(name, name))


def check_divides(config: object, name: str, whole: str) -> None:
    """Check that the value of one field divides that of another.

    Raises:
        InputError: it does not.
    """
    if getattr(config, whole) % getattr(config, name):
        raise InputError(
            f"{getattr(config, name)} does not divide {whole} {getattr(config, whole)}", where=find_key(config, name)
        )
