"""Mistral (Jiang et al. 2023): Llama with grouped queries by default and a sliding window over the keys.

A token attends to itself and the `sliding_window - 1` tokens before it; through L layers information travels up to
L * window tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from minipeft.models.config import count, width
from minipeft.models.family import Family
from minipeft.models.layered import LayeredConfig
from minipeft.models.llama import TARGETS, Llama


@dataclass(frozen=True)
class MistralConfig(LayeredConfig):
    """Llama's fields with Mistral's defaults, and the window of every layer."""

    intermediate_size: int = width(14336)
    num_key_value_heads: int | None = width(8)
    max_position_embeddings: int = count(4096 * 32)

    model_type = "mistral"
    architecture = "MistralForCausalLM"
    fixed: ClassVar[Mapping[str, object]] = {"attention_bias": False, "mlp_bias": False, "layer_types": None}


class Mistral(Llama):
    """Llama whose queries attend to the last `sliding_window` positions."""


Mistral.record = FAMILY = Family("mistral", MistralConfig, Mistral, TARGETS)
