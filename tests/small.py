"""A small model folder with its tokenizer, and training pairs, for the tests of whole runs."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from minipeft.adapters import LoRAConfig, add_adapter
from minipeft.adapters.peft_format import save_adapter
from minipeft.models import FAMILIES
from minipeft.models.checkpoint import load_model, save_model
from minipeft.models.config import parse_config

TOKENS = 257  # all bytes, and the end of text
GPT2 = {"vocab_size": TOKENS, "n_positions": 96, "n_embd": 16, "n_layer": 2, "n_head": 2,
        "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}  # fmt: skip
LLAMA = {"vocab_size": TOKENS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 96}  # fmt: skip


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges: a byte is a token."""
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {sign: number for number, sign in enumerate(["<|endoftext|>", *signs])}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    (folder / "tokenizer.json").write_text(backend.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))


def write_small_model(folder: Path, family: str = "gpt2", layers: int = 2, **changes: int) -> Path:
    """A random model of a layer or two with its tokenizer; `changes` go over its config's fields."""
    config, decoder = FAMILIES[family].config, FAMILIES[family].decoder
    given = GPT2 | {"n_layer": layers} if family == "gpt2" else LLAMA | {"num_hidden_layers": layers}
    model = decoder(parse_config(config, given | changes))
    model.initialize(torch.Generator().manual_seed(0))
    save_model(model.eval(), folder)
    write_tokenizer(folder)
    return folder


def write_adapter(model: Path, folder: Path) -> Path:
    """A LoRA adapter away from its init."""
    tuned = load_model(model)
    add_adapter(tuned, LoRAConfig(rank=2))
    draw = torch.Generator().manual_seed(1)
    for p in tuned.parameters():
        if p.requires_grad:
            p.data.normal_(0, 0.3, generator=draw)
    save_adapter(tuned, folder)
    return folder


def write_pairs(file: Path, count: int = 16) -> Path:
    """Write `count` short pairs with a learnable pattern."""
    rows = [{"intent": f"add {n}", "snippet": f"x += {n}", "question_id": n} for n in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
