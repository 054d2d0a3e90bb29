"""Mistral (Jiang et al. 2023): Llama with grouped queries by default and a sliding window over the keys.

A token sees itself and the `sliding_window - 1` before it; through L layers it still hears from L * window tokens back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from minipeft.models.config import at_least
from minipeft.models.llama import Llama, LlamaConfig


@dataclass(frozen=True)
class MistralConfig(LlamaConfig):
    """Llama's fields with Mistral's defaults, and the window."""

    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 4096 * 32
    sliding_window: int | None = 4096  # tokens; None: all

    model_type = "mistral"
    architecture = "MistralForCausalLM"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sliding_window is not None:
            at_least(self, "sliding_window", 1)

    @staticmethod
    def from_json(given: Mapping[str, object]) -> dict[str, object]:
        """As Llama's; Mistral's linears never have biases, whatever a config.json says."""
        return {**LlamaConfig.from_json(given), "attention_bias": False, "mlp_bias": False}


class Mistral(Llama):
    """Llama whose queries look back over `sliding_window` positions."""

    config: MistralConfig

    @property
    def window(self) -> int | None:  # type: ignore[override]
        return self.config.sliding_window
