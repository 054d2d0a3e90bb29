"""From rows of ids to logits; knows no adapter. `FAMILIES` maps config.json's model_type to its config and decoder."""

from minipeft.models.gpt2 import GPT2, GPT2Config
from minipeft.models.llama import Llama, LlamaConfig
from minipeft.models.mistral import Mistral, MistralConfig

Decoder = GPT2 | Llama
FAMILIES: dict[str, tuple[type, type]] = {
    "gpt2": (GPT2Config, GPT2),
    "llama": (LlamaConfig, Llama),
    "mistral": (MistralConfig, Mistral),
}
