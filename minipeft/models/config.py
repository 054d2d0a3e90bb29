"""Reading config.json: the fields, limits and activations that the families' configs share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from operator import attrgetter
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor

from minipeft.errors import InputError, check_value, option, type_hints

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
    hints: dict[str, Any] = type_hints(cls)  # type: ignore[arg-type]
    chosen = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name in fields:
            value = fields[field.name]
            chosen[field.name] = tuple(value) if isinstance(value, list) else value
            check_value(chosen[field.name], hints[field.name], field.metadata, spelled(cls, field.name))
    return cls(**chosen)


def count(default: int | None) -> Any:
    """A field that holds how many of something there are."""
    return option(default, least=1, below=2**31)


def width(default: int | None) -> Any:
    """A field that holds a width, or a number of heads, which multiplies one."""
    return option(default, least=1, most=WIDEST)


def dropout(default: float) -> Any:
    """A field that holds the probability of a dropout."""
    return option(default, least=0, below=1)


def alias(name: str) -> Any:
    """A read-only property with the value of another field: the name that all families share for it."""
    return property(attrgetter(name), doc=f"`{name}`")


def spelled(config: object, name: str) -> str:
    """A field as the family's config.json spells it."""
    return str(getattr(config, "spelling", {}).get(name, name))


def divides(config: object, name: str, whole: str) -> None:
    """Check that the value of one field divides that of another.

    Raises:
        InputError: it does not.
    """
    if getattr(config, whole) % getattr(config, name):
        raise InputError(
            f"{getattr(config, name)} does not divide {whole} {getattr(config, whole)}", where=spelled(config, name)
        )
