"""The loop: exact resume, gradient accumulation, schedules, and its errors."""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minipeft.adapters import FullConfig, LoRAConfig, PrefixConfig, PromptConfig, add_adapter
from minipeft.data.packing import Batch
from minipeft.errors import InputError
from minipeft.models import FAMILIES, Decoder
from minipeft.training import adamw, loop
from minipeft.training.loop import TrainConfig, TrainState, evaluate, learning_rate_at, train, trained
from tests.small import GPT2, LLAMA

CONFIG = TrainConfig(steps=6, learning_rate=1e-2, accumulate=2)


class Rows:
    """Batch i: rows of random ids with padding and two documents, of unlike numbers of targets, from i alone."""

    def __init__(self, rows: int = 2):
        self.rows = rows

    def __getitem__(self, i: int) -> Batch:
        draw = torch.Generator().manual_seed(i)
        ids = torch.randint(0, 31, (self.rows, 12), generator=draw)
        labels = ids.masked_fill(torch.rand(ids.shape, generator=draw) < 0.4, -100)
        documents = torch.tensor([0] * 5 + [1] * 5 + [-1] * 2).repeat(self.rows, 1)
        labels[documents < 0] = -100
        return Batch(ids, labels, documents)


class Letters:
    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 31 for letter in text]


ADAPTERS = {"full": FullConfig(), "lora": LoRAConfig(2, dropout=0.3), "prefix": PrefixConfig(3, reparam=8),
            "prompt": PromptConfig(3)}  # fmt: skip


def tuned(method: str = "lora", family: str = "gpt2", **changes: object) -> Decoder:
    config, decoder = FAMILIES[family].config, FAMILIES[family].decoder
    model = decoder(config(**{**(GPT2 if family == "gpt2" else LLAMA), "vocab_size": 31, **changes}))
    model.initialize(torch.Generator().manual_seed(0))
    add_adapter(model.eval(), ADAPTERS[method], Letters())
    return model


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trained(model).items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("activation_checkpointing", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ADAPTERS)
def test_stopped_anywhere_it_goes_on_with_the_same_bits(
    method: str, family: str, activation_checkpointing: bool
) -> None:
    config = dataclasses.replace(CONFIG, activation_checkpointing=activation_checkpointing)
    whole = tuned(method, family)
    want = [(s.loss, s.grad_norm) for s in train(whole, Rows(), config)]
    for stop in (1, 5):
        model = tuned(method, family)
        state, steps = TrainState(model), []
        for step in train(model, Rows(), config, state):
            steps.append((step.loss, step.grad_norm))
            torch.rand(7), model.eval()  # what the caller does in between changes nothing
            if step.number == stop:
                break
        kept, other = copies(model), copy.deepcopy(state)
        again = tuned(method, family)
        with torch.no_grad():
            for name, p in trained(again).items():
                p.copy_(kept[name])
        steps += [(s.loss, s.grad_norm) for s in train(again, Rows(), config, other)]
        assert steps == want
        assert equal(copies(again), copies(whole))


def test_the_controls_differ() -> None:
    """Negative control: the test above fails for lost moments, a lost step count or another seed."""
    whole, want = tuned(), None
    list(train(whole, Rows(), CONFIG))
    want = copies(whole)
    for fault in ("exp_avg", "exp_avg_sq", "step", "seed"):
        model = tuned()
        state = TrainState(model)
        steps = train(model, Rows(), CONFIG, state)
        for _ in range(3):
            next(steps)
        config = CONFIG
        if fault == "step":
            state.step = 2
        elif fault == "seed":
            config = dataclasses.replace(CONFIG, seed=1)
        else:
            for moment in getattr(state, fault).values():
                moment.zero_()
        list(train(model, Rows(), config, state))
        assert not equal(copies(model), want), fault


