"""The two files beside PEFT's: training resumes from them, and missing or contradictory entries are refused."""

import json

import pytest
import torch

from minipeft.adapters import PrefixConfig, PromptConfig, add_adapter, remove_adapter
from minipeft.adapters.peft_format import load_adapter, save_adapter
from minipeft.adapters.peft_virtual import OWN, STATE, collect_table
from minipeft.errors import InputError
from minipeft.models import Decoder

TEXT = "abracadabra"
KINDS = {
    "prefix": PrefixConfig(5, text=TEXT),
    "prefix mlp": PrefixConfig(5, text=TEXT, reparam=6),
    "prefix first": PrefixConfig(5, text=TEXT, freeze_first=True, reparam=6),
    "prefix gate": PrefixConfig(5, text=TEXT, gate=True),
    "prefix gate mlp": PrefixConfig(5, text=TEXT, gate=True, reparam=6),
    "prefix windowed": PrefixConfig(5, text=TEXT, windowed=True),
    "prompt": PromptConfig(5, text=TEXT),
    "prompt mlp": PromptConfig(5, text=TEXT, reparam=6),
    "prompt windowed": PromptConfig(5, text=TEXT, windowed=True),
}


class Letters:
    """A tokenizer for the tiny models: a letter is a token."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 61 for letter in text]


@pytest.fixture(params=KINDS.values(), ids=list(KINDS))
def config(request) -> PrefixConfig | PromptConfig:
    return request.param


@pytest.fixture
def model(config, decoder, stir) -> Decoder:
    """A tiny Llama with an adapter away from its init."""
    made = decoder("llama")
    add_adapter(made, config, Letters())
    return stir(made)


def test_training_goes_on_from_the_file(model, config, packed, gradients, tmp_path):
    loss, wanted = gradients(model, [packed])
    columns = collect_table(model)
    save_adapter(model, tmp_path)
    assert (tmp_path / STATE).exists() == (config.reparam is not None)
    remove_adapter(model)
    load_adapter(model, tmp_path, trainable=True)
    assert model.adapter == config
    loss_again, found = gradients(model, [packed])
    assert loss_again == loss
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert torch.equal(collect_table(model), columns)


def test_what_the_files_lack_or_contradict_is_said(config, decoder, model, tmp_path):
    save_adapter(model, tmp_path)
    own = json.loads((tmp_path / OWN).read_text())

    def refused(trainable: bool = True) -> str:
        with pytest.raises(InputError) as caught:
            load_adapter(decoder("llama"), tmp_path, trainable=trainable)
        return str(caught.value)

    (tmp_path / OWN).write_text(json.dumps(own | {"wisdom": 1}))
    assert f"{OWN}: unknown field 'wisdom'" in refused()
    (tmp_path / OWN).write_text(json.dumps(own | {"length": 6}))
    assert f"{OWN}: length: 6, but adapter_config.json says 5" in refused(trainable=False)
    (tmp_path / OWN).write_text(json.dumps(own))
    if config.reparam is None:
        return
    other = decoder("llama", seed=5)
    add_adapter(other, config, Letters(), seed=9)
    save_adapter(other, tmp_path / "other")
    state = (tmp_path / STATE).read_bytes()
    (tmp_path / STATE).write_bytes((tmp_path / "other" / STATE).read_bytes())
    assert "makes another table than adapter_model.safetensors holds" in refused()
    load_adapter(decoder("llama"), tmp_path)  # which the columns alone do not mind
    (tmp_path / STATE).unlink()
    assert f"{STATE} is missing" in refused()
    (tmp_path / STATE).write_bytes(state[:-4])
    assert "needs" in refused()


def test_a_later_adapter_in_the_same_folder_is_not_mistaken_for_the_first(config, decoder, model, tmp_path):
    save_adapter(model, tmp_path)
    other = decoder("llama")
    add_adapter(other, PromptConfig(4, text=TEXT), Letters())
    save_adapter(other, tmp_path)
    assert not (tmp_path / STATE).exists()
    again = decoder("llama")
    load_adapter(again, tmp_path, trainable=True)
    assert again.adapter == other.adapter
