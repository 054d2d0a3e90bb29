"""(IA)3: trained scales on keys, values and the inner activations of the MLP (Liu et al. 2022, arXiv:2205.05638).

    k = l_k * (x W_k^T + b),   v = l_v * (x W_v^T + b),   y = (l_ff * h) W_down^T + b       their section 3.3

One scale for each output of W_k and W_v and for each input of W_down: far fewer parameters than LoRA's. All start at 1,
so at first nothing changes. GPT-2's keys and values come from one linear with the queries, so its l has 3C entries, as
in HF PEFT.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minipeft.adapters.method import Encoder, Recipe
from minipeft.adapters.surgery import merge, replace, restore
from minipeft.adapters.targets import Targets, check_targets, find_targets
from minipeft.adapters.trainable import TrainableModule
from minipeft.adapters.verdict import MergeReport
from minipeft.errors import InputError, check_fields, option
from minipeft.models import Decoder
from minipeft.models.products import linear as base_product


@dataclass(frozen=True)
class IA3Config:
    """Where to scale: `targets` as in LoRAConfig; those that `feedforward` names too are scaled at their input."""

    targets: Targets = option("default", "linears to scale: all-linear, default, names, or a regular expression")
    feedforward: Targets = option("default", "of the targets, those that are scaled at their input; empty for none")

    def __post_init__(self) -> None:
        check_fields(self)
        check_targets(self)


class IA3Linear(TrainableModule):
    """y = l * (x W^T + b), or y = (l * x) W^T + b; W and b are the replaced linear's Parameters."""

    adopts_linear = True

    def __init__(self, linear: nn.Linear, feedforward: bool):
        super().__init__()
        out, width = linear.weight.shape
        self.weight, self.bias = linear.weight, linear.bias
        count = width if feedforward else out
        self.ia3_l = nn.Parameter(torch.ones(count, dtype=torch.float32, device=linear.weight.device))  # [in] or [out]
        self.feedforward = feedforward

    def forward(self, x: Tensor) -> Tensor:
        scale = self.ia3_l.to(x.dtype)
        if self.feedforward:
            return base_product(x * scale, self.weight, self.bias)  # [B, T, out]
        return base_product(x, self.weight, self.bias) * scale  # [B, T, out]

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """The weight and bias of a plain linear that computes the same, in float32. [out, in], [out]"""
        bias = None if self.bias is None else self.bias.float()
        if self.feedforward:
            return self.weight.float() * self.ia3_l, bias
        return self.weight.float() * self.ia3_l[:, None], None if bias is None else bias * self.ia3_l

    def extra_repr(self) -> str:
        out, width = self.weight.shape
        return f"in={width}, out={out}, bias={self.bias is not None}, feedforward={self.feedforward}"


def find_scaled(model: Decoder, config: IA3Config) -> dict[str, bool]:
    """Each targeted linear by path, and whether it is scaled at its input.

    Raises:
        InputError: a name matches nothing, or `feedforward` names what `targets` does not.
    """
    default = model.family.default_targets
    paths = find_targets(model, config.targets, default["ia3"])
    inner = find_targets(model, config.feedforward, default["ia3_feedforward"]) if config.feedforward else []
    for path in inner:
        if path not in paths and config.feedforward != "default":
            raise InputError(f"{path!r} is not among the targets", where="feedforward")
    return {path: path in inner for path in paths}


def add_ia3(model: Decoder, config: IA3Config, tokenizer: Encoder | None, generator: torch.Generator) -> list[str]:
    """Replace each targeted linear by an IA3Linear; returns their paths."""
    planned = find_scaled(model, config)
    for path, feedforward in planned.items():
        layer = IA3Linear(model.get_submodule(path), feedforward)  # type: ignore[arg-type]
        replace(model, path, layer.train(model.training))
    return list(planned)


def find_ia3_layers(model: nn.Module) -> dict[str, IA3Linear]:
    """Find the model's IA3Linears by path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, IA3Linear)}


def remove_ia3(model: nn.Module) -> None:
    """Restore the plain linears."""
    restore(model, find_ia3_layers(model))


def merge_ia3(model: nn.Module) -> MergeReport:
    """Merge the scales into the weights; the model is plain afterwards."""
    return merge(model, find_ia3_layers(model))


def ia3_recipe(config: IA3Config, parameters: int, family: str) -> Recipe:
    """(IA)3's default training: the paper's learning rate, which it used with Adafactor (section 3.4)."""
    return Recipe(3e-3, source="Liu et al. 2022 (T-Few), with Adafactor; not measured here with AdamW")
