"""The one exception's text."""

from pathlib import Path

import pytest

from minipeft.errors import InputError


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
