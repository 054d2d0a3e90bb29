"""Prompt tuning: P learned input vectors in front of the text (Lester et al. 2021).

    x = [prompt ; wte[ids]]          the prompt's columns are seen by every document of the row, and are cut off again

Default start: the embeddings of a task line. Then step 0 is exactly that text, written before every input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minipeft.adapters.lora import keep_float32
from minipeft.adapters.prefix import TASK_LINE, Encoder, check_booleans, check_learned, check_room, empty_slot, text_ids
from minipeft.adapters.reparam import Reparam, make_trunk
from minipeft.models import Decoder

INITS = ("text", "vocab", "normal")


@dataclass(frozen=True)
class PromptConfig:
    """How many vectors, how they start, and what they are made of while they train.

    init: "text" (embeddings of `text`, repeated or cut to `length` tokens), "vocab" (embeddings of random tokens),
    "normal" (N(0, 1), HF PEFT's default).
    """

    length: int = 20
    init: str = "text"
    text: str = TASK_LINE
    reparam: int | None = None  # width of the network that makes the vectors (reparam.py); None: a plain table
    windowed: bool = False  # whether a sliding window hides the columns, as HF's does

    def __post_init__(self) -> None:
        check_learned(self.length, self.init, INITS, self.reparam)
        check_booleans(self, ("windowed",))


class Prompt(nn.Module):
    """The learned vectors, put before a batch of embedded rows. With a network, `weight` is its fixed start."""

    def __init__(self, weight: Tensor, mlp: Reparam | None = None):
        super().__init__()
        self.mlp = mlp
        if mlp is None:
            self.weight = nn.Parameter(weight)  # [P, C]
        else:
            self.register_buffer("weight", weight)  # [P, C]

    def columns(self) -> Tensor:
        """The vectors, the network folded in. [P, C]"""
        return self.weight if self.mlp is None else self.weight + self.mlp()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.columns().to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)  # [B, P + T, C]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Prompt:
        """Stay float32 through casts of the model."""
        keep_float32(self, ("weight",), lambda: super(Prompt, self)._apply(fn, recurse))
        return self

    def extra_repr(self) -> str:
        return "columns={}, width={}".format(*self.weight.shape)


def add_prompt(
    model: Decoder, config: PromptConfig, tokenizer: Encoder | None, generator: torch.Generator
) -> list[str]:
    """Fill the model's prompt slot; returns the path of the module."""
    table, c = model.embedding.weight, model.config
    check_room(config.length, c.context)
    if table.is_meta or config.init == "normal":
        weight = torch.randn(config.length, table.shape[1], generator=generator).to(table.device)  # [P, C]
    else:
        if config.init == "text":
            ids = torch.tensor(text_ids(config.text, config.length, tokenizer, "prompt"))
        else:
            ids = torch.randint(table.shape[0], (config.length,), generator=generator)
        weight = table[ids.to(table.device)].detach().float().clone()  # [P, C]
    mlp = None
    if config.reparam is not None:
        mlp = Reparam(make_trunk(config.length, c.width, config.reparam, table.device, generator), c.width)
    model.prompt, model.virtual_tokens, model.windowed = Prompt(weight, mlp), config.length, config.windowed
    return ["prompt"]


def remove_prompt(model: Decoder) -> None:
    """Empty the slot."""
    empty_slot(model, "prompt")
    model.virtual_tokens, model.windowed = 0, False
