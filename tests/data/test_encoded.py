"""Flat arrays hold what the examples held."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipeft.data.encoded import Example, as_arrays, take_together

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=6)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(IDS, st.integers(0, 7)), max_size=6))
def test_examples_come_back(given_: list[tuple[list[int], int]]) -> None:
    examples = [Example(ids, prompt) for ids, prompt in given_]
    encoded = as_arrays(iter(examples))
    assert list(encoded) == examples
    assert encoded[:2] == examples[:2]
    assert encoded.ids.dtype == np.int32
    assert encoded.lengths.tolist() == [len(example.ids) for example in examples]
    assert as_arrays(encoded) is encoded
    for first in range(len(examples)):
        for last in range(first, len(examples)):
            wanted = [n >= example.prompt_tokens for example in examples[first:last] for n in range(len(example.ids))]
            assert encoded.supervised(first, last).tolist() == wanted


def test_what_a_chat_trains_on_comes_back() -> None:
    examples = [Example([5, 6, 7], 1, [False, True, False]), Example([8], 0, [True])]
    encoded = as_arrays(examples)
    assert list(encoded) == examples
    assert encoded[-1] == examples[-1]
    assert encoded.supervised(0, 2).tolist() == [False, True, False, True]
    with pytest.raises(IndexError):
        encoded[2]


def test_a_generator_is_taken_in_lists() -> None:
    assert list(take_together(iter(range(5)), 2)) == [[0, 1], [2, 3], [4]]
