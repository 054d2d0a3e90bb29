"""Rows against a literal implementation of the rules, token by token; and input that cannot be packed."""

import tracemalloc
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minipeft.data.encoded import Encoded, Example, as_arrays
from minipeft.data.packing import Batches, PackConfig, pack
from minipeft.data.rows import fill_rows
from minipeft.documents import IGNORED, PADDING, derive_seed
from minipeft.errors import InputError

EOS, PAD = 1, 0
TOKENIZER: Any = SimpleNamespace(pad=PAD, eos=EOS, size=2**20, require_eos=lambda: EOS)


def examples_of(sizes: list[tuple[int, int]]) -> list[Example]:
    """Examples of (tokens, prompt tokens), every token another id, so that each can be followed; EOS is 1."""
    made, token = [], 2
    for size, prompt in sizes:
        made.append(Example([*range(token, token + size - 1), EOS], min(prompt, size)))
        token += size
    return made


SIZES = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 12)), min_size=1, max_size=30)
SHAPE = {"length": st.integers(4, 24), "batch": st.integers(1, 5), "virtual_tokens": st.integers(0, 2)}
LOSS = st.sampled_from(["all", "response"])
steady = settings(derandomize=True, deadline=None, max_examples=200)


def kept_of(batches: Batches) -> list[list[tuple[int, int, int]]]:
    """Each row of the first epoch as (id, label, document), without its padding, which is checked."""
    rows = []
    for batch in batches:
        assert batch.ids.shape == batch.labels.shape == batch.documents.shape
        assert {t.dtype for t in (batch.ids, batch.labels, batch.documents)} == {torch.int64}
        for ids, labels, documents in zip(batch.ids.tolist(), batch.labels.tolist(), batch.documents.tolist()):
            real = len(documents) - documents.count(PADDING)
            assert documents[real:] == [PADDING] * (len(ids) - real)
            assert labels[real:] == [IGNORED] * (len(ids) - real)
            assert ids[real:] == [PAD] * (len(ids) - real)
            rows.append(list(zip(ids[:real], labels[:real], documents[:real])))
    return rows


def expected(example: Example, loss: str, width: int) -> tuple[tuple[int, int], ...]:
    """A document's (id, label)s, one token after the other."""
    silent = max(1, example.prompt_tokens) if loss == "response" else 1
    return tuple((token, token if place >= silent else IGNORED) for place, token in enumerate(example.ids))[:width]


def check_report(batches: Batches, rows: list[list[tuple[int, int, int]]], examples: list[Example]) -> None:
    report = batches.report
    assert report.documents == len(examples)
    assert report.tokens_in == sum(len(example.ids) for example in examples)
    assert report.tokens_in == report.tokens_out + report.tokens_cut + report.tokens_left_out
    assert report.tokens_out == sum(len(row) for row in rows)
    assert report.targets == sum(label != IGNORED for row in rows for _, label, _ in row)
    assert report.rows == len(rows)
    assert report.batches == len(batches)
    cells = sum(batch.ids.numel() for batch in batches)
    assert report.padded == cells - report.tokens_out
    assert report.fill == pytest.approx(report.tokens_out / cells)


@steady
@given(sizes=SIZES, loss=LOSS, seed=st.integers(0, 2**63 - 1), **SHAPE)
def test_isolated_documents_arrive_whole(
    sizes: list[tuple[int, int]], loss: str, seed: int, length: int, batch: int, virtual_tokens: int
) -> None:
    examples, width = examples_of(sizes), length - virtual_tokens
    wanted = Counter(expected(example, loss, width) for example in examples)
    silent = Counter({d: n for d, n in wanted.items() if all(label == IGNORED for _, label in d)})
    if wanted == silent:
        return
    batches = pack(
        examples,
        TOKENIZER,
        length=length,
        batch=batch,
        virtual_tokens=virtual_tokens,
        seed=seed,
        loss_mask=loss,
        shuffle=True,
    )
    rows = kept_of(batches)
    found: Counter[tuple[tuple[int, int], ...]] = Counter()
    for row in rows:
        count = 1 + max(document for *_, document in row)
        assert [document for *_, document in row] == sorted(document for *_, document in row)
        found.update(tuple((t, label) for t, label, d in row if d == number) for number in range(count))
    assert found == wanted - silent
    widths = {b.ids.shape[1] for b in batches}
    assert widths == {width}
    check_report(batches, rows, examples)
    report = batches.report
    assert report.documents_cut == sum(len(example.ids) > width for example in examples)
    assert (report.left_out, report.tokens_left_out) == (silent.total(), sum(len(d) * n for d, n in silent.items()))


