"""adapter_config.json of LoRA, key by key; test_peft_format.py shows that PEFT reads it."""

import pytest

from minipeft.adapters import LoRAConfig, add_adapter
from minipeft.adapters.lora import choose_ranks, find_lora_layers
from minipeft.adapters.peft_lora import double_rank, lora_config, lora_json, lora_shapes, lora_tensors

CONFIG = LoRAConfig(3, 1.5, dropout=0.25, targets=["up_proj", "q_proj"], layers=(1, 2), rank_pattern={"q_proj": 5},
                    alpha_pattern={"1.mlp.up_proj": 4.0}, rslora=True)  # fmt: skip


def test_a_config_survives_its_json(decoder):
    model = decoder("llama")
    add_adapter(model, CONFIG)
    given = lora_json(CONFIG, model)
    assert given["target_modules"] == ["q_proj", "up_proj"]
    assert (given["r"], given["lora_alpha"], given["alpha_pattern"]) == (3, 1.5, {"1.mlp.up_proj": 4})
    again = lora_config(given)
    assert choose_ranks(decoder("llama"), again) == choose_ranks(decoder("llama"), CONFIG)
    assert (again.dropout, again.rslora, again.layers) == (0.25, True, (1, 2))


def test_the_shapes_asked_for_are_those_written(decoder):
    for config in (CONFIG, LoRAConfig(2, dora=True), LoRAConfig(2, lora_bias=True)):
        model = decoder("llama")
        wanted = lora_shapes(model, config)
        add_adapter(model, config)
        assert {name: tuple(t.shape) for name, t in lora_tensors(model).items()} == wanted


@pytest.mark.parametrize("rslora", [False, True])
def test_double_rank_keeps_every_scale(decoder, rslora):
    config = LoRAConfig(3, 7.0, rslora=rslora, init="pissa", rank_pattern={"q_proj": 5}, alpha_pattern={"q_proj": 2.0})
    scales = []
    for given in (config, double_rank(config)):
        model = decoder("llama")
        add_adapter(model, given)
        scales.append({path: layer.scale for path, layer in find_lora_layers(model).items()})
    assert scales[0] == pytest.approx(scales[1], rel=1e-12)
