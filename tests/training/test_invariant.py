"""Batch-invariant training: a document's loss and gradient by sha256 in every packing, and its refusals."""

import hashlib
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from minipeft.adapters import LoRAConfig
from minipeft.data.packing import Batch
from minipeft.errors import InputError
from minipeft.models import Decoder
from minipeft.runs.config import run_config
from minipeft.training.distributed import Group
from minipeft.training.invariant import split_documents
from minipeft.training.loop import TrainConfig, TrainState, evaluate, train, trained
from minipeft.training.processes import Alone, ParallelConfig
from tests.training.test_loop import ADAPTERS, Rows, copies, equal, refused, tuned

LENGTHS = (1, 2, 3, 5, 8, 13, 21, 5)
DRAW = torch.Generator().manual_seed(3)
DOCUMENTS = [torch.randint(0, 31, (n,), generator=DRAW) for n in LENGTHS]


def pack(order: tuple[int, ...], width: int, rows: int) -> list[Batch]:
    """The documents in this order, side by side in rows of `width`, `rows` a batch, padded on the right."""
    lines: list[list[int]] = [[]]
    for number in order:
        if sum(LENGTHS[n] for n in lines[-1]) + LENGTHS[number] > width:
            lines.append([])
        lines[-1].append(number)
    batches = []
    for first in range(0, len(lines), rows):
        part = lines[first : first + rows]
        ids, labels, owners = (torch.full((len(part), width), filling) for filling in (0, -100, -1))
        for row, numbers in enumerate(part):
            column = 0
            for place, number in enumerate(numbers):
                end = column + LENGTHS[number]
                ids[row, column:end] = DOCUMENTS[number]
                labels[row, column + 1 : end] = DOCUMENTS[number][1:]
                owners[row, column:end] = place
                column = end
        batches.append(Batch(ids, labels, owners))
    return batches


