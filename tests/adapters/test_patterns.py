"""Patterns: catastrophic backtracking is stopped, and the first match of a path gives its value."""

import time

import pytest

from minipeft.adapters import LoRAConfig, add_adapter
from minipeft.adapters import patterns as patterns_module
from minipeft.adapters.lora import find_lora_layers
from minipeft.errors import InputError


@pytest.mark.parametrize("field", ["targets", "rank_pattern"])
def test_a_pattern_that_would_take_years_is_stopped(decoder, field, monkeypatch):
    monkeypatch.setattr(patterns_module, "DEADLINE", 0.5)
    evil = r"(([a-z]|\d|_|\.)+)+!"
    given = {"targets": evil} if field == "targets" else {"rank_pattern": {evil: 2}}
    start = time.monotonic()
    with pytest.raises(InputError, match=rf"{field}: .* took longer than 0\.5 s to match"):
        add_adapter(decoder("llama"), LoRAConfig(**given))
    assert time.monotonic() - start < 5


def test_patterns_give_each_target_its_rank_and_alpha_and_the_first_match_counts(decoder):
    model = decoder("llama")
    patterns = {"0.self_attn.q_proj": 3, "q_proj": 5, r"^model\.layers\.[12]\.mlp.*": 7}
    add_adapter(model, LoRAConfig(rank=2, alpha=4, rank_pattern=patterns, alpha_pattern={"mlp.up_proj": 32}))
    layers = find_lora_layers(model)
    at = lambda path: (layers[f"model.layers.{path}"].lora_A.shape[0], layers[f"model.layers.{path}"].scale)
    assert at("0.self_attn.q_proj") == (3, 4 / 3)
    assert at("1.self_attn.q_proj") == (5, 4 / 5)
    assert at("0.mlp.up_proj") == (2, 32 / 2)
    assert at("2.mlp.up_proj") == (7, 32 / 7)
    assert at("2.mlp.down_proj") == (7, 4 / 7)
    assert at("2.self_attn.k_proj") == (2, 2.0)


def test_thousands_of_patterns_are_matched_in_one_process(decoder):
    """2,000 of them took a process each: 20 s and more."""
    model = decoder("llama")
    patterns = {f"(0|1|{n}).self_attn.q_proj": n + 2 for n in range(2_000)}
    start = time.process_time()
    add_adapter(model, LoRAConfig(rank=2, rank_pattern=patterns))
    assert time.process_time() - start < 5
    assert find_lora_layers(model)["model.layers.1.self_attn.q_proj"].lora_A.shape[0] == 2


def test_the_pattern_that_takes_years_is_named_among_others(decoder, monkeypatch):
    monkeypatch.setattr(patterns_module, "DEADLINE", 0.5)
    patterns = {"q_pro(j)": 2, r"(([a-z]|\d|_|\.)+)+!": 2, "v_pro(j)": 2}
    with pytest.raises(InputError, match=r"rank_pattern: .* took longer than 0\.5 s"):
        add_adapter(decoder("llama"), LoRAConfig(rank_pattern=patterns))
