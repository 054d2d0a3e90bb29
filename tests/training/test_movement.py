"""The dead-adapter check: its measurements, and its warnings."""

import json

import pytest
import torch

from minipeft.adapters import AdapterConfig, FullConfig, LoRAConfig, PrefixConfig, PromptConfig, add_adapter
from minipeft.data.packing import Batch
from minipeft.errors import InputError
from minipeft.models import Decoder
from minipeft.models.llama import Llama, LlamaConfig
from minipeft.training.loop import TrainConfig, train
from minipeft.training.movement import Movement, MovementReport


class Rows:
    """Batch i: two rows of random ids, from i alone."""

    def __getitem__(self, i: int) -> Batch:
        ids = torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(i))
        return Batch(ids, ids, torch.zeros_like(ids))


class Letters:
    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 31 for letter in text]


def tiny() -> Decoder:
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = Llama(config)
    model.initialize(torch.Generator().manual_seed(0))
    return model.eval()


def run(adapter: AdapterConfig, rate: float, steps: int) -> tuple[Decoder, MovementReport, dict[str, torch.Tensor]]:
    """Train and report; also the init, copied by the test itself."""
    model = tiny()
    add_adapter(model, adapter, Letters())
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    movement, config = Movement.start(model), TrainConfig(steps=steps, learning_rate=rate)
    for _ in train(model, Rows(), config):
        pass
    return model, movement.measure(model, config, base=None if movement.tensors else start), start


@pytest.mark.parametrize("adapter", [LoRAConfig(rank=2), PrefixConfig(length=3), PromptConfig(length=3), FullConfig()])
def test_measures_what_moved(adapter: AdapterConfig) -> None:
    model, report, start = run(adapter, 1e-2, 5)
    parameters = dict(model.named_parameters())
    assert {t.name for t in report.tensors} == set(start)
    for t in report.tensors:
        change = (parameters[t.name].detach() - start[t.name]).abs()
        assert t.mean == pytest.approx(change.mean().item(), rel=1e-6)
        assert t.largest == change.max().item() > 0
        assert t.start_std == pytest.approx(start[t.name].double().std(correction=0).item(), rel=1e-5)
    together = torch.cat([(parameters[n].detach() - start[n]).abs().flatten() for n in start])
    assert report.mean == pytest.approx(together.mean().item(), rel=1e-5)
    assert report.largest == together.max().item()


def test_budget_is_the_sum_of_the_rates() -> None:
    _, report, _ = run(PrefixConfig(length=3), 1e-2, 12)
    # a climb of one step (6 % of 12, rounded), then 11 rates that fall by an eleventh each, 12 - 1 = 11 to 1
    assert report.budget == pytest.approx(1e-2 * (1 + sum(range(1, 12)) / 11))
    assert report.largest <= 1.5 * report.budget  # Adam's steps may pass the rate a little when gradients grow


@pytest.mark.parametrize(
    ("adapter", "rate", "dead"),
    [
        (PrefixConfig(length=3, init="peft"), 2e-4, True),
        (PrefixConfig(length=3, init="peft"), 1e-1, False),
        (PrefixConfig(length=3, init="text"), 5e-3, False),
        (PrefixConfig(length=3, init="normal"), 2e-4, False),  # its values start at 0
        (PromptConfig(length=3, init="normal"), 2e-4, True),
        (LoRAConfig(rank=2), 2e-4, False),  # B starts at 0
        (FullConfig(), 1e-9, False),
    ],
)
def test_speaks_of_a_start_that_cannot_be_left(adapter: AdapterConfig, rate: float, dead: bool) -> None:
    _, report, _ = run(adapter, rate, 10)
    said = [w for w in report.warnings if w.startswith("dead adapter")]
    assert len(said) == dead
    if dead:
        assert f"add up to {report.budget:.3g}" in said[0]
        assert said[0] in str(report)


def test_speaks_of_few_steps_and_of_tensors_that_stand_still() -> None:
    model = tiny()
    add_adapter(model, PrefixConfig(length=3), Letters())
    movement = Movement.start(model)
    few = movement.measure(model, TrainConfig(steps=199))
    assert any("199 optimizer steps are few" in w for w in few.warnings)
    assert any("4 of 4 trained tensors did not move" in w for w in few.warnings)
    many = movement.measure(model, TrainConfig(steps=200))
    assert not any("few" in w for w in many.warnings)


def test_keeps_no_copy_of_a_model_trained_whole() -> None:
    model = tiny()
    add_adapter(model, FullConfig())
    movement = Movement.start(model)
    assert movement.tensors is None
    with pytest.raises(InputError, match="base: no copy of the init was kept"):
        movement.measure(model, TrainConfig(steps=1))
    with pytest.raises(InputError, match="the init holds nothing for it"):
        movement.measure(model, TrainConfig(steps=1), base={})
    assert movement.measure(model, TrainConfig(steps=1), base=model.state_dict()).largest == 0


def test_refuses_a_model_that_trains_nothing() -> None:
    with pytest.raises(InputError, match="nothing is trainable"):
        Movement.start(tiny().requires_grad_(False))


def test_json_is_json() -> None:
    _, report, _ = run(PrefixConfig(length=3, init="peft"), 2e-4, 3)
    kept = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert kept["warnings"] == list(report.warnings)
    assert kept["largest"] == report.largest
    assert kept["budget"] == report.budget
