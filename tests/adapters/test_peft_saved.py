"""Parts of the base that are trained beside LoRA: both ways with PEFT, trained, merged and removed, tied or not."""

import copy
import os
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import minipeft
from minipeft.adapters import LoRAConfig, add_adapter, remove_adapter
from minipeft.adapters.peft_format import load_adapter, save_adapter
from minipeft.models import FAMILIES
from minipeft.models.checkpoint import load_model, save_model

transformers.logging.set_verbosity_error()
warnings.filterwarnings("ignore", module="peft")
pytestmark = pytest.mark.filterwarnings("ignore")

LLAMA = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 96, "attention_bias": True}  # fmt: skip
BASES = {
    "gpt2": ("gpt2", {"vocab_size": 61, "n_positions": 96, "n_embd": 32, "n_layer": 2, "n_head": 4,
                      "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "llama": ("llama", LLAMA | {"tie_word_embeddings": False}),
    "llama tied": ("llama", LLAMA | {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", LLAMA | {"tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", LLAMA | {"sliding_window": 8, "query_pre_attn_scalar": 8}),
}  # fmt: skip
NAMES = {"gpt2": ("wte", "c_attn", "ln_f", "c_fc")}  # embedding, target, norm, a linear that is no target
LLAMA_NAMES = ("embed_tokens", "q_proj", "norm", "up_proj")
CASES = {
    "head": lambda e, t, n, u: {"modules_to_save": ("lm_head",)},
    "embedding": lambda e, t, n, u: {"modules_to_save": (e,)},
    "tables": lambda e, t, n, u: {"modules_to_save": (e, "lm_head")},
    "norm and linear": lambda e, t, n, u: {"modules_to_save": (n, u)},
    "bias all": lambda e, t, n, u: {"bias": "all"},
    "bias of targets": lambda e, t, n, u: {"bias": "lora_only"},
    "rows": lambda e, t, n, u: {"trainable_token_indices": (3, 7, 60)},
    "rows of both": lambda e, t, n, u: {"trainable_token_indices": (3, 7), "head_token_indices": (7, 9)},
    "LoRA on the embedding": lambda e, t, n, u: {"targets": (t, e)},
    "LoRA on the head": lambda e, t, n, u: {"targets": (t, "lm_head")},
    "LoRA on both": lambda e, t, n, u: {"targets": (t, e, "lm_head"), "rslora": True},
    "vocabulary": lambda e, t, n, u: {"vocabulary": 70},
    "less vocabulary": lambda e, t, n, u: {"vocabulary": 50, "modules_to_save": (n,)},
}


def make(name):
    """A tiny decoder whose norms and biases are away from 1 and 0."""
    family, fields = BASES[name]
    model = FAMILIES[family].decoder(FAMILIES[family].config(**fields)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.normal_(0, 0.25, generator=generator)
            if p.ndim == 1 and key.endswith("weight") and family != "gemma3_text":
                p.add_(1)
    return model


def config_of(name, case):
    names = NAMES.get(BASES[name][0], LLAMA_NAMES)
    return LoRAConfig(**{"rank": 4, "alpha": 6.0, "targets": (names[1],)} | CASES[case](*names))


def peer_of(folder, vocabulary=None):
    """transformers' model of the folder, resized as its user must."""
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    if vocabulary is not None:
        peer.resize_token_embeddings(vocabulary)
    return peer


def step(model, loss):
    """One step of gradient descent on everything trainable."""
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p -= 0.01 * p.grad
    model.zero_grad()


SOME = {  # of the other bases; MINIPEFT_PARTS=all tries every case on every base
    "gpt2": ("tables", "norm and linear", "bias all", "rows", "LoRA on both", "vocabulary"),
    "llama": ("head", "bias of targets", "rows of both", "LoRA on both", "less vocabulary"),
    "llama tied": tuple(CASES),
    "qwen3": ("tables", "bias of targets", "LoRA on the head"),
    "gemma3": ("embedding", "norm and linear", "rows", "LoRA on the embedding", "vocabulary"),
}
ALL = os.environ.get("MINIPEFT_PARTS") == "all"


@pytest.mark.parametrize(("name", "case"), [(name, case) for name in BASES for case in (CASES if ALL else SOME[name])])
def test_both_ways_with_peft_trained_merged_and_removed(name, case, stir, apart, tmp_path):
    model, config = make(name), config_of(name, case)
    save_model(model, tmp_path / "base")
    before, shown = copy.deepcopy(model.state_dict()), repr(model)
    ids = torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(1))
    ids[:, ::3] = ids[:, ::3] % 10
    report = add_adapter(model, config)
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    stir(model)
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(peer_of(tmp_path / "base", config.vocabulary), tmp_path / "ours",
                                            is_trainable=True).eval()  # fmt: skip
    assert {p.numel() for p in theirs.parameters() if p.requires_grad} == {
        p.numel() for p in model.parameters() if p.requires_grad
    }
    with torch.no_grad():
        assert apart(model(ids), theirs(ids).logits) <= 1e-5
    ours = model.loss(ids, ids) / (2 * 19)
    wanted = theirs(ids, labels=ids).loss
    assert abs(ours - wanted) <= 1e-5 * wanted
    step(model, ours)
    step(theirs, wanted)
    save_adapter(model, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    written, read = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("ours", "theirs"))
    assert written.keys() <= read.keys()
    for key, tensor in written.items():
        assert apart(tensor, read[key]) <= 1e-5, key
    with torch.no_grad():
        after = model(ids)
    remove_adapter(model)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert repr(model) == shown
    assert model.config.vocab_size == 61
    load_adapter(model, tmp_path / "theirs")
    with torch.no_grad():
        assert apart(model(ids), after) <= 1e-5
        minipeft.merge_adapter(model)
        assert apart(model(ids), after) <= 1e-5
    save_model(model, tmp_path / "merged")
    with torch.no_grad():
        assert apart(peer_of(tmp_path / "merged")(ids).logits, after) <= 1e-5
        assert torch.equal(load_model(tmp_path / "merged")(ids), model(ids))


PEFTS = {  # what PEFT's user asks for, and the size to which the vocabulary was resized before
    "resized": ({}, 70),
    "resized and trained": ({"modules_to_save": ["embed_tokens", "lm_head"]}, 70),
    "resized, cut": ({}, 50),
    "resized, rows": ({"trainable_token_indices": [61, 62, 3]}, 70),
    "rows of both": ({"trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [3, 7]}}, None),
    "rows of each": ({"trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [4]}}, None),
    "tied modules": ({"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}, None),
    "tied LoRA": ({"target_modules": ["q_proj", "embed_tokens", "lm_head"], "ensure_weight_tying": True}, None),
    "DoRA on the head": ({"target_modules": ["q_proj", "lm_head"], "use_dora": True}, None),
    "everything": ({"target_modules": ".*(_proj|embed_tokens|lm_head)"}, None),
    "a norm by half a name": ({"modules_to_save": ["norm", "x"]}, None),
    "a whole MLP": ({"modules_to_save": ["1.mlp"]}, None),
    "a bias on B": ({"bias": "all", "lora_bias": True}, None),
}  # fmt: skip


UNTIED = tuple(PEFTS) if ALL else ("resized, rows", "rows of each", "everything", "DoRA on the head")


@pytest.mark.parametrize(("name", "case"), [("llama tied", case) for case in PEFTS] + [("llama", c) for c in UNTIED])
def test_what_peft_writes_is_read(name, case, stir, apart, tmp_path):
    model, (given, size) = make(name), PEFTS[case]
    save_model(model, tmp_path / "base")
    ids = torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(1))
    asked = peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "target_modules": ["q_proj"], **given})
    theirs = stir(peft.get_peft_model(peer_of(tmp_path / "base", size), asked)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    again = peft.PeftModel.from_pretrained(peer_of(tmp_path / "base", size), tmp_path / "theirs").eval()
    report = load_adapter(model, tmp_path / "theirs", trainable=True)
    with torch.no_grad():
        wanted = again(ids).logits
        ours = model(ids)
        assert apart(ours, wanted) <= 1e-5
    assert any("the vocabulary has" in note for note in report.notes) == (size is not None)
    save_adapter(model, tmp_path / "ours")
    remove_adapter(model)
    load_adapter(model, tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(model(ids), ours)
        reread = peft.PeftModel.from_pretrained(peer_of(tmp_path / "base", size), tmp_path / "ours").eval()
        assert apart(reread(ids).logits, wanted) <= 1e-5
