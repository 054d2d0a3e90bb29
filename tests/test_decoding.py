"""Batch-invariant decoding: the logits of a prompt by sha256 in any batch, the ids of plain decoding, and refusals."""

import copy
import hashlib

import pytest
import torch
from torch import Tensor

import minipeft
from minipeft import decoding, generation
from minipeft.decoding import ROWS, InvariantRows, check_places
from minipeft.errors import InputError
from minipeft.generation import GenerateConfig, answer, generate, stream
from minipeft.models import FAMILIES, Decoder
from minipeft.models.checkpoint import load_model
from minipeft.sampling import choose
from tests.test_generation import Letters, tuned

PROMPTS = ["bcdefghij" * 2, "q", "hello", "abcdabcda", "xx", "zyxwvu", "hello", "m" * 13, "pqr", "cab"]
CASES = [(family, "lora" if number % 2 else "prefix") for number, family in enumerate(FAMILIES)]
CASES += [("mistral", "prompt"), ("llama", "none"), ("gpt2", "none")]
CONFIG = GenerateConfig(16, temperature=0.9, top_p=0.9, batch_invariant=True)


class Recorder:
    """Stands for `choose`: keeps the hash of each row of logits under its uniform draw, which no other row has."""

    def __init__(self) -> None:
        self.seen: dict[float, str] = {}

    def __call__(self, logits: Tensor, draw: Tensor, temperature: float, top_p: float) -> Tensor:
        for row, number in zip(logits, draw.tolist()):
            digest = hashlib.sha256(row.numpy().tobytes()).hexdigest()
            if number:  # the probe of the places draws 0
                assert self.seen.setdefault(number, digest) == digest
        return choose(logits, draw, temperature, top_p)


