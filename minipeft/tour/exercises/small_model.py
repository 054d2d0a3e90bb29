"""A small random model and a tokenizer of letters, for tests that need a whole model: a step takes milliseconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from minipeft.data.examples import Example
from minipeft.models import FAMILIES, Decoder

EOS = 26


def make_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> Decoder:
    """A Llama of two layers, 16 wide, with 27 tokens and a context of 64; its weights are a function of the seed."""
    family = FAMILIES["llama"]
    config = family.config(
        vocab_size=27,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    model: Decoder = family.decoder(config)
    model.initialize(torch.Generator().manual_seed(seed))
    for p in model.parameters():
        p.data.mul_(4 if p.dim() > 1 else 1)  # far from the small init: differences show
    return model.to(dtype).eval()


@dataclass(frozen=True)
class Letters:
    """A tokenizer of the letters a to z, 0 to 25, and EOS, 26, which is the padding too."""

    size: int = 27
    eos: int = EOS
    pad: int = EOS
    bos: None = None

    def require_eos(self) -> int:
        return self.eos

    def encode(self, text: str) -> list[int]:
        return [ord(sign) - ord("a") for sign in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(token + ord("a")) for token in ids if token != EOS)


LETTERS: Any = Letters()


def make_example(text: str) -> Example:
    """A document: the letters of a text and EOS."""
    return Example([*Letters().encode(text), EOS], 0)
