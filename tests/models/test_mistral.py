"""Mistral against transformers' on the same weights, with texts longer than its window."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file

from minipeft.models.checkpoint import load_model

SHAPES = {
    "window 6": {},
    "window 1": {"sliding_window": 1},
    "window of the text": {"sliding_window": 30},
    "one less": {"sliding_window": 29},
    "no window": {"sliding_window": None},
    "one key/value head": {"num_attention_heads": 8, "num_key_value_heads": 1},
    "two of eight": {"num_attention_heads": 8, "num_key_value_heads": 2},
    "eight of eight": {"num_attention_heads": 8, "num_key_value_heads": 8},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 12},
    "odd sizes": {"vocab_size": 67, "hidden_size": 27, "intermediate_size": 53, "num_attention_heads": 3,
                  "num_key_value_heads": 1, "head_dim": 10, "sliding_window": 7},
    "gelu": {"hidden_act": "gelu"},
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_transformers(shape, twins, apart, ids):
    ours, theirs = twins("mistral", **SHAPES[shape])
    assert apart(ours, theirs, ids) <= 2e-5


def test_the_window_matters(twins, apart, ids):
    ours, theirs = twins("mistral")
    assert apart(ours, theirs, ids) <= 2e-5
    assert apart(ours, twins.peer("mistral", sliding_window=7), ids) > 1e-2
    assert apart(ours, twins.peer("mistral", sliding_window=None), ids) > 1e-2


def test_greedy_tokens_are_those_of_transformers(twins, greedy, peer_greedy, ids):
    ours, theirs = twins("mistral")
    assert torch.equal(greedy(ours, ids[:1, :9], 64), peer_greedy(theirs, ids[:1, :9], 64))


def test_biases_in_config_json_have_no_effect_as_in_transformers(twins, apart, ids):
    folder = twins.save(twins.peer("mistral"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_bias": True, "mlp_bias": True}))
    theirs = transformers.MistralForCausalLM.from_pretrained(folder).eval()
    assert apart(load_model(folder), theirs, ids) <= 2e-5


def test_stories_under_a_window_of_16(assets, tmp_path, greedy, peer_greedy):
    """The real Llama of fixtures/stories260K, run as a Mistral: its text is longer than the window."""
    folder = assets / "fixtures" / "stories260K"
    shutil.copyfile(folder / "model.safetensors", tmp_path / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    golden = load_file(folder / "golden_logits.safetensors")
    ours = load_model(tmp_path)
    with torch.no_grad():
        assert (ours(golden["input_ids"]) - golden["mistral_sw16_logits"]).abs().max() <= 1e-4
    theirs = transformers.MistralForCausalLM.from_pretrained(tmp_path).eval()
    start = golden["input_ids"][:1, :4]
    assert torch.equal(greedy(ours, start, 64), peer_greedy(theirs, start, 64))