class Recorder(Alone):
    """One process that keeps the hash of each document's loss and gradient, and adds them up as Alone does."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def sum_gradients(
        self, parameters: Mapping[str, nn.Parameter], count: int, backward: Callable[[int], float]
    ) -> float:
        for number in range(count):
            for p in parameters.values():
                p.grad = None
            digest = hashlib.sha256(repr(backward(number)).encode())
            for name, p in parameters.items():
                digest.update(name.encode() + (b"" if p.grad is None else p.grad.float().numpy().tobytes()))
            self.seen.append(digest.hexdigest())
        for p in parameters.values():
            p.grad = None
        return super().sum_gradients(parameters, count, backward)


LAYOUTS = [(tuple(range(8)), 64, 1), (tuple(reversed(range(8))), 64, 1), (tuple(range(8)), 21, 1),
           (tuple(range(8)), 21, 4), (tuple(reversed(range(8))), 32, 2), ((3, 0, 5, 7, 1, 6, 2, 4), 40, 2)]  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "full, gpt2": ("full", "gpt2", {}),
    "full, llama": ("full", "llama", {}),
    "lora with dropout, gpt2": ("lora", "gpt2", {}),
    "lora with dropout, gemma2": ("lora", "gemma2", {"sliding_window": 4, "head_dim": 10}),
    "prefix, mistral": ("prefix", "mistral", {"sliding_window": 4}),
    "prompt, llama": ("prompt", "llama", {"num_attention_heads": 4}),
}


def make(name: str) -> Decoder:
    method, family, changes = MODELS[name]
    return tuned(method, family, **changes)


def step_on(model: Decoder, batches: list[Batch], invariant: bool, recorder: Alone | None = None) -> float:
    """One step on all batches; returns its loss."""
    config = TrainConfig(steps=1, learning_rate=1e-2, accumulate=len(batches), batch_invariant=invariant)
    return next(iter(train(model, batches, config, TrainState(model), recorder))).loss


@pytest.mark.parametrize("name", MODELS)
def test_a_document_has_the_same_bits_in_every_packing(name: str) -> None:
    """Alone, beside others, padded, in any row length, batch and micro-batch: 13 packings of each model."""
    alone = {}
    for number in range(1, 8):  # the first has no token to predict
        recorder = Recorder()
        step_on(make(name), pack((number,), LENGTHS[number] + number % 3, 1), True, recorder)
        alone[number] = recorder.seen
    hashes = {digest for seen in alone.values() for digest in seen}
    assert len(hashes) == 7
    steps = []
    for order, width, rows in LAYOUTS:
        model, recorder = make(name), Recorder()
        loss = step_on(model, pack(order, width, rows), True, recorder)
        assert set(recorder.seen) == hashes
        assert len(recorder.seen) == 7
        steps.append((loss, copies(model)))
    assert all(loss == steps[0][0] and equal(moved, steps[0][1]) for loss, moved in steps)


def test_without_it_the_bits_differ() -> None:
    """Negative control: what the test above compares depends on the packing otherwise."""
    losses = {step_on(make("full, llama"), pack(*layout), False) for layout in LAYOUTS}
    assert len(losses) > 1
    assert max(losses) - min(losses) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_the_plain_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without dropout, up to rounding: the same loss and the same step."""
    monkeypatch.setitem(ADAPTERS, "lora", LoRAConfig(2))
    plain, model = make(name), make(name)
    for module in itertools.chain(plain.modules(), model.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    batches = pack(*LAYOUTS[0])
    config = {"steps": 1, "learning_rate": 1e-2, "eps": 1e-3}
    (want,) = train(plain, batches, TrainConfig(**config))
    (step,) = train(model, batches, TrainConfig(**config, batch_invariant=True))
    assert step.targets == want.targets == sum(LENGTHS) - 8
    assert step.tokens == want.tokens
    assert step.loss == pytest.approx(want.loss, rel=1e-5)
    assert step.grad_norm == pytest.approx(want.grad_norm, rel=1e-4)
    for name, p in trained(model).items():
        torch.testing.assert_close(p, trained(plain)[name], rtol=1e-4, atol=2e-5)


def test_equal_documents_draw_unlike_dropout() -> None:
    twice = pack((6, 6), 64, 1)
    recorder = Recorder()
    step_on(make("lora with dropout, gpt2"), twice, True, recorder)
    first, second = recorder.seen
    assert first != second
    documents = split_documents(twice, "here")
    assert [one.name[1] for one in documents] == [0, 1]
    assert documents[0].name[0] == documents[1].name[0]


def test_the_held_out_loss_has_the_same_bits_too() -> None:
    model = make("lora with dropout, gemma2")
    losses = {evaluate(model, pack(*layout), batch_invariant=True) for layout in LAYOUTS}
    assert len(losses) == 1
    plain = {evaluate(model, pack(*layout)) for layout in LAYOUTS}
    assert len(plain) > 1
    assert losses.pop() == pytest.approx(plain.pop(), rel=1e-6)


def test_stopped_and_resumed_it_has_the_same_bits() -> None:
    config = TrainConfig(steps=4, learning_rate=1e-2, accumulate=2, batch_invariant=True)
    whole, model = tuned(), tuned()
    want = list(train(whole, Rows(), config))
    state, steps = TrainState(model), []
    for step in train(model, Rows(), config, state):
        steps.append(step)
        if step.number == 2:
            break
    steps += train(model, Rows(), config, state)
    assert steps == want
    assert equal(copies(model), copies(whole))


def test_what_it_cannot_hold_for_is_refused() -> None:
    pieces = Batch(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 3, 4]]), torch.tensor([[0, 1, 1, 0]]))
    assert refused(lambda: split_documents([pieces], "step 1")) == (
        "step 1: a row holds a document in two pieces, which batch_invariant cannot compute alone"
    )
    virtual = Batch(pieces.ids, pieces.labels, torch.tensor([[-2, 1, 1, 1]]))
    assert refused(lambda: split_documents([virtual], "step 1")) == (
        "step 1: a row holds virtual tokens, which batch_invariant cannot compute alone"
    )
    assert refused(lambda: TrainConfig(batch_invariant=True, optimizer_in_backward=True)) == (
        "optimizer_in_backward: the gradients of the documents must be summed before the update. "
        "Leave out --batch-invariant"
    )
    said = "batch_invariant: has no meaning with --no-isolate, where each document sees those before it in its row"
    assert refused(lambda: run_config(model="demo", data="demo", isolate=False, batch_invariant=True)) == said
    for parallel in (ParallelConfig(reduce="fast"), ParallelConfig(shard=True)):
        config = TrainConfig(steps=1, accumulate=2, batch_invariant=True)
        problem = refused(
            lambda config=config, parallel=parallel: train(tuned(), Rows(), config, None, Group(parallel, 0, 2))
        )
        assert problem == (
            "batch_invariant: takes gradients that are summed in order. Give --reduce exact, without --shard"
        )


def test_no_supervised_token_is_refused() -> None:
    with pytest.raises(InputError, match="no token of this step's batches is supervised"):
        step_on(tuned(), pack((0,), 4, 1), True)
