"""The committed demo model: it loads in minipeft and transformers, is small, and matches its model card."""

import json
import math
import re

import pytest
import torch
import transformers

import minipeft
from minipeft.data.examples import encode_pairs, load_pairs
from minipeft.data.tokens import load_tokenizer
from minipeft.demo import demo_model_path, demo_pairs_path

FOLDER = demo_model_path()
LARGEST = 14_000_000  # bytes


@pytest.fixture(scope="module")
def model():
    return minipeft.load_model(FOLDER, dtype=torch.float32)


def test_demo_is_a_name_for_these_files():
    assert minipeft.load_model("demo").config == minipeft.load_model(FOLDER).config
    assert load_pairs("demo", split="test").file == str(demo_pairs_path())


def test_it_is_small_and_holds_no_pickle():
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= LARGEST
    assert {file.name for file in files} >= {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pkl", ".pth")]


def test_weights_are_bfloat16():
    assert {p.dtype for p in minipeft.load_model(FOLDER).parameters()} == {torch.bfloat16}


def test_logits_and_ids_are_those_of_transformers(model):
    text = load_pairs("demo", split="test").items[0].snippet + "\ndef f(x):\n    return x"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    ids = transformers.AutoTokenizer.from_pretrained(FOLDER)(text)["input_ids"]
    assert load_tokenizer(FOLDER).encode(text) == ids
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits
        torch.testing.assert_close(model(torch.tensor([ids])), expected, atol=2e-4, rtol=1e-4)


def parameters_of(config):
    """Counted by hand: tables, 12 C^2 + 13 C in a block, the last norm."""
    width = config["n_embd"]
    tables = (config["vocab_size"] + config["n_positions"]) * width
    return tables + config["n_layer"] * (12 * width**2 + 13 * width) + 2 * width


def test_the_card_states_the_parameters_that_the_config_gives(model):
    count = parameters_of(json.loads((FOLDER / "config.json").read_text()))
    assert count == sum(p.numel() for p in model.parameters())
    assert 4_000_000 <= count <= 7_000_000
    assert f"{count:,} parameters" in (FOLDER / "README.md").read_text()


def test_the_card_says_how_it_was_made_and_what_it_is_not():
    card = (FOLDER / "README.md").read_text()
    assert "examples/pretrain_demo.py" in card
    assert re.search(r"\d\.\d+ nats per token", card)
    assert re.search(r"\d\.\d+ bits per byte", card)
    assert re.search(r"\d+ minutes", card)
    assert "## What it is not" in card
    assert "not instruction" in card.lower()


def test_it_has_learned_python(model):
    """Far better than chance, than the frequencies of its tokens, and than the same code with its tokens shuffled."""
    tokenizer = load_tokenizer(FOLDER)
    source = "import os\n\n\ndef read(path):\n    with open(path) as f:\n        return f.read()\n\n\n"
    source += "class A:\n    def __init__(self):\n        self.x = None\n"
    ids = torch.tensor([tokenizer.encode(source)])
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]

    def loss(ids):
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:]).item()

    assert loss(ids) < 0.5 * math.log(model.config.vocab_size)
    assert loss(ids) < loss(shuffled) - 2


def test_the_longest_pair_and_twenty_learned_columns_fit(model):
    longest = max(
        len(e.ids)
        for split in ("train", "test")
        for e in encode_pairs(load_pairs("demo", split=split), load_tokenizer(FOLDER))
    )
    assert longest + 20 <= 256 <= model.config.n_positions