@steady
@given(sizes=SIZES, loss=LOSS, **SHAPE)
def test_plain_rows_are_one_text_cut_in_pieces(
    sizes: list[tuple[int, int]], loss: str, length: int, batch: int, virtual_tokens: int
) -> None:
    examples, width = examples_of(sizes), length - virtual_tokens
    text = []
    for example in examples:
        for place, token in enumerate(example.ids):
            text.append((token, IGNORED if loss == "response" and place < example.prompt_tokens else token, 0))
    pieces = [[(text[i][0], IGNORED, 0), *text[i + 1 : i + width]] for i in range(0, len(text), width)]
    wanted = [piece for piece in pieces if any(label != IGNORED for _, label, _ in piece)]
    if not wanted:
        return
    batches = pack(
        examples,
        TOKENIZER,
        length=length,
        batch=batch,
        virtual_tokens=virtual_tokens,
        loss_mask=loss,
        isolate=False,
        shuffle=False,
    )
    rows = kept_of(batches)
    assert rows == wanted
    check_report(batches, rows, examples)
    assert batches.report.left_out == len(pieces) - len(wanted)
    assert batches.report.tokens_cut == 0


@steady
@given(sizes=SIZES, isolate=st.booleans(), seed=st.integers(0, 2**63 - 1), at=st.integers(0, 200))
def test_a_batch_is_a_function_of_its_number(sizes: list[tuple[int, int]], isolate: bool, seed: int, at: int) -> None:
    examples = examples_of([(max(2, size), prompt) for size, prompt in sizes])
    first, again = (pack(examples, TOKENIZER, length=16, batch=2, seed=seed, isolate=isolate) for _ in range(2))
    for number in range(at % 7):
        assert first[number].ids.shape[1] == 16  # what was read before changes nothing
    for name in ("ids", "labels", "documents"):
        assert torch.equal(getattr(first[at], name), getattr(again[at], name))


def test_every_epoch_holds_every_row_once_in_another_order() -> None:
    batches = pack(examples_of([(10, 2)] * 50), TOKENIZER, length=10, batch=4, seed=5)
    assert len(batches) == 13
    assert batches[12].ids.shape == (2, 10)  # 50 rows in fours: the last batch is smaller, not dropped
    epochs = [[batches[13 * e + i].ids[:, 0].tolist() for i in range(13)] for e in range(3)]
    flat = [[first for batch in epoch for first in batch] for epoch in epochs]
    assert sorted(flat[0]) == sorted(flat[1]) == sorted(flat[2])
    assert len({tuple(order) for order in flat}) == 3
    other = pack(examples_of([(10, 2)] * 50), TOKENIZER, length=10, batch=4, seed=6)
    assert [b.ids[:, 0].tolist() for b in other] != epochs[0]
    still = pack(examples_of([(10, 2)] * 50), TOKENIZER, length=10, batch=4, shuffle=False)
    assert torch.equal(still[0].ids, still[13].ids)
    with pytest.raises(IndexError, match="counted from 0, not -1"):
        batches[-1]


