"""Prompt tuning: P trained input vectors before the text (Lester et al. 2021).

    x = [prompt ; wte[ids]]          every document of the row sees the prompt; its outputs are dropped

Default init: the embeddings of a task description, so that the model starts as if that text stood before every input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minipeft.adapters.method import Encoder, Recipe
from minipeft.adapters.reparam import Reparam, make_hidden
from minipeft.adapters.trainable import TrainableModule
from minipeft.adapters.virtual import TASK_LINE, check_virtual_tokens, empty_slot, encode_to_length
from minipeft.errors import check_fields, option
from minipeft.models import Decoder
from minipeft.models.layout import check_rows


@dataclass(frozen=True)
class PromptConfig:
    """Number, init and parameterization of the virtual tokens.

    init: "text" (embeddings of `text`, repeated or cut to `length` tokens), "vocab" (embeddings of random tokens),
    "normal" (N(0, 1), HF PEFT's default).
    """

    length: int = option(20, "virtual tokens before each row", flag="virtual-tokens", least=1, limit=2**20)
    init: str = option("text", "initialization of the virtual tokens", choices=("text", "vocab", "normal"))
    text: str = option(TASK_LINE, "text of the text init")
    reparam: int | None = option(None, "width of a reparameterization MLP", flag="reparam-width", least=1, limit=2**20)
    windowed: bool = option(False, "let a sliding window hide the virtual tokens, as HF does")

    def __post_init__(self) -> None:
        check_fields(self)


class Prompt(TrainableModule):
    """Trained vectors before a batch of embedded rows. With an MLP, `weight` is their fixed init."""

    def __init__(self, weight: Tensor, mlp: Reparam | None = None):
        super().__init__()
        self.mlp = mlp
        if mlp is None:
            self.weight = nn.Parameter(weight)  # [P, C]
        else:
            self.register_buffer("weight", weight)  # [P, C]

    def vectors(self) -> Tensor:
        """The vectors, with the MLP's output added. [P, C]"""
        return self.weight if self.mlp is None else self.weight + self.mlp()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.vectors().to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)  # [B, P + T, C]

    def extra_repr(self) -> str:
        return "virtual_tokens={}, width={}".format(*self.weight.shape)


def add_prompt(
    model: Decoder, config: PromptConfig, tokenizer: Encoder | None, generator: torch.Generator
) -> list[str]:
    """Fill the model's prompt slot; returns the path of the module."""
    table, c = model.embedding.weight, model.config
    check_virtual_tokens(config.length, c.context)
    if table.is_meta or config.init == "normal":
        weight = torch.randn(config.length, table.shape[1], generator=generator).to(table.device)  # [P, C]
    else:
        if config.init == "text":
            ids = torch.tensor(encode_to_length(config.text, config.length, tokenizer, "prompt"))
            check_rows(c.vocab_size, ids[None])
        else:
            ids = torch.randint(table.shape[0], (config.length,), generator=generator)
        weight = model.look_up(ids.to(table.device)).detach().float().clone()  # [P, C]
    mlp = None
    if config.reparam is not None:
        mlp = Reparam(make_hidden(config.length, c.width, config.reparam, c.width, table.device, generator), c.width)
    model.prompt, model.virtual_tokens, model.windowed = Prompt(weight, mlp), config.length, config.windowed
    return ["prompt"]


def remove_prompt(model: Decoder) -> None:
    """Empty the slot."""
    empty_slot(model, "prompt")
    model.virtual_tokens, model.windowed = 0, False


def prompt_recipe(config: PromptConfig, parameters: int, family: str) -> Recipe:
    """A prompt's default training; the pilot is LoRA's (lora.py)."""
    if config.reparam is not None:
        return Recipe(1e-3, source="the prefix's with the same reparameterization; not measured for a prompt")
    return Recipe(3e-2, source="pilot: 1.80 nats at 3e-2, 2.08 at Weyssow et al.'s 3e-3")
