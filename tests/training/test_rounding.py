"""bfloat16 weights in full tuning: stochastic rounding is unbiased, and what rounding to nearest loses is kept."""

import copy
import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from minipeft.errors import InputError
from minipeft.training import adamw, loop
from minipeft.training.gradients import wide_gradients
from minipeft.training.loop import TrainConfig, TrainState, train, trained
from minipeft.training.processes import Alone
from minipeft.training.rounding import round_stochastically
from tests.training.test_loop import Rows, copies, equal, refused, tuned

CONFIG = TrainConfig(steps=3, learning_rate=1e-3, accumulate=2)


def rounded(wide: Tensor, seed: int) -> Tensor:
    found = torch.empty_like(wide, dtype=torch.bfloat16)
    round_stochastically(wide, found, torch.Generator().manual_seed(seed))
    return found.float()


def neighbours(wide: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 on each side of each number, the nearer to 0 first: of a float32, NumPy's view of the upper half."""
    bits = wide.numpy().view(np.uint32) & 0xFFFF0000
    return tuple(torch.from_numpy(b.view(np.float32)) for b in (bits, (bits + 0x10000).astype(np.uint32)))  # type: ignore[return-value]


def test_the_mean_of_rounded_numbers_is_the_number() -> None:
    """Each goes to one of its two neighbours, with a frequency that fits the probability: chi^2 over 1,001 numbers."""
    draw = torch.Generator().manual_seed(0)
    wide = torch.randn(7, 143, generator=draw) * 10.0 ** torch.randint(-30, 30, (7, 143), generator=draw)
    low, high = neighbours(wide)
    share = ((wide - low) / (high - low)).double()
    runs = 400
    ups = torch.zeros(wide.shape, dtype=torch.double)
    for seed in range(runs):
        found = rounded(wide, seed)
        assert ((found == low) | (found == high)).all()
        ups += found == high
    z = (ups - runs * share) / (runs * share * (1 - share)).clamp(min=0.5).sqrt()
    n = wide.numel()
    assert z.sum().abs() < 5 * math.sqrt(n), "biased"
    assert z.square().sum() < n + 6 * math.sqrt(2 * n), "not the probabilities"
    nearest = (wide.bfloat16().float() == high).double() * runs  # the control
    assert ((nearest - runs * share) / (runs * share * (1 - share)).clamp(min=0.5).sqrt()).square().sum() > 10 * n


def test_neighbouring_numbers_and_steps_are_rounded_independently() -> None:
    ups = torch.stack([rounded(torch.full((4096,), 1 + 2**-8), seed) > 1 for seed in range(2)]).double() - 0.5
    for first, second in ((ups[0, :-1], ups[0, 1:]), (ups[0, :-4], ups[0, 4:]), (ups[0], ups[1])):
        assert abs((4 * first * second).mean()) < 5 / math.sqrt(4092)


def test_what_bfloat16_holds_stays() -> None:
    """All 65,536 of them, NaN and Inf included."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    found = rounded(every.float(), 3)
    assert torch.equal(found.nan_to_num(7), every.float().nan_to_num(7))
    assert torch.equal(found.isnan(), every.isnan())


def walk(dtype: torch.dtype, steps: int = 40) -> dict[str, Tensor]:
    """How far AdamW moves the numbers of a norm (1) and of a matrix (about 0.02) at a learning rate of 2e-4."""
    draw = torch.Generator().manual_seed(0)
    start = {"norm": torch.ones(4096), "matrix": 0.02 * torch.randn(64, 64, generator=draw)}
    model = nn.ParameterDict({name: t.bfloat16().to(dtype) for name, t in start.items()})
    before = {name: p.detach().float().clone() for name, p in model.items()}
    slope = {name: torch.randn(t.shape, generator=draw) for name, t in start.items()}
    state = TrainState(model)
    for _ in range(steps):
        with wide_gradients(model.values()):
            for name, p in model.items():
                p.grad = slope[name] + torch.randn(p.shape, generator=draw)
            adamw.update_all(dict(model), state, TrainConfig(), dict.fromkeys(start, 2e-4), 0.0)
        state.step += 1
    return {name: p.detach().float() - before[name] for name, p in model.items()}


def test_a_bfloat16_weight_moves_as_far_as_a_float32_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to noise of mean 0, of the same gradients; rounded to nearest, a norm stays at 1."""
    wide, found = walk(torch.float32), walk(torch.bfloat16)
    for name, moved in wide.items():
        noise = (found[name] - moved).flatten()
        assert noise.mean().abs() < 5 * noise.std() / math.sqrt(len(noise)), name
        assert (found[name] * moved).sum() / moved.square().sum() == pytest.approx(1, abs=0.03), name
    monkeypatch.setattr(adamw, "round_stochastically", lambda wide, rounded, _: rounded.copy_(wide))
    assert not walk(torch.bfloat16)["norm"].any()


def test_stopped_and_resumed_it_ends_with_the_same_bits() -> None:
    whole = tuned("full", "llama").to(torch.bfloat16)
    want = [(s.loss, s.grad_norm) for s in train(whole, Rows(), CONFIG)]
    model = tuned("full", "llama").to(torch.bfloat16)
    state, steps = TrainState(model), []
    for step in train(model, Rows(), CONFIG, state):
        steps.append((step.loss, step.grad_norm))
        if step.number == 2:
            break
    again = copy.deepcopy(model)
    steps += [(s.loss, s.grad_norm) for s in train(again, Rows(), CONFIG, copy.deepcopy(state))]
    assert steps == want
    assert equal(copies(again), copies(whole))
    other = tuned("full", "llama").to(torch.bfloat16)
    list(train(other, Rows(), dataclasses.replace(CONFIG, seed=1)))
    assert not equal(copies(other), copies(whole)), "the control: another seed rounds otherwise"


def test_parts_are_updated_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts of some rows of a tensor; without rounding, so that the draws do not matter."""
    monkeypatch.setattr(adamw, "round_stochastically", lambda wide, rounded, _: rounded.copy_(wide))
    models = [tuned("full", "llama").to(torch.bfloat16) for _ in range(2)]
    for model, part in zip(models, (2**20, 100)):
        monkeypatch.setattr(adamw, "PART", part)
        list(train(model, Rows(), CONFIG))
    assert equal(*map(copies, models))


def test_gradients_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum of micro-batches is float32's sum of their bfloat16 gradients; and the model keeps none."""
    model, seen = tuned("full", "llama").to(torch.bfloat16), {}
    plain = adamw.update_rounded

    def keep(name: str, p: Any, *rest: Any) -> None:
        seen[name] = p.grad.clone()
        plain(name, p, *rest)

    monkeypatch.setattr(adamw, "update_rounded", keep)
    other = copy.deepcopy(model)
    next(train(model, Rows(), dataclasses.replace(CONFIG, accumulate=3, clip=1e9)))
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in trained(other).items()}
    batches = [Rows()[i] for i in range(3)]
    targets = sum(loop.count_targets(batch.labels) for batch in batches)
    other.train()
    for number, batch in enumerate(batches):
        other.zero_grad()
        loop.backward(other, batch, targets, loop.derive_seed(0, 0, number))
        for name, p in trained(other).items():
            assert p.grad.dtype == torch.bfloat16
            sums[name] += p.grad.float()
    assert all(torch.equal(seen[name], sums[name]) for name in sums if name != "model.embed_tokens.weight")
    assert all(p.grad is None and p.grad_dtype == p.dtype for p in model.parameters())


def test_what_cannot_be_trained_is_refused() -> None:
    half = tuned("full").to(torch.float16)
    said = refused(lambda: train(half, Rows(), CONFIG))
    assert said.endswith("is torch.float16, but trained tensors must be float32 or bfloat16. Load the model with "
                         "dtype=torch.float32")  # fmt: skip

    class Sharded(Alone):
        shards = True

    with pytest.raises(InputError, match="is bfloat16, but weights that are sharded and trained must be float32"):
        train(half.to(torch.bfloat16), Rows(), CONFIG, processes=Sharded())