def test_interrupted_within_a_step_it_goes_on_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """KeyboardInterrupt in the second micro-batch: the partial gradient is dropped."""
    whole = tuned()
    list(train(whole, Rows(), CONFIG))
    model = tuned()
    state, plain, calls = TrainState(model), loop.backward, []

    def interrupted(*given: Any) -> float:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return plain(*given)

    monkeypatch.setattr(loop, "backward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(train(model, Rows(), CONFIG, state))
    assert state.step == 2
    list(train(model, Rows(), CONFIG, state))
    assert equal(copies(model), copies(whole))


@pytest.mark.parametrize("method", ADAPTERS)
def test_k_batches_are_one_batch_of_k(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with unlike numbers of targets: the loss is divided once, by all of them."""
    monkeypatch.setitem(ADAPTERS, "lora", LoRAConfig(2))
    silent = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

    class Together:
        def __getitem__(self, i: int) -> Batch:
            parts = [Rows()[3 * i + k] for k in range(3)]
            return Batch(*(torch.cat([getattr(p, n) for p in parts]) for n in ("ids", "labels", "documents")))

    config = TrainConfig(steps=1, learning_rate=1e-2, accumulate=3)
    apart, at_once = tuned(method, **silent), tuned(method, **silent)
    (a,) = train(apart, Rows(), config)
    (b,) = train(at_once, Together(), dataclasses.replace(config, accumulate=1))
    assert (a.tokens, a.targets) == (b.tokens, b.targets)
    assert a.loss == pytest.approx(b.loss, rel=1e-6)
    assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)
    for name, p in trained(apart).items():
        assert torch.allclose(p.grad, trained(at_once)[name].grad, rtol=1e-4, atol=1e-6)


def test_the_callers_random_stream_is_left_alone() -> None:
    steps = train(tuned(), Rows(), CONFIG)
    torch.manual_seed(5)
    want = torch.rand(4)
    torch.manual_seed(5)
    first = torch.rand(2)
    next(steps)
    assert torch.equal(torch.cat([first, torch.rand(2)]), want)


def test_checkpointing_gives_the_same_bits() -> None:
    plain, recomputed = tuned(), tuned()
    a = [s.loss for s in train(plain, Rows(), CONFIG)]
    b = [s.loss for s in train(recomputed, Rows(), dataclasses.replace(CONFIG, activation_checkpointing=True))]
    assert a == b
    assert equal(copies(plain), copies(recomputed))


def test_an_evaluation_does_not_end_dropout() -> None:
    """The caller's model.eval() counts until the next step only."""
    model = tuned()
    modes = []
    for _ in train(model, Rows(), CONFIG):
        modes.append(model.training)
        model.eval()
    assert modes == [True] * 6


def test_under_autocast_each_step_sees_the_new_weights() -> None:
    """torch.autocast keeps its bfloat16 copies of the weights to the end of its block, which may hold all steps."""
    losses = []
    for cached in (False, True):
        model = tuned("full", "llama")
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cached):
            losses.append([step.loss for step in train(model, Rows(), dataclasses.replace(CONFIG, steps=4))])
    assert losses[0] == losses[1]


def test_rates() -> None:
    config = TrainConfig(steps=10, learning_rate=1.0, warmup=0.2)
    assert [learning_rate_at(n, config) for n in range(10)] == pytest.approx(
        [0.5, 1.0, *(n / 8 for n in range(8, 0, -1))]
    )
    cosine = dataclasses.replace(config, decay="cosine")
    assert learning_rate_at(6, cosine) == pytest.approx((1 - math.cos(math.pi / 2)) / 2)
    assert learning_rate_at(9, dataclasses.replace(config, decay="constant")) == 1


def refused(action: Callable[[], object]) -> str:
    with pytest.raises(InputError) as error:
        action()
    return str(error.value)


def test_arguments_are_checked_at_the_call() -> None:
    """At the call, not at the first `next`, where a generator would check them."""
    model = tuned()
    assert "nothing is trainable" in refused(lambda: train(copy.deepcopy(model).requires_grad_(False), Rows(), CONFIG))
    other = TrainState(tuned("prompt"))
    assert "the moments of other tensors" in refused(lambda: train(model, Rows(), CONFIG, other))
    half = tuned("full").to(torch.float16)
    assert "is torch.float16, but trained tensors must be float32" in refused(lambda: train(half, Rows(), CONFIG))
    assert isinstance(train(model, Rows(), CONFIG), Iterator)
    said = refused(lambda: train(model, Rows(), TrainConfig()))
    assert said == "steps: must be set to train: it is None. TrainConfig(steps=...)"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", 1.5),
        ("steps", True),
        ("accumulate", 0),
        ("learning_rate", 0.0),
        ("clip", -0.1),
        ("learning_rate", math.nan),
        ("eps", math.inf),
        ("warmup", 1.0),
        ("beta1", -0.1),
        ("beta2", 1.0),
        ("decay", "up"),
        ("weight_decay", 1.0),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_settings_are_checked(name: str, value: Any) -> None:
    assert refused(lambda: TrainConfig(**{"steps": 1, name: value})).startswith(f"{name}: ")


def test_data_without_a_target_are_refused() -> None:
    class Silent(Rows):
        def __getitem__(self, i: int) -> Batch:
            batch = super().__getitem__(i)
            return dataclasses.replace(batch, labels=torch.full_like(batch.labels, -100))

    said = refused(lambda: list(train(tuned(), Silent(), CONFIG)))
    assert said == "step 1: no token of this step's batches is supervised"


def test_a_tensor_that_no_gradient_reaches_is_named() -> None:
    model = tuned()
    model.register_parameter("stray", nn.Parameter(torch.zeros(2)))
    assert "step 1: no gradient reached 'stray'" in refused(lambda: list(train(model, Rows(), CONFIG)))


def test_a_tensor_whose_gradient_stays_zero_is_named() -> None:
    """LoRA's A has none while B is zero, for a step; a tensor that never gets one is a mistake."""
    model = tuned()
    dead = "transformer.h.1.mlp.c_fc.lora_A"
    model.get_parameter(dead).register_hook(torch.zeros_like)
    said = refused(lambda: list(train(model, Rows(), CONFIG)))
    assert said == f"step 3: the gradient of {dead!r} was zero in three steps: it is not being trained"


@pytest.mark.parametrize("where", ["", "exp_avg", "exp_avg_sq"])
def test_what_is_not_finite_ends_the_run_in_its_step(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tuned()
    state, plain, name = TrainState(model), adamw.update, "transformer.h.0.attn.c_attn.lora_B"

    def poisoned(parameters: Any, state: Any, *rest: Any) -> None:
        plain(parameters, state, *rest)
        if state.step == 2:
            with torch.no_grad():
                (getattr(state, where) if where else parameters)[name].view(-1)[1] = math.inf

    monkeypatch.setattr(adamw, "update", poisoned)
    said = refused(lambda: list(train(model, Rows(), CONFIG, state)))
    assert said.startswith(f"step 3: {where + ' of ' if where else ''}{name!r} holds NaN or Inf")


def test_evaluation_is_the_mean_over_targets_and_changes_nothing() -> None:
    model = tuned().train()
    before = copies(model)
    batches = [Rows()[n] for n in range(3)]
    want = sum(
        nn.functional.cross_entropy(
            model.eval()(b.ids, b.documents)[:, :-1].flatten(0, 1),
            b.labels[:, 1:].flatten(),
            ignore_index=-100,
            reduction="sum",
        ).item()
        for b in batches
    ) / sum(loop.count_targets(b.labels) for b in batches)
    model.train()
    assert evaluate(model, batches) == pytest.approx(want, rel=1e-5)
    assert model.training
    assert equal(copies(model), before)
    silent = dataclasses.replace(batches[0], labels=torch.full_like(batches[0].labels, -100))
    assert "no token is supervised" in refused(lambda: evaluate(model, [silent]))


@pytest.mark.parametrize("mode", [True, False])
def test_the_mode_is_put_back_when_training_or_evaluation_raises(mode: bool) -> None:
    class Broken(Rows):
        def __getitem__(self, i: int) -> Batch:
            if i >= 2:
                raise OSError("gone")
            return super().__getitem__(i)

    model = tuned().train(mode)
    model.activation_checkpointing = mode
    with pytest.raises(OSError, match="gone"):
        list(train(model, Broken(), dataclasses.replace(CONFIG, activation_checkpointing=not mode)))
    assert (model.training, model.activation_checkpointing) == (mode, mode)
    short = dataclasses.replace(Rows()[0], documents=torch.zeros(1, 1, dtype=torch.long))
    assert "documents: shape" in refused(lambda: evaluate(model, [short]))
    assert model.training == mode


def test_a_multiplier_is_of_the_first_key_that_a_name_ends_in() -> None:
    """LoRA+: B learns 16 times as fast. A key is a whole name, or its end from a dot on."""
    model = tuned()
    parameters = trained(model)
    whole = next(name for name in parameters if name.endswith("lora_A"))
    groups = loop.group_by_multiplier(
        parameters, TrainConfig(steps=1, lr_multipliers={"lora_B": 16, whole: 2, "lora_A": 3})
    )
    assert {name: by for by, names in groups.items() for name in names} == {
        name: 16 if name.endswith("lora_B") else 2 if name == whole else 3 for name in parameters
    }
    assert loop.group_by_multiplier(parameters, TrainConfig(steps=1, lr_multipliers={"lora_B": 16}))[1.0]
    for key in ("ora_B", "lora", "c_attn", ""):  # not from a dot on, not the end, a module
        said = refused(lambda key=key: train(model, Rows(), TrainConfig(steps=1, lr_multipliers={"lora_B": 2, key: 2})))
        assert said == f"lr_multipliers: no trained tensor is named {key!r}; there are ['lora_A', 'lora_B']"


def test_a_multiplier_multiplies_the_update() -> None:
    """AdamW's first step has the size of the learning rate, whatever the gradient (eps and weight decay aside)."""
    moved = {}
    for by in (1.0, 16.0):
        model = tuned()
        before = copies(model)
        config = TrainConfig(steps=1, learning_rate=1e-4, weight_decay=0.0, warmup=0.0, lr_multipliers={"lora_B": by})
        list(train(model, Rows(), config))
        moved[by] = {name: (p - before[name]).abs().max().item() for name, p in copies(model).items()}
    for name, distance in moved[1.0].items():
        if name.endswith("lora_B"):
            assert moved[16.0][name] == pytest.approx(16 * distance, rel=1e-3)
        else:
            assert moved[16.0][name] == distance
