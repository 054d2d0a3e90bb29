"""The text of InputError."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from minipeft.errors import InputError, check_fields, option


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, "too long"),
        ({"file": Path("a/b.json")}, "a/b.json: too long"),
        ({"where": "line 3"}, "line 3: too long"),
        ({"file": "b.json", "where": "line 3", "hint": "Cut it"}, "b.json: line 3: too long. Cut it"),
        ({"hint": "Cut it"}, "too long. Cut it"),
    ],
)
def test_the_parts_that_are_known_are_joined(given, text):
    assert str(InputError("too long", **given)) == text


def test_it_is_a_value_error():
    assert issubclass(InputError, ValueError)


@dataclass(frozen=True)
class Every:
    """A field of each kind that a config may have."""

    rank: int = option(16, "r", least=1)
    dropout: float = option(0.5, "p", least=0, below=1)
    rate: float | None = option(None, "lr", above=0)
    top_p: float = option(1.0, "p", above=0, most=1)
    seed: int = option(0, "s", least=0, below=2**63)
    stop: tuple[str, ...] = option((), "texts")
    layers: tuple[int, ...] | None = option(None, "blocks", least=0)
    init: str = option("a", "start", choices=("a", "b"))
    tied: bool = option(False, "flag")
    factors: Mapping[str, float] = option(help="by name", factory=dict, above=0)
    targets: str | tuple[str, ...] = option("x", "names")

    def __post_init__(self) -> None:
        check_fields(self)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"rank": 0}, "rank: 0 must be an integer >= 1"),
        ({"rank": True}, "rank: True must be an integer >= 1"),
        ({"rank": 1.5}, "rank: 1.5 must be an integer >= 1"),
        ({"rank": "2"}, "rank: '2' must be an integer >= 1"),
        ({"rank": 10**400}, "rank: an integer of 1329 bits must be an integer >= 1"),
        ({"dropout": 1}, "dropout: 1 must be in [0, 1)"),
        ({"dropout": float("nan")}, "dropout: nan must be in [0, 1)"),
        ({"rate": 0}, "rate: 0 must be finite and > 0"),
        ({"rate": 10**400}, "rate: an integer of 1329 bits must be finite and > 0"),
        ({"rate": torch.ones(1)}, "rate: a Tensor must be finite and > 0"),
        ({"top_p": 0}, "top_p: 0 must be in (0, 1]"),
        ({"seed": -1}, "seed: -1 must be an integer in [0, 2^63)"),
        ({"seed": 2**63}, "seed: 9223372036854775808 must be an integer in [0, 2^63)"),
        ({"stop": "abc"}, "stop: 'abc' must be a list"),
        ({"stop": (5,)}, "stop: 5 must be text"),
        ({"layers": "x"}, "layers: 'x' must be a list"),
        ({"layers": (-1,)}, "layers: -1 must be an integer >= 0"),
        ({"init": "banana"}, "init: 'banana' is not known (a, b)"),
        ({"init": 3}, "init: 3 is not known (a, b)"),
        ({"tied": "no"}, "tied: 'no' must be true or false"),
        ({"factors": {"a": -1}}, "factors 'a': -1 must be finite and > 0"),
        ({"factors": 3}, "factors: 3 must be an object"),
        ({"targets": 5}, "targets: 5 must be text"),
        ({"targets": "x" * 10_000}, None),
        ({"stop": [[1]]}, "stop: [1] must be text"),
    ],
)
def test_each_field_is_checked_by_its_annotation_and_its_range(given, text):
    if text is None:
        Every(**given)
        return
    with pytest.raises(InputError) as caught:
        Every(**given)
    assert str(caught.value) == text


def test_lists_become_tuples_and_none_is_allowed_where_it_is_said():
    assert Every(layers=[1, 2], stop=["a"], targets=["q", "v"]) == Every(layers=(1, 2), stop=("a",), targets=("q", "v"))
    with pytest.raises(InputError, match="rank: None must be an integer >= 1"):
        Every(rank=None)
