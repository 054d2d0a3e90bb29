"""The optimizer in backward: the bits of the plain loop, one gradient at a time, and its refusals."""

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from minipeft.errors import InputError
from minipeft.models import FAMILIES
from minipeft.runs.planning import Memory
from minipeft.training import loop
from minipeft.training.loop import TrainConfig, TrainState, train, trained
from minipeft.training.processes import Alone
from tests.ranks import train as train_run
from tests.training.test_loop import Rows, copies, equal, refused, tuned

PLAIN = TrainConfig(steps=4, learning_rate=1e-2, weight_decay=0.1, clip=0.05)
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "full": ("full", "gpt2", {}),
    "full, recomputed": ("full", "llama", {"activation_checkpointing": True, "steps": 3}),
    "full, not clipped": ("full", "llama", {"clip": 0}),
    "lora+, dropout": ("lora", "gpt2", {"lr_multipliers": {"lora_B": 4.0}}),
    "lora, dropout, not clipped": ("lora", "llama", {"clip": 0}),
}


def fused(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(config, optimizer_in_backward=True)


@pytest.mark.parametrize("name", CASES)
def test_it_has_the_bits_of_the_plain_loop(name: str) -> None:
    """Losses, norms and weights, also stopped and resumed; with a clipping that is active in every step."""
    method, family, changes = CASES[name]
    config = dataclasses.replace(PLAIN, **changes)
    plain, model = tuned(method, family), tuned(method, family)
    want = list(train(plain, Rows(), config))
    assert all(step.grad_norm > config.clip for step in want)
    state, steps = TrainState(model), []
    for step in train(model, Rows(), fused(config), state):
        steps.append(step)
        assert all(p.grad is None for p in model.parameters())
        if step.number == 2:
            break
    state = copy.deepcopy(state)
    steps += train(model, Rows(), fused(config), state)
    assert steps == want
    assert equal(copies(model), copies(plain))


def test_bfloat16_weights_too() -> None:
    config = dataclasses.replace(PLAIN, steps=2, clip=0)
    plain, model = (tuned("full", "llama").to(torch.bfloat16) for _ in range(2))
    assert list(train(model, Rows(), fused(config))) == list(train(plain, Rows(), config))
    assert equal(copies(model), copies(plain))


def test_clipping_takes_a_second_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, plain = [], loop.backward
    monkeypatch.setattr(loop, "backward", lambda *given: calls.append(1) or plain(*given))
    for clip, passes in ((0.0, 1), (1.0, 2)):
        config = fused(dataclasses.replace(PLAIN, steps=3, clip=clip))
        list(train(tuned(), Rows(), config))
        assert len(calls) == 3 * passes == 3 * config.passes
        calls.clear()
    assert PLAIN.passes == 1


def test_a_clip_of_0_is_a_clip_without_end() -> None:
    a, b = tuned(), tuned()
    steps = [list(train(m, Rows(), dataclasses.replace(PLAIN, clip=clip))) for m, clip in ((a, 0), (b, 1e30))]
    assert steps[0] == steps[1]
    assert equal(copies(a), copies(b))


def test_few_gradients_are_held_at_a_time() -> None:
    """The most bytes that a step's operators allocate at once: no longer the gradients of all blocks."""
    shape = {"vocab_size": 31, "num_hidden_layers": 6, "hidden_size": 64, "intermediate_size": 128,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    peaks = []
    for config in (PLAIN, fused(PLAIN)):
        model = FAMILIES["llama"].decoder(FAMILIES["llama"].config(**shape))
        model.initialize(torch.Generator().manual_seed(0))
        state = TrainState(model)
        memory = Memory(model)
        memory.known |= {t.untyped_storage()._cdata for t in (*state.exp_avg.values(), *state.exp_avg_sq.values())}
        with memory:
            next(train(model, Rows(1), config, state))
        peaks.append(memory.most)
    gradients = sum(p.nbytes for p in model.parameters())
    assert peaks[0] > gradients
    assert peaks[1] < 0.6 * gradients


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_what_is_not_finite_is_refused_before_it_changes_its_tensor(clip: float) -> None:
    """With clipping nothing has changed; without, tensors that come first in backward have, and the state says so."""
    name = "transformer.h.0.attn.c_attn.weight"
    model, config = tuned("full"), fused(dataclasses.replace(PLAIN, clip=clip))
    model.get_parameter(name).register_hook(lambda grad: grad * math.nan)
    state, before = TrainState(model), copies(model)
    said = refused(lambda: list(train(model, Rows(), config, state)))
    assert said == f"step 1: the gradient of {name!r} is not finite. Lower the learning rate"
    moved = {n for n, p in trained(model).items() if not torch.equal(p, before[n])}
    if clip:
        assert not moved
        train(model, Rows(), PLAIN, state)
    else:
        assert "transformer.ln_f.weight" in moved
        assert name not in moved
        said = refused(lambda: train(model, Rows(), PLAIN, state))
        assert said == "state: step 1 was interrupted while it changed weights and moments. Go on from a checkpoint"


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_a_tensor_that_no_gradient_reaches_is_named(clip: float) -> None:
    model = tuned()
    model.register_parameter("stray", torch.nn.Parameter(torch.zeros(2)))
    config = fused(dataclasses.replace(PLAIN, clip=clip))
    assert "step 1: no gradient reached 'stray'" in refused(lambda: list(train(model, Rows(), config)))


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(InputError) as error:
        TrainConfig(accumulate=4, optimizer_in_backward=True)
    assert str(error.value) == (
        "optimizer_in_backward: the gradients of 4 micro-batches must be summed before the update. Give --accumulate 1 "
        "and a larger --batch"
    )

    class Two(Alone):
        size = 2

    said = refused(lambda: train(tuned(), Rows(), fused(PLAIN), processes=Two()))
    assert said == "optimizer_in_backward: takes one process, which holds whole weights"


def test_a_whole_run_has_the_same_files(place: Path, tmp_path: Path) -> None:
    """But for run.json and what quotes its settings."""
    changes = {"method": "full", "accumulate": 1, "steps": 3}
    for name, more in (("plain", {}), ("fused", {"optimizer_in_backward": True})):
        train_run(place, tmp_path / name, **changes, **more)  # type: ignore[arg-type]
    for file in ("log.jsonl", "model/model.safetensors", "checkpoints/step-000003/state.safetensors"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "fused" / file).read_bytes(), file
