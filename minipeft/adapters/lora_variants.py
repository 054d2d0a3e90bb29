"""The choice of the layer class for a LoRAConfig, made once when it is added; and LoRA with a bias on B.

plain, rsLoRA     LoRALinear        lora.py
lora_bias         LoRABiasLinear    here
dora              DoRALinear        dora.py
init="pissa", "olora"    ResidualLinear    pissa.py
an embedding      LoRAEmbedding     embedding.py
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from minipeft.adapters.dora import DoRALinear
from minipeft.adapters.embedding import LoRAEmbedding, add_rows, plan_rows
from minipeft.adapters.lora import LoRAConfig, LoRALinear, Part, choose_ranks, compute_scale
from minipeft.adapters.method import Encoder
from minipeft.adapters.pissa import RESIDUAL, ResidualLinear
from minipeft.adapters.saved_modules import add_saved, count_saved, plan_saved
from minipeft.adapters.surgery import replace
from minipeft.adapters.targets import list_embeddings
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
        own = self.used_bias()
        bias = added if own is None else own + added
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
    """Put a LoRALinear in the place of each targeted linear, a LoRAEmbedding in that of an embedding, and copies of the
    parts of the base that are trained with them; returns their paths.
    """
    planned = choose_ranks(model, config)
    rows = plan_rows(model, config.trainable_token_indices, config.head_token_indices)
    saved = plan_saved(model, config, planned)
    check_apart(planned, saved, rows)
    parameters = sum(rank * sum(model.get_parameter(f"{path}.weight").shape) for path, (rank, _) in planned.items())
    device = model.embedding.weight.device
    check_trained_memory(parameters, device, "rank")
    check_trained_memory(count_saved(model, config, saved), device, "modules_to_save")
    layers = {path: make_layer(model, path, config, *sizes) for path, sizes in planned.items()}
    for path, layer in layers.items():
        if not layer.weight.is_meta:
            layer.initialize(config.init, generator)
        replace(model, path, layer.train(model.training))
    added = add_rows(model, config.trainable_token_indices, config.head_token_indices)
    add_saved(model, config, saved)
    return [*layers, *added, *saved]


def make_layer(model: Decoder, path: str, config: LoRAConfig, rank: int, alpha: float) -> LoRALinear | LoRAEmbedding:
    """The layer for a target, before its initialization.

    Raises:
        InputError: the variant does not exist for an embedding, or the rank does not fit the init.
    """
    module: nn.Linear = model.get_submodule(path)  # type: ignore[assignment]
    if path in list_embeddings(model):
        if config.dora or config.lora_bias or config.init not in ("uniform", "gaussian"):
            problem = f"{path!r} is an embedding, which has no DoRA, lora_bias or init {config.init!r}"
            raise InputError(problem, where="targets")
        return LoRAEmbedding(module, rank, alpha, compute_scale(config, rank, alpha))  # type: ignore[arg-type]
    if config.init in RESIDUAL and rank > (limit := min(module.weight.shape)):
        raise InputError(f"{rank} exceeds the {limit} singular values of {path!r}", where="rank")
    if config.init == "orthogonal" and rank % 2:
        raise InputError(f"{rank} is odd, and half of an orthogonal matrix's rows go to A and half to B", where="rank")
    return choose_layer_class(config)(module, rank, alpha, config)


def check_apart(planned: Collection[str], saved: Collection[str], rows: Collection[str]) -> None:
    """Check that no table has both trained rows and another adapter.

    Raises:
        InputError: one has.
    """
    for path in rows:
        if path in planned or path in saved:
            other = "a target" if path in planned else "in modules_to_save"
            raise InputError(f"{path!r} is also {other}", where="trainable_token_indices")
