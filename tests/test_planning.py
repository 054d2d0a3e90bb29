"""Estimates: FLOPs against torch's own counter on the same model, and durations in words."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minipeft.models import GPT2, GPT2Config, Llama, LlamaConfig
from minipeft.planning import forward_flops, in_words, linear_weights, probe_flops, train_flops

DECODERS = {
    "gpt2": GPT2(GPT2Config(vocab_size=50, n_positions=64, n_embd=32, n_layer=3, n_head=4)),
    "llama": Llama(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                               num_attention_heads=4, num_key_value_heads=2)),
}  # fmt: skip


def counted(model, tokens, learns):
    """The FLOPs of torch's matrix products, forward and (where the model learns) backward; attention not included."""
    ids = torch.zeros(1, tokens, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        y = model(ids)
        if learns:
            y.sum().backward()
    products = counter.get_flop_counts()["Global"]
    return sum(flops for op, flops in products.items() if "attention" not in str(op))


@pytest.mark.parametrize("name", DECODERS)
def test_forward_flops_are_those_that_torch_counts(name):
    model = DECODERS[name].eval().requires_grad_(False)
    assert forward_flops(model.config, 16, document=0) == counted(model, 16, learns=False)


@pytest.mark.parametrize("name", DECODERS)
def test_full_training_is_three_forwards(name):
    model = DECODERS[name].eval().requires_grad_(True)
    whole = counted(model, 16, learns=True)
    assert train_flops(model.config, 16, 0, full=True) == pytest.approx(whole, rel=0.02)
    frozen = train_flops(model.config, 16, 0, full=False)
    assert (frozen, train_flops(model.config, 16, 0, full=False, checkpointing=True)) == (whole * 2 / 3, whole)


def test_the_head_is_counted_once_though_it_is_tied():
    config = GPT2Config()
    blocks = 12 * (768 * 2304 + 768 * 768 + 2 * 768 * 3072)
    assert linear_weights(config) == blocks + 50257 * 768


def test_attention_costs_its_document():
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, head_dim=8, hidden_size=32, intermediate_size=48)
    assert forward_flops(config, 10, 100) - forward_flops(config, 10, 0) == 10 * 4 * 100 * 4 * 8 * 2


def test_the_probe_finds_a_speed():
    assert probe_flops(torch.float32, torch.device("cpu")) > 1e8


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (3000, "50 min"), (5400, "1.5 h"), (90_000, "25.0 h")],
)
def test_durations_in_words(seconds, said):
    assert in_words(seconds) == said
