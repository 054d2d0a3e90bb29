"""The choice of the layer class for a LoRAConfig, made once when it is added; and LoRA with a bias on B.

plain, rsLoRA     LoRALinear        lora.py
lora_bias         LoRABiasLinear    here
dora              DoRALinear        dora.py
init="pissa", "olora"    ResidualLinear    pissa.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minipeft.adapters.dora import DoRALinear
from minipeft.adapters.lora import LoRAConfig, LoRALinear, Part, choose_ranks
from minipeft.adapters.method import Encoder
from minipeft.adapters.pissa import RESIDUAL, ResidualLinear
from minipeft.adapters.surgery import replace
from minipeft.adapters.trainable import check_trained_memory
from minipeft.errors import InputError
from minipeft.models import Decoder


class LoRABiasLinear(LoRALinear):
    """y = x W^T + b + s (dropout(x) A^T B^T + c): a trained bias c on B (PEFT's lora_bias), 0 at first."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, config: LoRAConfig):
        super().__init__(linear, rank, alpha, config)
        self.lora_bias = nn.Parameter(self.zeros(linear.weight.shape[0]))  # c [out]

    def part(self) -> Part:
        """The product's tensors, with b + s c for b."""
        added = self.scale * self.lora_bias  # [out]
        bias = added if self.bias is None else self.bias + added
        return super().part()._replace(bias=bias.to(self.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return self.product(x, *self.part(), dropout)  # [B, T, out]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, lora_bias"


def choose_layer_class(config: LoRAConfig) -> type[LoRALinear]:
    """Choose the class of the layers for this config."""
    if config.dora:
        return DoRALinear
    if config.init in RESIDUAL:
        return ResidualLinear
    return LoRABiasLinear if config.lora_bias else LoRALinear


def add_lora(model: Decoder, config: LoRAConfig, tokenizer: Encoder | None, generator: torch.Generator) -> list[str]:
    """Replace each targeted linear by a LoRALinear; returns their paths."""
    layers, planned = {}, choose_ranks(model, config)
    parameters = sum(rank * sum(model.get_parameter(f"{path}.weight").shape) for path, (rank, _) in planned.items())
    check_trained_memory(parameters, model.embedding.weight.device, "rank")
    for path, (rank, alpha) in planned.items():
        linear: nn.Linear = model.get_submodule(path)  # type: ignore[assignment]
        if config.init in RESIDUAL and rank > (limit := min(linear.weight.shape)):
            raise InputError(f"{rank} exceeds the {limit} singular values of {path!r}", where="rank")
        if config.init == "orthogonal" and rank % 2:
            raise InputError(
                f"{rank} is odd, and half of an orthogonal matrix's rows go to A and half to B", where="rank"
            )
        layers[path] = choose_layer_class(config)(linear, rank, alpha, config)
        if not linear.weight.is_meta:
            layers[path].initialize(config.init, generator)
    for path, layer in layers.items():
        replace(model, path, layer.train(model.training))
    return list(layers)