def test_the_order_is_the_same_on_every_machine() -> None:
    """A resumed run must see the same rows on any machine, so the order is written out here."""
    batches = pack(examples_of([(10, 2)] * 8), TOKENIZER, length=10, batch=8, seed=0)
    assert derive_seed("order", 0, 0) == 6842717984295184508
    assert [first // 10 for first in batches[0].ids[:, 0].tolist()] == [0, 2, 7, 6, 5, 1, 4, 3]


@steady
@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_first_fit_is_the_naive_one(sizes: list[int]) -> None:
    rows: list[list[int]] = []
    for number in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        place = next((row for row in rows if sum(sizes[n] for n in row) + sizes[number] <= 20), None)
        if place is None:
            rows.append(place := [])
        place.append(number)
    assert [row.tolist() for row in fill_rows(np.array(sizes), 20)] == rows


def test_the_drawing_at_the_head_of_the_file() -> None:
    a, b, c = Example([5, 6, 7, EOS], 2), Example([8, 9, 10, 11, EOS], 2), Example([12, EOS], 1)
    (batch,) = pack([a, b, c], TOKENIZER, length=14, virtual_tokens=1, batch=1)
    assert batch.ids.tolist() == [[8, 9, 10, 11, EOS, 5, 6, 7, EOS, 12, EOS, PAD, PAD]]  # longest first
    assert batch.documents.tolist() == [[0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, -1, -1]]
    assert batch.labels.tolist() == [[-100, 9, 10, 11, EOS, -100, 6, 7, EOS, -100, EOS, -100, -100]]
    (batch,) = pack([a, b, c], TOKENIZER, length=14, virtual_tokens=1, batch=1, loss_mask="response")
    assert batch.labels.tolist() == [[-100, -100, 10, 11, EOS, -100, -100, 7, EOS, -100, EOS, -100, -100]]
    (batch,) = pack([a, b], TOKENIZER, length=5, batch=2, shuffle=False)
    assert batch.ids.tolist() == [[8, 9, 10, 11, EOS], [5, 6, 7, EOS, PAD]]
    assert batch.documents.tolist() == [[0, 0, 0, 0, 0], [0, 0, 0, 0, -1]]


def test_padding_needs_no_token_of_its_own() -> None:
    """`documents` marks padding, not the id: where padding is EOS, EOS is still supervised."""
    same: Any = SimpleNamespace(pad=EOS, eos=EOS, size=2**20, require_eos=lambda: EOS)
    examples = [Example([5, EOS], 1), Example([6, 7, EOS], 1)]
    (batch,) = pack(examples, same, length=3, batch=2, shuffle=False)
    assert batch.labels.tolist() == [[-100, 7, EOS], [-100, EOS, -100]]
    none: Any = SimpleNamespace(pad=None, eos=None, size=2**20, require_eos=lambda: EOS)
    (batch,) = pack(examples, none, length=3, batch=2, shuffle=False)
    assert batch.ids.tolist() == [[6, 7, EOS], [5, EOS, 0]]


def test_the_report_says_where_the_tokens_went() -> None:
    report = pack(
        examples_of([(30, 2), (9, 9), (6, 2), (1, 0)]), TOKENIZER, length=10, virtual_tokens=2, batch=2
    ).report
    assert str(report).splitlines() == [
        "4 documents of 46 tokens -> 3 rows in 2 batches, 91.7% full",
        "22 tokens kept, 19 of them with a loss; 2 padded",
        "2 documents were too long: 23 tokens cut off their ends",
        "1 without a supervised token left out (1 tokens)",
        "2 positions of each row are reserved for virtual tokens",
    ]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"batch": 0}, "batch: 0 must be an integer >= 1"),
        ({"virtual_tokens": -1}, "virtual_tokens: -1 must be an integer >= 0"),
        ({"seed": -1}, "seed: -1 must be an integer in [0, 2^63)"),
        ({"seed": 2**63}, f"seed: {2**63} must be an integer in [0, 2^63)"),
        ({"loss_mask": "answer"}, "loss_mask: 'answer' is not known (all, response)"),
        ({"length": 20, "virtual_tokens": 20}, "length: 20 leaves 0 tokens beside 20 virtual tokens"),
        ({"length": 1}, "length: 1 leaves 1 tokens beside 0 virtual tokens"),
        ({"length": 5, "loss_mask": "response"}, "examples: no token is left to take a loss on (the longest of 3"),
        ({"examples": []}, "examples: no examples to pack"),
        ({"examples": [Example([5], 0)]}, "examples: no token is left to take a loss on"),
    ],
)
def test_what_cannot_be_packed(changed: dict[str, Any], said: str) -> None:
    given: dict[str, Any] = {"examples": examples_of([(9, 6)] * 3), "tokenizer": TOKENIZER} | changed
    with pytest.raises(InputError) as error:
        pack(**given)
    assert str(error.value).startswith(said)


