"""A folder that save_model wrote with a tokenizer loads in transformers and in our `generate`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from minipeft import GenerateConfig, generate, load_model, load_tokenizer, save_model
from minipeft.errors import InputError
from minipeft.models import FAMILIES
from tests.small import LLAMA, TOKENS, write_small_model

TEXT = "def f(x):\n    return x  # é"


def write_base(folder: Path, kind: str, assets: Path) -> Path:
    """A random model with one of three real tokenizers, or the small one."""
    if kind == "small":
        return write_small_model(folder, layers=1)
    source = assets / "fixtures" / kind
    size = load_tokenizer(source).size
    family, given = "llama", LLAMA
    if kind == "gpt2-tokenizer":
        family, given = "gpt2", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    model = FAMILIES[family].decoder(FAMILIES[family].config(**given | {"vocab_size": size}))
    model.initialize(torch.Generator().manual_seed(0))
    save_model(model.eval(), folder)
    for file in source.iterdir():
        if file.name not in ("config.json", "LICENSE", "model.safetensors"):
            shutil.copyfile(file, folder / file.name)
    return folder


@pytest.mark.parametrize("kind", ["small", "gpt2-tokenizer", "smollm2-135m", "stories260K"])
def test_it_answers_here_and_in_transformers(kind, assets, tmp_path):
    base = write_base(tmp_path / "base", kind, assets)
    model, tokenizer = load_model(base), load_tokenizer(base)
    save_model(model, tmp_path / "out", tokenizer)
    again, same = load_model(tmp_path / "out"), load_tokenizer(tmp_path / "out")
    assert same.fingerprint == tokenizer.fingerprint
    settings = GenerateConfig(max_new_tokens=5, temperature=0.0)
    assert generate(again, same, [TEXT], settings) == generate(model, tokenizer, [TEXT], settings)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = theirs(TEXT, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == same.encode(TEXT)
    assert torch.allclose(peer(ids).logits, again(ids), atol=2e-5)


def test_the_eos_that_was_chosen_is_kept(tmp_path):
    base = write_small_model(tmp_path / "base", layers=1)
    save_model(load_model(base), tmp_path / "out", load_tokenizer(base).with_eos("!"))
    assert load_tokenizer(tmp_path / "out").eos == load_tokenizer(base).encode("!")[0]
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "!"
    assert json.loads((base / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"


def test_a_tokenizer_of_another_model_writes_nothing(tmp_path):
    base = write_small_model(tmp_path / "base", layers=1)
    config = FAMILIES["llama"].config(**LLAMA | {"vocab_size": TOKENS - 1})
    with pytest.raises(InputError, match="This tokenizer belongs to another model"):
        save_model(FAMILIES["llama"].decoder(config), tmp_path / "out", load_tokenizer(base))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_whose_files_are_gone_is_named(tmp_path):
    base = write_small_model(tmp_path / "base", layers=1)
    model, tokenizer = load_model(base), load_tokenizer(base)
    (base / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"base/tokenizer\.json: no such file"):
        save_model(model, tmp_path / "out", tokenizer)
