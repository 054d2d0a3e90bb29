"""How each method is trained by default, and where each number comes from.

Learning rates differ by a factor of ten thousand between methods, and a rate that suits one leaves another where it
started (movement.py). The rates are for AdamW and about 16 examples (700 tokens) a step. "Pilot": the loss on held-out
pairs of CoNaLa after 60 steps of 4 examples with a 135M Llama, 3.31 nats without training; results/prefix-135m is that
experiment again, whole (`minipeft study --preset prefix`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from minipeft.errors import InputError

LARGE = 2_000_000_000  # parameters; between GPT-2 XL (1.6e9) and the 7B models
SMALL = 1_000_000_000


@dataclass(frozen=True)
class Recipe:
    """A method's settings; all but the last three are fields of TrainConfig.

    Every recipe trains float32 tensors; the base keeps its own dtype unless it is what is trained.
    """

    learning_rate: float
    warmup: float = 0.06  # share of the steps; 5 % in Weyssow et al. 2023
    decay: str = "linear"
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.0  # decay would pull a prefix or prompt away from the text it starts as
    clip: float = 1.0
    epochs: int = 5  # Weyssow et al. 2023; microsoft/LoRA examples/NLG
    examples: int = 16  # a step: 143 steps an epoch of CoNaLa, where four rows of 1024 tokens would make 26
    source: str = ""

    def settings(self) -> dict[str, Any]:
        """The fields of TrainConfig: TrainConfig(steps=..., **recipe("lora").settings())"""
        fields = asdict(self)
        return {name: value for name, value in fields.items() if name not in ("epochs", "examples", "source")}


def recipe(
    method: str, *, parameters: int = 0, family: str = "", init: str = "text", reparam: bool = False, gate: bool = False
) -> Recipe:
    """The default recipe of "full", "lora", "prefix" or "prompt" for a base of so many parameters.

    `family`: the config's model_type. `init`, `reparam` and `gate` matter to prefix and prompt alone.

    Raises:
        InputError: the method is not known.
    """
    if method == "full":
        return full_recipe(parameters, family)
    if method == "lora":
        if parameters < SMALL:
            return Recipe(1e-3, source="pilot: 1.63 nats at 1e-3, 1.72 at 3e-4")
        return Recipe(3e-4, source="Weyssow et al. 2023, LoRA r16 at 7B")
    if method == "prefix":
        return prefix_recipe(init, reparam, gate)
    if method == "prompt":
        if reparam:
            return Recipe(1e-3, source="the prefix's with the same reparameterisation; not measured for a prompt")
        return Recipe(3e-2, source="pilot: 1.80 nats at 3e-2, 2.08 at Weyssow et al.'s 3e-3")
    raise InputError(f"{method!r} is not known (full, lora, prefix, prompt)", where="method")


def full_recipe(parameters: int, family: str) -> Recipe:
    """Full tuning: the larger the base, the smaller the rate."""
    if parameters < LARGE:
        return Recipe(5e-5, weight_decay=0.01, source="CodeXGLUE text-to-code; the rate also in Weyssow et al. 2023")
    if family == "mistral":
        said = "Mistral-7B diverges at rates that suit Llama (transformers issue 26498): a third of Llama's 1e-5"
        return Recipe(3e-6, warmup=0.1, source=said)
    return Recipe(1e-5, warmup=0.1, source="usual for 7B Llamas; a tenth of warm-up against divergence")


def prefix_recipe(init: str, reparam: bool, gate: bool) -> Recipe:
    """Prefix-tuning: what the rate has to do depends on the start."""
    if reparam:
        return Recipe(1e-3, source="pilot: text start and MLP, 1.67 nats in three seeds")
    if gate:
        return Recipe(5e-3, source="P-tuning v2 (Liu et al. 2022); not measured with a gate")
    if init == "peft":
        return Recipe(3e-2, source="Weyssow et al. 2023; the best of four rates, though 60 steps end at 2.86 nats")
    return Recipe(3e-2, source="text start, 300 steps: 1.63 nats at 3e-2, 1.71 at the 5e-3 of P-tuning v2")
