"""config.json's fields: types, limits, ignored keys; the activations; the shapes of real configs."""

import dataclasses
import json

import pytest
import torch
from transformers.activations import ACT2FN

from minipeft.errors import InputError, check_value
from minipeft.models import FAMILIES
from minipeft.models.checkpoint import make_config_json, read_config
from minipeft.models.config import ACTIVATIONS, WIDEST, find_key, parse_config
from minipeft.models.gpt2 import GPT2Config
from minipeft.models.llama import LlamaConfig
from minipeft.models.mistral import MistralConfig


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_transformers_own(name):
    x = torch.linspace(-8, 8, 1001)
    assert torch.allclose(ACTIVATIONS[name](x), ACT2FN[name](x), atol=2e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_defaults_are_transformers_own(family):
    """For an empty config.json each of our fields has transformers' default."""
    import transformers

    theirs = transformers.models.auto.configuration_auto.CONFIG_MAPPING[family]().to_dict()
    cls = FAMILIES[family].config
    ours = vars(parse_config(cls, {}))
    full, local = (theirs.get("rope_parameters", {}).get(f"{kind}_attention") for kind in ("full", "sliding"))
    if full is not None:
        theirs |= {"rope_parameters": full, "rope_local_base_freq": local["rope_theta"]}
    differing = set()
    for name, value in ours.items():
        if name == "rope_theta":
            wanted = theirs["rope_parameters"]["rope_theta"]
        elif name == "rope_scaling":
            wanted = None if theirs["rope_parameters"]["rope_type"] == "default" else theirs["rope_parameters"]
        else:
            wanted = theirs.get(find_key(cls, name), value)
        if value != wanted:
            differing.add(name)
    # What transformers works out when it is made, ours when it is asked for; ids that files give, and we invent none.
    assert differing <= {"num_key_value_heads", "head_dim", "bos_token_id", "eos_token_id", "pad_token_id",
                         "layer_types", "no_rope_layers", "sliding_window"}  # fmt: skip
    layers, types = range(theirs.get("num_hidden_layers", 0)), theirs.get("layer_types")
    windows = [FAMILIES[family].config().window(i) for i in layers]
    if types:
        window = theirs["sliding_window"]
        assert windows == [window if kind == "sliding_attention" else None for kind in types]
    if "no_rope_layers" in theirs:
        assert [FAMILIES[family].config().rope(i) is not None for i in layers] == list(
            map(bool, theirs["no_rope_layers"])
        )


@pytest.mark.parametrize("cls", [GPT2Config, LlamaConfig, MistralConfig])
def test_a_saved_config_is_read_again(cls, tmp_path):
    changes = {"vocab_size": 77, "eos_token_id": [1, 2], "bos_token_id": 0}
    if cls is not GPT2Config:
        changes |= {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 5e5, "head_dim": 10}
    config = cls(**changes)
    (tmp_path / "config.json").write_text(json.dumps(make_config_json(config, torch.bfloat16)))
    again = read_config(tmp_path / "config.json")
    assert type(again) is cls
    same = {f.name: getattr(again, f.name) for f in dataclasses.fields(cls)}
    if cls is not GPT2Config:
        assert again.kv_heads == config.kv_heads
        same["num_key_value_heads"] = config.num_key_value_heads
    assert cls(**same) == config


def test_unknown_fields_have_no_effect():
    assert parse_config(GPT2Config, {"n_ctx": 7, "auto_map": {"x": "y"}, "foo": [1]}) == GPT2Config()


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GPT2Config().n_embd = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("value", "hint", "answer"),
    [
        (3, int, True),
        (True, int, False),
        (3.0, int, False),
        ("3", int, False),
        (None, int, False),
        (3, float, True),
        (3.5, float, True),
        (True, float, False),
        (float("inf"), float, False),
        (True, bool, True),
        (1, bool, False),
        (None, int | None, True),
        (7, int | None, True),
        ((1, 2), int | tuple[int, ...] | None, True),
        ((1, "2"), int | tuple[int, ...] | None, False),
        ("x", int | tuple[int, ...] | None, False),
        ({}, dict | None, True),
        ([], dict | None, False),
        ("x", str, True),
        (1, str, False),
    ],
)
def test_types(value, hint, answer):
    try:
        check_value(value, hint, {}, "x")
        fits = True
    except InputError:
        fits = False
    assert fits is answer


@pytest.mark.parametrize(
    ("cls", "given", "says"),
    [
        (GPT2Config, {"n_embd": "768"}, "n_embd: '768' must be an integer in [1, 2^20]"),
        (GPT2Config, {"n_inner": 3.5}, "n_inner: 3.5 must be an integer in [1, 2^20]"),
        (GPT2Config, {"n_embd": WIDEST * 2}, f"n_embd: {WIDEST * 2} must be an integer in [1, 2^20]"),
        (GPT2Config, {"vocab_size": 2**31}, "vocab_size: 2147483648 must be an integer in [1, 2^31)"),
        (GPT2Config, {"tie_word_embeddings": 1}, "tie_word_embeddings: 1 must be true or false"),
        (GPT2Config, {"add_cross_attention": True}, "add_cross_attention: true is not supported"),
        (GPT2Config, {"eos_token_id": "</s>"}, "eos_token_id: '</s>' must be an integer"),
        (GPT2Config, {"attn_pdrop": -0.1}, "attn_pdrop: -0.1 must be in [0, 1)"),
        (LlamaConfig, {"num_key_value_heads": 0}, "num_key_value_heads: 0 must be an integer in [1, 2^20]"),
        (LlamaConfig, {"head_dim": 0}, "head_dim: 0 must be an integer in [1, 2^20]"),
        (LlamaConfig, {"rope_scaling": [1]}, "rope_scaling: [1] is not an object"),
        (LlamaConfig, {"dtype": "int8"}, "dtype: 'int8' is not supported (float32, float16, bfloat16)"),
        (MistralConfig, {"sliding_window": 0}, "sliding_window: 0 must be an integer in [1, 2^31)"),
    ],
)
def test_each_wrong_field_is_named(cls, given, says):
    with pytest.raises(InputError) as error:
        parse_config(cls, given)
    assert str(error.value) == says


class TestCodeLlama:
    """The real CodeLlama-7b: its config.json and the names in its index (no weights)."""

    @pytest.fixture
    def model(self, assets):
        config = read_config(assets / "fixtures" / "codellama-7b-config" / "config.json")
        with torch.device("meta"):
            return FAMILIES[config.model_type].decoder(config)

    def test_names_and_bytes(self, assets, model):
        index = json.loads((assets / "fixtures/codellama-7b-config/model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == model.state_dict().keys()
        assert index["metadata"]["total_size"] == 2 * sum(p.numel() for p in model.parameters())

    def test_its_context(self, model):
        assert (model.config.context, model.config.rope_theta) == (16384, 1e6)
