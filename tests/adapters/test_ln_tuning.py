"""LN-tuning: PEFT's gradients and targets, and its refusals; what every method has is in test_adapters.py."""

import copy
import json
import warnings

import peft
import pytest
import torch
import transformers
from peft.utils import constants
from safetensors.torch import load_file, save_file

from minipeft.adapters import LNTuningConfig, add_adapter, merge_adapter, remove_adapter
from minipeft.adapters.ln_tuning import find_norms, list_default_names, list_norms
from minipeft.adapters.peft_format import load_adapter, save_adapter
from minipeft.adapters.saved_modules import find_saved_modules
from minipeft.errors import InputError
from minipeft.models import FAMILIES
from minipeft.models.quantized import dequantize_model, is_quantized, quantize_model
from minipeft.training.loop import TrainConfig, train

transformers.logging.set_verbosity_error()
warnings.filterwarnings("ignore", module="peft")
SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 4, "pad_token_id": None}  # fmt: skip
PEFTS = constants.TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING


def empty(name):
    """A decoder of the family without data."""
    return FAMILIES[name].build_empty(FAMILIES[name].config(**({} if name == "gpt2" else SIZES)))


@pytest.mark.filterwarnings("ignore")
def test_logits_and_gradients_are_pefts(model, ids, apart, stir, twin):
    theirs = peft.get_peft_model(twin(model), peft.LNTuningConfig(task_type="CAUSAL_LM"))
    report = add_adapter(model, LNTuningConfig())
    stir(model)
    modules, layers = dict(theirs.named_modules()), find_saved_modules(model)
    assert report.trainable == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert report.modules == list(layers)
    twins = {path: modules[f"base_model.model.{path}"].ln_tuning_layers["default"] for path in layers}
    with torch.no_grad():
        for path, layer in layers.items():
            assert layer.copies.keys() == dict(twins[path].named_parameters()).keys()
            for name, copy in layer.copies.items():
                twins[path].get_parameter(name).copy_(copy)
    mine, wanted = model(ids), theirs(ids).logits
    assert apart(mine, wanted) <= 1e-5
    mine.logsumexp(dim=-1).sum().backward()
    wanted.logsumexp(dim=-1).sum().backward()
    for path, layer in layers.items():
        for name, copy in layer.copies.items():
            assert apart(copy.grad, twins[path].get_parameter(name).grad) <= 2e-4, (path, name)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_default_targets_are_pefts(name):
    """Where PEFT has none for the family: every norm but those in the attention."""
    model = empty(name)
    names = list_default_names(model)
    if name in PEFTS:
        assert sorted(names) == sorted(PEFTS[name])
        return
    chosen = find_norms(model, "default")
    left = [path for path in list_norms(model) if path not in chosen]
    assert all(path.rsplit(".", 1)[-1] in ("q_norm", "k_norm") for path in left)
    assert model.family.norm in chosen
    assert len(chosen) == 1 + len(model.blocks) * len(model.blocks[0].norms)


def test_every_norm_of_a_family_can_be_named():
    model = empty("qwen3")
    assert find_norms(model, ("q_norm", "1.input_layernorm")) == [
        "model.layers.0.self_attn.q_norm", "model.layers.1.self_attn.q_norm", "model.layers.1.input_layernorm",
    ]  # fmt: skip
    assert add_adapter(empty("qwen3"), LNTuningConfig(("q_norm",))).trainable == 2 * 128


def test_a_quantized_base_trains_as_the_base_of_its_values(decoder, packed, gradients, apart, stir):
    quantized = decoder("llama")
    quantize_model(quantized, "nf4")
    plain = copy.deepcopy(quantized)
    dequantize_model(plain)
    found = []
    for model in (quantized, plain):
        add_adapter(model, LNTuningConfig())
        found.append(gradients(stir(model), [packed]))
    assert is_quantized(quantized) > is_quantized(plain)
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert max(apart(found[0][1][name], wanted) for name, wanted in found[1][1].items()) <= 1e-5


def test_it_trains_what_full_tuning_trains_of_the_norms(decoder, family, packed):
    """The same steps as with every other parameter frozen by hand; merged, the same weights to the bit."""
    tuned, frozen = decoder(family), decoder(family)
    add_adapter(tuned, LNTuningConfig())
    for name, p in frozen.named_parameters():
        p.requires_grad_(name.rpartition(".")[0] in list_norms(frozen))
    for model in (tuned, frozen):
        assert [step.number for step in train(model, [packed] * 3, TrainConfig(3, learning_rate=1e-2))] == [1, 2, 3]
    merge_adapter(tuned)
    held = frozen.state_dict()
    assert tuned.state_dict().keys() == held.keys()
    assert all(torch.equal(tensor, held[name]) for name, tensor in tuned.state_dict().items())
    assert not torch.equal(held[f"{tuned.family.norm}.weight"], decoder(family).norm.weight)


def test_what_a_folder_may_not_hold(decoder, tmp_path):
    model = decoder("llama")
    add_adapter(model, LNTuningConfig())
    save_adapter(model, tmp_path)
    remove_adapter(model)
    config, data = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    given, held = json.loads(config.read_text()), load_file(data)
    assert given["target_modules"] == ["input_layernorm", "norm", "post_attention_layernorm"]
    for changes, said in (
        ({"modules_to_save": ["lm_head"]}, r"json: modules_to_save: \['lm_head'\] is not supported"),
        ({"target_modules": ["q_proj"]}, "json: target_modules: no norm is named 'q_proj'; this model has"),
        ({"target_modules": "all-linear"}, "json: target_modules: 'all-linear' names no norm"),
        ({"exclude_modules": r".*norm"}, "json: exclude_modules: '.*norm' leaves no norm"),
        ({"r": 4}, "json: r: unknown field with value 4"),
    ):
        config.write_text(json.dumps(given | changes))
        with pytest.raises(InputError, match=said):
            load_adapter(model, tmp_path)
    config.write_text(json.dumps(given))
    save_file({name: t for name, t in held.items() if ".norm." not in name}, data)
    with pytest.raises(InputError, match=r"model\.norm\.ln_tuning_layers\.weight"):
        load_adapter(model, tmp_path)
    assert model.adapter is None


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ((), r"targets: \(\) names no norm"),
        (("",), r"targets: \('',\) names no norm"),
        ("all-linear", "targets: 'all-linear' names no norm"),
        (("ln_3",), r"targets: no norm is named 'ln_3'; this model has \['ln_1', 'ln_2', 'ln_f'\]"),
        (r".*\.c_attn", "matches no norm, such as 'transformer.h.0.ln_1'"),
    ],
)
def test_what_names_no_norm_is_refused(decoder, targets, said):
    with pytest.raises(InputError, match=said):
        add_adapter(decoder("gpt2"), LNTuningConfig(targets))