def record(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(decoding, "choose", recorder)
    return recorder


def answer_in_parts(model: Decoder, parts: list[list[int]], config: GenerateConfig) -> dict[int, list[int]]:
    """The new ids of each prompt, answered in several calls."""
    found = (a for part in parts for a in answer(model, Letters(), PROMPTS, config, only=part))
    return {a.index: a.ids for a in found}


PARTS = [[[n] for n in range(10)], [[9, 0], [1, 8, 3], [2, 7, 4, 6, 5]], [list(range(10))], [list(range(9, -1, -1))]]


@pytest.mark.parametrize(("family", "adapter"), CASES)
def test_a_prompt_has_the_same_logits_in_every_batch(
    family: str, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, among 2, 3, 5 and 8 others, in any order: 16 steps of each prompt, and its stream. Windows of 6."""
    model, recorder = tuned(family, adapter), record(monkeypatch)
    made = [answer_in_parts(model, parts, CONFIG) for parts in PARTS]  # the recorder compares
    assert made == [made[0]] * len(PARTS)
    assert len(recorder.seen) >= sum(map(len, made[0].values()))
    (prompt,) = Letters().encode_all(PROMPTS[:1])
    assert "".join(stream(model, Letters(), prompt, CONFIG)) == Letters().decode(made[0][0])


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_without_it_the_bits_differ(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the recorder sees other bits of plain decoding in other batches."""
    model = tuned(family, "none")
    plain = GenerateConfig(16, temperature=0.9, top_p=0.9)
    record(monkeypatch)
    with pytest.raises(AssertionError):
        [answer_in_parts(model, parts, plain) for parts in PARTS]


@pytest.mark.parametrize(("family", "adapter"), CASES)
def test_the_answers_are_those_of_plain_decoding(family: str, adapter: str) -> None:
    model = tuned(family, adapter)
    for temperature in (0.0, 0.9):
        plain = generate(model, Letters(), PROMPTS, GenerateConfig(20, temperature, seed=2))
        assert (
            generate(model, Letters(), PROMPTS, GenerateConfig(20, temperature, seed=2, batch_invariant=True)) == plain
        )


def test_packed_weights_keep_it(real_model: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real model with float16 packs: whether weights are packed does not depend on the number of prompts."""
    model, tokenizer = load_model(real_model, dtype=torch.float32), minipeft.load_tokenizer(real_model)
    prompts, recorder = ["def add(a, b):", "import os", "x ="], record(monkeypatch)
    monkeypatch.setattr(generation, "PACKED_FROM", 4)
    for new in (3, 6):  # plain, packed
        config = GenerateConfig(new, temperature=0.9, batch_invariant=True)
        for only in ([2], [0, 1, 2]):
            list(answer(model, tokenizer, prompts, config, only=only))
        assert len(recorder.seen) >= 3
        recorder.seen.clear()


def test_other_bits_in_another_place_are_refused() -> None:
    """The copies of row 0 are compared in each step; a full batch is probed before."""
    logits = torch.randn(1, 9).expand(ROWS, -1).clone()
    check_places(logits, [5, 6, 7])
    logits[6, 3] += 1e-6
    with pytest.raises(InputError) as error:
        check_places(logits, [5, 6, 7])
    said = "batch_invariant: products on this machine give a row other bits in another place of a batch"
    assert str(error.value) == f"{said}. Give --batch 1 --no-pack instead: each prompt alone"

    class Drifting(torch.nn.Linear):
        """A product whose last bits depend on the row's place."""

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y * (1 + 1e-6 * torch.arange(len(y)).view(-1, *[1] * (y.dim() - 1)))

    model = tuned("llama", "none")
    wrong = Drifting(32, 32, bias=False)
    wrong.weight = model.blocks[1].self_attn.o_proj.weight
    model.blocks[1].self_attn.o_proj = wrong
    with pytest.raises(InputError) as error:
        generate(model, Letters(), ["abcdefgh"] * ROWS, CONFIG)
    assert str(error.value).startswith(said)


def test_rows_that_end_are_left_out() -> None:
    """`keep` drops rows from the choice; the others go on with their bits."""
    model = tuned("llama", "none").eval()
    rows = Letters().encode_all(["abc", "hello", "xyzxyz"])
    with torch.no_grad():
        whole, part = InvariantRows(model, rows, 8), InvariantRows(model, rows, 8)
        draws = torch.zeros(3)
        for step in range(6):
            tokens = whole.choose(draws, 0.0, 1.0)
            if step == 2:
                part.keep([0, 2])
            going = [0, 1, 2] if step < 2 else [0, 2]
            assert part.choose(draws[going], 0.0, 1.0).tolist() == tokens[going].tolist()
            whole.advance(tokens), part.advance(tokens[going])


def test_a_ragged_cache_keeps_rows() -> None:
    """The logits of the rows that stay are those of the whole cache, up to rounding."""
    model = tuned("llama", "prefix").eval()
    with torch.no_grad():
        rows = InvariantRows(model, Letters().encode_all(["abc", "hello", "xyzxyz"]), 4)
        tokens = torch.tensor([5, 6, 7, *[5] * 5])[:, None]
        other = copy.deepcopy(rows.cache)
        want = model(tokens, cache=rows.cache)[[2, 0]]
        other.keep_rows([2, 0])
        torch.testing.assert_close(model(tokens[[2, 0]], cache=other), want)


def test_a_full_row_and_a_bank_are_refused() -> None:
    model = tuned("llama", "none").eval()
    with torch.no_grad():
        rows = InvariantRows(model, [[3, 4]], 1)
        rows.advance(torch.tensor([5]))
        with pytest.raises(
            InputError, match=r"ids: shape \[8, 2\], but a ragged cache takes one token of each of its 8"
        ):
            model(torch.ones(8, 2, dtype=torch.long), cache=rows.cache)
        with pytest.raises(InputError, match="cache: a row of 3 columns is full"):
            rows.advance(torch.tensor([5]))
    minipeft.AdapterBank(model)
    with pytest.raises(InputError) as error:
        answer(model, Letters(), PROMPTS, CONFIG, adapters=[None] * len(PROMPTS))
    said = "batch_invariant: does not hold for a bank: how many rows have an adapter decides the size of its products"
    assert str(error.value) == f"{said}. Load one adapter"
