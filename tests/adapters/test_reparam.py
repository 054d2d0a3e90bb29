"""The reparameterization MLP: init, exact folding into the table, and why it trains faster."""

import peft
import pytest
import torch
from peft.tuners.prefix_tuning import PrefixEncoder

from minipeft.adapters import PrefixConfig, PromptConfig, add_adapter, remove_adapter
from minipeft.adapters.peft_virtual import collect_table
from minipeft.adapters.prefix import list_prefixes
from minipeft.training.loop import TrainConfig, train

TEXT = "abracadabra"


class Letters:
    """A tokenizer for the tiny models: a letter is a token."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 61 for letter in text]


def test_the_network_starts_at_the_text_and_is_folded_exactly(model, stir):
    add_adapter(model, PrefixConfig(5, text=TEXT), Letters())
    text = collect_table(model)
    remove_adapter(model)
    add_adapter(model, PrefixConfig(5, text=TEXT, reparam=7), Letters())
    assert torch.equal(collect_table(model), text)
    stir(model)
    trunks = {id(p.mlp.trunk) for p in list_prefixes(model)}
    assert len(trunks) == 1
    trunk = list_prefixes(model)[0].mlp.trunk
    h = torch.tanh(trunk.seeds.double() @ trunk.weight.double().T + trunk.bias.double())  # [P, width]
    for prefix in list_prefixes(model):
        added = h @ prefix.mlp.weight.double().T + prefix.mlp.bias.double()  # [P, 2 * K * D]
        heads, columns, width = prefix.key.shape
        for p in range(columns):
            k, v = added[p].view(2, heads, width)
            assert torch.allclose(prefix.key_value()[0][:, p].double(), prefix.key[:, p] + k, atol=1e-5)
            assert torch.allclose(prefix.key_value()[1][:, p].double(), prefix.value[:, p] + v, atol=1e-5)


def test_of_a_prompt_too(model, stir):
    add_adapter(model, PromptConfig(5, text=TEXT, reparam=7), Letters())
    stir(model)
    mlp = model.prompt.mlp
    trunk = mlp.trunk
    h = torch.tanh(trunk.seeds.double() @ trunk.weight.double().T + trunk.bias.double())
    wanted = model.prompt.weight.double() + h @ mlp.weight.double().T + mlp.bias.double()
    assert torch.allclose(model.prompt.vectors().double(), wanted, atol=1e-5)
    assert not model.prompt.weight.requires_grad


def test_pefts_start_with_a_network_is_pefts_projection(decoder):
    """Where heads are not grouped (PEFT's seeds are as wide as the keys, ours as the model)."""
    model, width = decoder("gpt2"), 700
    add_adapter(model, PrefixConfig(5, init="peft", reparam=width))
    c = model.config
    config = peft.PrefixTuningConfig(
        num_virtual_tokens=5,
        token_dim=c.width,
        num_layers=c.layers,
        encoder_hidden_size=width,
        prefix_projection=True,
        num_attention_heads=c.heads,
        task_type="CAUSAL_LM",
    )
    theirs = PrefixEncoder(config)
    trunk, ups = list_prefixes(model)[0].mlp.trunk, [p.mlp for p in list_prefixes(model)]
    ours = [trunk.seeds, trunk.weight, trunk.bias, torch.cat([u.weight for u in ups]), torch.cat([u.bias for u in ups])]
    for parameter, tensor in zip(theirs.parameters(), ours):
        assert parameter.std().item() == pytest.approx(tensor.std().item(), rel=0.15)  # drawn alike
        parameter.data.copy_(tensor.detach())
    assert torch.allclose(theirs(torch.arange(5)), collect_table(model), atol=1e-6)
    assert collect_table(model).std() > 0.1  # no column starts at zero here


def test_the_network_moves_the_columns_further_than_its_rate(decoder, packed):
    """At the same learning rate and number of steps, the virtual tokens move several times as far."""
    moved = {}
    for reparam in (None, 64):
        model = decoder("llama")
        add_adapter(model, PrefixConfig(5, text=TEXT, reparam=reparam), Letters())
        before = collect_table(model)
        for _ in train(model, [packed] * 10, TrainConfig(steps=10, learning_rate=1e-3)):
            pass
        moved[reparam] = (collect_table(model) - before).abs().max().item()
    assert moved[64] > 3 * moved[None]
