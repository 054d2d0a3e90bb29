"""Encoded examples in flat arrays: a million of 110 tokens take 0.5 GB, where lists of Python integers take 7.

ids      a a a E b b b b E c E     int32, all examples one after the other
starts   0       4         9   11  example i holds ids[starts[i] : starts[i + 1]]
prompts  2       3         1       how many of its first tokens are the prompt
trained  0 0 1 1 ...               chats only: 1 where a token is supervised; `prompts` has no effect
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar, overload

import numpy as np

Array = np.ndarray  # its dtype stands where one is made
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Example:
    """A document to train on: its ids, EOS included, of which the first `prompt_tokens` are the prompt.

    `trained`: the supervised tokens of a chat; elsewhere the loss mask chooses them.
    """

    ids: list[int]
    prompt_tokens: int
    trained: list[bool] | None = None


class Encoded(Sequence[Example]):
    """Examples in flat arrays; `encoded[i]` is one of them as an Example.

    `chosen`: the numbers of the examples in use, ascending; the arrays may hold others between them.
    """

    def __init__(
        self, ids: Array, starts: Array, prompts: Array, trained: Array | None = None, chosen: Array | None = None
    ):
        self.ids = ids  # [N] int32
        self.starts = starts  # [held + 1] int64
        self.prompts = prompts  # [held] int32
        self.trained = trained  # [N] bool, or None
        self.chosen = np.arange(len(prompts)) if chosen is None else chosen  # [examples] int64

    def __len__(self) -> int:
        return len(self.chosen)

    def __repr__(self) -> str:
        return f"Encoded({len(self):,} examples, {int(self.lengths.sum()):,} tokens)"

    @overload
    def __getitem__(self, number: int) -> Example: ...

    @overload
    def __getitem__(self, number: slice) -> list[Example]: ...

    def __getitem__(self, number: int | slice) -> Example | list[Example]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        place = int(self.chosen[range(len(self))[number]])
        start, stop = self.starts[place : place + 2].tolist()
        trained = None if self.trained is None else self.trained[start:stop].tolist()
        return Example(self.ids[start:stop].tolist(), int(self.prompts[place]), trained)

    @property
    def lengths(self) -> Array:
        """The tokens of each example. -> [examples] int64"""
        return np.diff(self.starts)[self.chosen]

    def select(self, kept: Array) -> Encoded:
        """The examples where `kept` [examples] is true. The arrays are shared, and copied only where less than half of
        what they hold is kept."""
        found = Encoded(self.ids, self.starts, self.prompts, self.trained, self.chosen[kept])
        return found if 2 * len(found) >= len(self.prompts) else found.compact()

    def compact(self) -> Encoded:
        """The same examples in arrays that hold no others."""
        if len(self) == len(self.prompts):
            return self
        held = np.zeros(len(self.prompts), np.bool_)
        held[self.chosen] = True
        tokens = np.repeat(held, np.diff(self.starts))  # [N]
        trained = None if self.trained is None else self.trained[tokens]
        starts = np.concatenate([[0], np.cumsum(self.lengths)])
        return Encoded(self.ids[tokens], starts, self.prompts[held], trained)

    def supervised(self, first: int, last: int) -> Array:
        """Whether each token of the held examples first .. last - 1 is supervised, where only responses are.
        -> [tokens] bool"""
        starts = self.starts[first : last + 1]
        if self.trained is not None:
            return self.trained[starts[0] : starts[-1]]
        answers = np.repeat(starts[:-1] + self.prompts[first:last], np.diff(starts))  # where each token's answer begins
        return np.arange(starts[0], starts[-1]) >= answers


def as_arrays(examples: Iterable[Example]) -> Encoded:
    """Collect examples in flat arrays; memory grows by the arrays alone."""
    if isinstance(examples, Encoded):
        return examples
    ids, sizes, prompts, trained = array("i"), array("i"), array("i"), bytearray()
    for example in examples:
        ids.extend(example.ids)
        sizes.append(len(example.ids))
        prompts.append(example.prompt_tokens)
        if example.trained is not None:
            trained.extend(example.trained)
    starts = np.concatenate([[0], np.cumsum(np.frombuffer(sizes, np.int32), dtype=np.int64)]).astype(np.int64)
    chosen = np.frombuffer(trained, np.bool_) if trained else None
    assert chosen is None or len(chosen) == len(ids), "chats are not mixed with other examples"
    return Encoded(np.frombuffer(ids, np.int32), starts, np.frombuffer(prompts, np.int32), chosen)


def take_together(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield the items in lists of `size`; the last may be shorter."""
    held: list[T] = []
    for item in items:
        held.append(item)
        if len(held) == size:
            yield held
            held = []
    if held:
        yield held
