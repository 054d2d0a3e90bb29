"""SmolLM3 (Bakouch et al. 2025): Llama in which every fourth layer has no positions (NoPE, Yang et al. 2025).

layers 0, 1, 2 of four     q and k rotated
layer 3 of four            q and k not rotated: only the causal mask encodes order; the window, if any, is on this layer
"""

from __future__ import annotations

from dataclasses import dataclass

from minipeft.errors import InputError, option
from minipeft.models.config import count, width
from minipeft.models.family import Family
from minipeft.models.layered import LayeredConfig
from minipeft.models.llama import TARGETS, Llama


@dataclass(frozen=True)
class SmolLM3Config(LayeredConfig):
    """Llama's fields with SmolLM3's defaults, and which layers rotate."""

    vocab_size: int = count(128256)
    hidden_size: int = width(2048)
    num_hidden_layers: int = count(36)
    num_attention_heads: int = width(16)
    num_key_value_heads: int | None = width(4)
    max_position_embeddings: int = count(32768)
    rope_theta: float = option(2000000.0, above=0)
    tie_word_embeddings: bool = True
    sliding_window: int | None = count(None)
    use_sliding_window: bool = False
    no_rope_layers: tuple[int, ...] | None = None  # 1: the layer rotates (so named by the files), 0: it does not
    no_rope_layer_interval: int = count(4)

    model_type = "smollm3"
    architecture = "SmolLM3ForCausalLM"

    def __post_init__(self) -> None:
        super().__post_init__()
        flags = self.no_rope_layers
        if flags is not None and (len(flags) < self.layers or not set(flags) <= {0, 1}):
            raise InputError(f"must be {self.layers} of 0 and 1", where="no_rope_layers")

    def rope(self, layer: int) -> str | None:
        given, interval = self.no_rope_layers, self.no_rope_layer_interval
        rotates = (layer + 1) % interval != 0 if given is None else given[layer]
        return "default" if rotates else None

    def slides(self, layer: int) -> bool:
        return self.use_sliding_window and self.rope(layer) is None


class SmolLM3(Llama):
    """Llama with layers that do not rotate."""


SmolLM3.record = FAMILY = Family("smollm3", SmolLM3Config, SmolLM3, TARGETS)
