"""Decoders: from rows of ids to logits. `FAMILIES` maps config.json's model_type to the family's record."""

from minipeft.models import gemma, gpt2, gpt_neox, granite, llama, mistral, olmo, phi, phi3, qwen, smollm3, starcoder2
from minipeft.models.decoder import Decoder
from minipeft.models.family import Family
from minipeft.models.gpt2 import GPT2, GPT2Config
from minipeft.models.llama import Llama, LlamaConfig
from minipeft.models.mistral import Mistral, MistralConfig

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        gpt2.FAMILY, llama.FAMILY, mistral.FAMILY, qwen.QWEN2, qwen.QWEN3, smollm3.FAMILY, granite.FAMILY,
        olmo.OLMO2, olmo.OLMO3, gemma.GEMMA, gemma.GEMMA2, gemma.GEMMA3, starcoder2.FAMILY, phi3.FAMILY, phi.FAMILY,
        gpt_neox.FAMILY,
    )
}  # fmt: skip

EXPERTS = "its MLPs are mixtures of experts"
REFUSED = {  # model_type -> why it is no short difference from a family above
    **dict.fromkeys(
        ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "gpt_oss", "granitemoe", "deepseek_v2", "deepseek_v3"),
        EXPERTS,
    ),
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_text"), "three of four layers are gated linear attention"),
    **dict.fromkeys(
        ("gemma3n", "gemma4", "gemma4_text"), "it has embeddings for each layer and shares keys and values"
    ),
    **dict.fromkeys(("gemma3", "mistral3", "llama4", "qwen2_vl", "qwen2_5_vl"), "it reads images too"),
    "ministral3": "its queries are scaled by their position",
}

__all__ = [
    "FAMILIES",
    "GPT2",
    "REFUSED",
    "Decoder",
    "Family",
    "GPT2Config",
    "Llama",
    "LlamaConfig",
    "Mistral",
    "MistralConfig",
]
