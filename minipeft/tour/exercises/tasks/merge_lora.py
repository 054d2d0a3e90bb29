"""Merge LoRA into the weight.

    W' = W + s B A          b' = b          a plain linear that computes the same as the layer in eval mode

`merged(self)` is a method of LoRALinear; it returns W' [out, in] and b' [out] (None without a bias), both in float32,
also where W is bfloat16: the sum is made in float32, and whoever stores it rounds once. `self.part()` gives what the
layer's product uses, as the tuple (weight, bias, A, B, scale); variants of LoRA override it, so take all five from
there. Nothing of the layer may change.
"""

from __future__ import annotations

import torch
from torch import nn

from minipeft.adapters.lora import LoRAConfig, LoRALinear
from minipeft.adapters.pissa import ResidualLinear
from minipeft.tour.exercises.judging import require, require_close, require_dtype
from minipeft.tour.exercises.record import Answer, Exercise

EXERCISE = Exercise(
    solution="minipeft.adapters.lora.LoRALinear.merged",
    hints=(
        "weight.float() is weight itself where it is float32: do not add in place.",
        "B [out, r] times A [r, in] is [out, in], as W.",
        "weight.float() + scale * (B.float() @ A.float()), and the bias in float32 or None.",
    ),
)


def make_layer(
    dtype: torch.dtype, bias: bool = True, kind: type[LoRALinear] = LoRALinear, init: str = "uniform"
) -> LoRALinear:
    """A layer whose A and B are away from their init."""
    torch.manual_seed(0)
    linear = nn.Linear(6, 5, bias=bias).to(dtype)
    layer = kind(linear, 2, 3.0, LoRAConfig(rank=2, alpha=3.0, init=init))
    layer.initialize(init, torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.lora_A.add_(torch.randn(2, 6))
        layer.lora_B.add_(torch.randn(5, 2))
    return layer


def check_same_output(merged: Answer) -> None:
    """A plain linear with W' and b' computes what the layer computes."""
    for bias in (True, False):
        layer = make_layer(torch.float32, bias)
        x = torch.randn(3, 6)
        with torch.no_grad():
            weight, own = merged(layer)
            require((own is None) == (not bias), "the bias is None exactly where the layer has none")
            require_close(nn.functional.linear(x, weight, own), layer(x), "the output of the merged linear", 1e-5)


def check_float32(merged: Answer) -> None:
    """With a bfloat16 base the sum is in float32: nothing is rounded to bfloat16."""
    layer = make_layer(torch.bfloat16)
    weight, bias = merged(layer)
    require_dtype(weight, torch.float32, "W'")
    require_dtype(bias, torch.float32, "b'")
    exact = layer.weight.double() + 1.5 * layer.lora_B.double() @ layer.lora_A.double()
    require_close(weight, exact, "W'", 1e-6)


def check_nothing_changes(merged: Answer) -> None:
    """The layer keeps its weight."""
    layer = make_layer(torch.float32)
    before = layer.weight.detach().clone()
    merged(layer)
    require_close(layer.weight, before, "the layer's weight afterwards", 0)


def check_variant(merged: Answer) -> None:
    """PiSSA's layer, whose part() holds another A and B, merges too."""
    layer = make_layer(torch.float32, True, ResidualLinear, "pissa")
    x = torch.randn(3, 6)
    with torch.no_grad():
        weight, bias = merged(layer)
        require_close(nn.functional.linear(x, weight, bias), layer(x), "the output of PiSSA's merged linear", 1e-4)
