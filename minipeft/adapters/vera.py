"""VeRA: LoRA whose A and B are random, frozen and shared by all layers (Kopiczko et al. 2024, eq. 2).

    h = W0 x + b * (B (d * (A x)))          A [r, in] and B [out, r] frozen; b [out] and d [r] trained in each linear

A linear trains out + r parameters instead of LoRA's r (in + out), so that r may be large. There is one A and one B, as
wide as the widest linear; a narrower one uses the first columns of A and the first rows of B. Both are a function of
`projection_prng_key`, drawn as HF PEFT draws them. b starts at 0, so at first nothing changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.adapters.method import Encoder, Recipe
from minipeft.adapters.surgery import merge, replace, restore
from minipeft.adapters.targets import Targets, check_targets, find_targets
from minipeft.adapters.trainable import TrainableModule, check_trained_memory
from minipeft.adapters.verdict import MergeReport
from minipeft.errors import check_fields, option
from minipeft.models import Decoder
from minipeft.models.products import linear as base_product


@dataclass(frozen=True)
class VeRAConfig:
    """Size and seed of the shared matrices, and where they are used; `targets` and `layers` as in LoRAConfig."""

    rank: int = option(256, "rank r of the update", least=1)
    dropout: float = option(0.0, "dropout of the input of A", least=0, below=1)
    targets: Targets = option("default", "linears to adapt: all-linear, default, names, or a regular expression")
    layers: tuple[int, ...] | None = option(None, "adapt these blocks only, counted from 0")
    d_initial: float = option(0.1, "initial value of each entry of d")
    projection_prng_key: int = option(0, "seed of the frozen matrices", least=0)
    save_projection: bool = option(True, "store the frozen matrices in the adapter's file, beside their seed")

    def __post_init__(self) -> None:
        check_fields(self)
        check_targets(self)


class Projection(TrainableModule):
    """The frozen A and B, one pair for all layers; a function of the seed, and no part of a model's state_dict()."""

    A: Tensor
    B: Tensor

    def __init__(self, width: int, out: int, config: VeRAConfig, device: torch.device):
        super().__init__()
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        for name, shape in (("A", (config.rank, width)), ("B", (out, config.rank))):
            if device.type == "meta":
                drawn = torch.empty(shape, device=device)
            else:
                bound = math.sqrt(6 / shape[1])  # He et al. 2015
                drawn = torch.empty(shape).uniform_(-bound, bound, generator=generator).to(device)
            self.register_buffer(name, drawn, persistent=False)  # [r, widest in], [widest out, r]

    def extra_repr(self) -> str:
        return f"rank={self.A.shape[0]}, in={self.A.shape[1]}, out={self.B.shape[0]}"


class VeRALinear(TrainableModule):
    """y = x W^T + bias + b * ((d * (dropout(x) A^T)) B^T); W and bias are the linear's own Parameters."""

    adopts_linear = True

    def __init__(self, linear: nn.Linear, projection: Projection, config: VeRAConfig):
        super().__init__()
        out, device = linear.weight.shape[0], linear.weight.device
        self.weight, self.bias = linear.weight, linear.bias
        self.projection, self.dropout = projection, config.dropout
        self.vera_lambda_b = nn.Parameter(torch.zeros(out, device=device, dtype=torch.float32))  # b [out]
        d = torch.full((config.rank,), config.d_initial, device=device, dtype=torch.float32)
        self.vera_lambda_d = nn.Parameter(d)  # d [r]

    def matrices(self) -> tuple[Tensor, Tensor]:
        """This linear's part of the shared pair. A [r, in], B [out, r]"""
        out, width = self.weight.shape
        return self.projection.A[:, :width], self.projection.B[:out]

    def forward(self, x: Tensor) -> Tensor:
        A, B, b, d = (t.to(x.dtype) for t in (*self.matrices(), self.vera_lambda_b, self.vera_lambda_d))
        s = F.linear(F.dropout(x, self.dropout, self.training), A)  # [B, T, r]
        return base_product(x, self.weight, self.bias) + b * F.linear(d * s, B)  # [B, T, out]

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """W + diag(b) B diag(d) A and the bias, in float32. [out, in], [out]"""
        A, B = self.matrices()
        update = (self.vera_lambda_b[:, None] * B) @ (self.vera_lambda_d[:, None] * A)  # [out, in]
        return self.weight.float() + update, None if self.bias is None else self.bias.float()

    def extra_repr(self) -> str:
        out, width = self.weight.shape
        return f"in={width}, out={out}, bias={self.bias is not None}, dropout={self.dropout:g}"


def find_shapes(model: Decoder, config: VeRAConfig) -> dict[str, tuple[int, int]]:
    """Each targeted linear by path, with its shape (out, in); PEFT's default targets are LoRA's.

    Raises:
        InputError: a target or layer matches nothing.
    """
    paths = find_targets(model, config.targets, model.family.default_targets["lora"], config.layers)
    return {path: tuple(model.get_parameter(f"{path}.weight").shape) for path in paths}  # type: ignore[misc]


def add_vera(model: Decoder, config: VeRAConfig, tokenizer: Encoder | None, generator: torch.Generator) -> list[str]:
    """Replace each targeted linear by a VeRALinear; returns their paths."""
    shapes = find_shapes(model, config)
    out, width = (max(sizes) for sizes in zip(*shapes.values()))
    check_trained_memory(config.rank * (out + width), model.embedding.weight.device, "rank")
    projection = Projection(width, out, config, model.embedding.weight.device)
    for path in shapes:
        layer = VeRALinear(model.get_submodule(path), projection, config)  # type: ignore[arg-type]
        replace(model, path, layer.train(model.training))
    return list(shapes)


def find_vera_layers(model: nn.Module) -> dict[str, VeRALinear]:
    """Find the model's VeRALinears by path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, VeRALinear)}


def remove_vera(model: nn.Module) -> None:
    """Restore the plain linears."""
    restore(model, find_vera_layers(model))


def merge_vera(model: nn.Module) -> MergeReport:
    """W <- W + diag(b) B diag(d) A; the model is plain afterwards."""
    return merge(model, find_vera_layers(model))


def vera_recipe(config: VeRAConfig, parameters: int, family: str) -> Recipe:
    """VeRA's default training. Only scales are trained, so the learning rate is ten times LoRA's, as in the paper."""
    return Recipe(4e-3, warmup=0.1, source="ten times LoRA's learning rate (Kopiczko et al. 2024); not measured here")