def test_plain_rows_need_eos_between_documents() -> None:
    examples = [Example([5, EOS], 1), Example([6, 7], 1)]
    with pytest.raises(InputError, match="example 1: must end with EOS"):
        pack(examples, TOKENIZER, isolate=False)


def test_the_config_is_checked() -> None:
    assert PackConfig() == PackConfig(None, 1, True, "all")
    for changed, said in (
        ({"length": 0}, "length: 0 must be an integer >= 1"),
        ({"batch": True}, "batch: True must be an integer >= 1"),
        ({"isolate": 1}, "isolate: 1 must be true or false"),
    ):
        with pytest.raises(InputError) as error:
            PackConfig(**changed)  # type: ignore[arg-type]
        assert str(error.value) == said


def test_packing_copies_nothing() -> None:
    """Of 200,000 examples, 88 MB of ids, packing takes less than half as much again; as lists they took 1.5 GB."""
    draw = np.random.default_rng(0)
    sizes = draw.integers(60, 160, 200_000)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    ids = draw.integers(2, 40_000, starts[-1], dtype=np.int32)
    encoded = Encoded(ids, starts, np.full(len(sizes), 20, np.int32), None)
    for loss in ("all", "response"):
        tracemalloc.start()
        try:
            batches = pack(encoded, TOKENIZER, length=1024, batch=4, loss_mask=loss)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 200 * len(sizes), f"{peak:,} bytes"
        assert batches.report.fill > 0.98
        assert batches[7].ids.shape == (4, 1024)


def test_a_chat_is_trained_on_where_it_says() -> None:
    """Whatever the loss mask; and a document that is cut before the assistant speaks is left out."""
    chats = [
        Example([5, 6, 7, 8], 1, [False, True, False, True]),
        Example([9, 10, 11, 12, 13], 4, [False] * 4 + [True]),
        Example([14, EOS], 0, [True, True]),
    ]
    for loss in ("all", "response"):
        batches = pack(chats, TOKENIZER, length=4, batch=3, loss_mask=loss, shuffle=False)
        assert batches[0].labels.tolist() == [[-100, 6, -100, 8], [-100, EOS, -100, -100]]
        assert (batches.report.targets, batches.report.left_out) == (3, 1)
    with pytest.raises(InputError, match="example 0: must end with EOS, which separates joined documents"):
        pack(chats, TOKENIZER, length=4, isolate=False)


def test_what_is_no_tokenizer_is_refused() -> None:
    with pytest.raises(InputError, match="tokenizer: 5 must be a Tokenizer"):
        pack([Example([1, 2, 3], 1)], 5)  # type: ignore[arg-type]


@pytest.mark.parametrize("strange", [7, -1])
def test_the_first_id_beyond_the_vocabulary_is_named_in_flat_arrays_too(strange: int) -> None:
    tokenizer = SimpleNamespace(size=7, eos=2, pad=None, require_eos=lambda: 2)
    with pytest.raises(InputError, match=f"examples: id {strange} is not one of the tokenizer's 7"):
        pack(as_arrays([Example([1, strange, 6], 1)]), tokenizer)  # type: ignore[arg-type]
