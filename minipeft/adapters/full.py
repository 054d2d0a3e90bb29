"""Full fine-tuning: every parameter of the base is trained, and nothing is added."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minipeft.adapters.method import Encoder, Recipe
from minipeft.models import Decoder

LARGE = 2_000_000_000  # parameters; between GPT-2 XL (1.6e9) and the 7B models


@dataclass(frozen=True)
class FullConfig:
    """Full fine-tuning: train every parameter of the base."""


def add_full(model: Decoder, config: FullConfig, tokenizer: Encoder | None, generator: torch.Generator) -> list[str]:
    """Add nothing: the method's record says that the base is trained."""
    return []


def remove_full(model: Decoder) -> None:
    """Remove nothing: the trained weights stay."""


def full_recipe(config: FullConfig, parameters: int, family: str) -> Recipe:
    """Full tuning's default training: the larger the base, the smaller the learning rate."""
    if parameters < LARGE:
        source = "CodeXGLUE text-to-code; the learning rate also in Weyssow et al. 2023"
        return Recipe(5e-5, weight_decay=0.01, source=source)
    if family == "mistral":
        source = (
            "a third of Llama's 1e-5: Mistral-7B diverges at learning rates that suit Llama (transformers issue 26498)"
        )
        return Recipe(3e-6, warmup=0.1, source=source)
    return Recipe(1e-5, warmup=0.1, source="usual for 7B Llamas; a tenth of warm-up against divergence")
