"""A toy family in one file and one record: Llama with scaled hidden states, and a config field of its own."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from minipeft.models.family import Family
from minipeft.models.llama import TARGETS, Llama, LlamaConfig


@dataclass(frozen=True)
class ToyConfig(LlamaConfig):
    """Llama's fields and one more."""

    logit_scale: float = 2.0

    model_type = "toy"
    architecture = "ToyForCausalLM"

    @staticmethod
    def from_json(given: Mapping[str, object]) -> dict[str, object]:
        return LlamaConfig.from_json(given)


class Toy(Llama):
    """Llama with scaled hidden states."""

    @property
    def family(self) -> Family:
        return FAMILY

    def hidden(self, *given: object, **named: object) -> Tensor:
        return self.config.logit_scale * super().hidden(*given, **named)


FAMILY = Family("toy", ToyConfig, Toy, TARGETS)
