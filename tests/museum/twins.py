"""A tiny model twice, ours and transformers', with the same weights, and helpers for the peer's."""

from dataclasses import dataclass
from pathlib import Path

import transformers
from torch import nn

from minipeft.models import Decoder


@dataclass
class Twins:
    """Ours and transformers' model of the same weights, both in eval mode, and the folder that they came from."""

    ours: Decoder
    theirs: nn.Module
    folder: Path

    def reload(self) -> nn.Module:
        """A fresh copy of transformers' model."""
        return transformers.AutoModelForCausalLM.from_pretrained(self.folder).eval()


def peft_layers(model: nn.Module) -> list[nn.Module]:
    """The LoRA layers of PEFT in a model."""
    return [module for module in model.modules() if hasattr(module, "lora_B")]
