"""LoRA: low-rank adaptation of linear layers (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models").

    h = W0 x + (alpha / r) B A x          their equation 3; A [r, in], B [out, r], W0 frozen

A starts random and B at zero, so at first nothing changes. A LoRALinear stands where the nn.Linear stood and adopts its
very Parameters: the names in state_dict() stay, ties stay, and removing it gives the model back as it was.

Variants, each a field of LoRAConfig (lora_variants.py chooses the layer):

    rslora            alpha / sqrt(r) for alpha / r: the update does not shrink as r grows (Kalajdzievski 2023, thm 3.2)
    dora              a trained length for each row of W + s B A (dora.py)
    init="pissa"      A and B start from W's largest singular values (pissa.py)
    lora_bias         B gets a bias: h = W0 x + s (B A x + b)

LoRA+ (Hayou et al. 2024) changes no layer, only the optimizer: B has a larger learning rate than A, 16 times in the
paper. That is TrainConfig(lr_multipliers={"lora_B": 16.0}).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from minipeft_kernels import BACKENDS, Call, Part, UnavailableBackend, choose_backend, lora_linears, make_lora_linear
from minipeft_kernels import RowGroups as RowGroups  # the bank's, as lora_rows: minipeft_kernels is imported here alone
from minipeft_kernels import lora_rows as lora_rows
from torch import Tensor, nn

from minipeft.adapters.method import Recipe
from minipeft.adapters.patterns import values_by_path
from minipeft.adapters.surgery import MergeReport, merge, restore
from minipeft.adapters.targets import Targets, check_targets, find_targets
from minipeft.adapters.trainable import TrainableModule
from minipeft.errors import InputError, check_fields, option
from minipeft.models import Decoder


class LoRALinear(TrainableModule):
    """y = x W^T + b + s (dropout(x) A^T) B^T, with W and b the very Parameters of the linear it replaces."""

    adopts_linear = True

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, config: LoRAConfig):
        super().__init__()
        out, width = linear.weight.shape
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Parameter(self.zeros(rank, width))  # [r, in]
        self.lora_B = nn.Parameter(self.zeros(out, rank))  # [out, r]
        self.rank, self.alpha, self.scale = rank, alpha, scale_of(config, rank, alpha)
        self.dropout, self.backend = config.dropout, config.backend
        self.bind()

    def bind(self) -> None:
        """Choose the function that computes the product on this device."""
        self.product = make_lora_linear(self.backend, self.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return self.product(x, self.weight, self.bias, self.lora_A, self.lora_B, self.scale, dropout)  # [B, T, out]

    def initialize(self, init: str, generator: torch.Generator) -> None:
        """B = 0, so nothing changes at first, and A random.

        "uniform": A ~ U(-1/sqrt(in), 1/sqrt(in)) (He et al. 2015 with a = sqrt(5), as HF PEFT).
        "gaussian": A ~ N(0, 1/r^2).
        """
        rank, width = self.lora_A.shape
        with torch.no_grad():
            if init == "gaussian":
                self.lora_A.copy_(torch.randn(rank, width, generator=generator) / rank)
            else:
                bound = width**-0.5
                self.lora_A.copy_(torch.rand(rank, width, generator=generator) * (2 * bound) - bound)

    def zeros(self, *shape: int) -> Tensor:
        """A float32 tensor on the weight's device."""
        return torch.zeros(shape, dtype=torch.float32, device=self.weight.device)

    def part(self) -> Part:
        """The tensors of the product: W, b, A, B and s. A variant overrides it."""
        return Part(self.weight, self.bias, self.lora_A, self.lora_B, self.scale)

    def together(self, x: Tensor, linears: Sequence[nn.Module]) -> tuple[Tensor, ...]:
        """Each linear of the same x: those with LoRA share one read of x and one dropout mask (q, k, v; gate, up)."""
        parts = [linear.part() for linear in linears if isinstance(linear, LoRALinear)]
        ys = iter(lora_linears(x, parts, dropout=self.dropout if self.training else 0.0, backend=self.backend))
        return tuple(next(ys) if isinstance(linear, LoRALinear) else linear(x) for linear in linears)

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """W + s B A and b in float32: a plain linear that computes the same. [out, in], [out]"""
        weight, bias, A, B, scale = self.part()
        return weight.float() + scale * (B.float() @ A.float()), None if bias is None else bias.float()

    def extra_repr(self) -> str:
        out, width = self.weight.shape
        given = f"rank={self.rank}, alpha={self.alpha:g}, scale={self.scale:g}, dropout={self.dropout:g}"
        return f"in={width}, out={out}, bias={self.bias is not None}, {given}"


@dataclass(frozen=True)
class LoRAConfig:
    """How much to add, and where (targets.py; patterns.py for rank_pattern and alpha_pattern)."""

    rank: int = option(16, "rank r of the update", least=1)
    alpha: float = option(32.0, "the update is scaled by alpha / rank", above=0)
    dropout: float = option(0.0, "dropout of the input of A", least=0, below=1)
    targets: Targets = option("all-linear", "linears to adapt: all-linear, default, names, or a regular expression")
    layers: tuple[int, ...] | None = option(None, "adapt these blocks only, counted from 0")
    rank_pattern: Mapping[str, int] = option(factory=dict, help="another rank for layers that match a pattern", least=1)
    alpha_pattern: Mapping[str, float] = option(
        factory=dict, help="another alpha for layers that match a pattern", above=0
    )
    rslora: bool = option(False, "scale by alpha / sqrt(rank) (rsLoRA)")
    dora: bool = option(False, "train a magnitude for each row of the weight (DoRA)")
    lora_bias: bool = option(False, "add a trained bias to B")
    init: str = option("uniform", "initialization of A and B", choices=("uniform", "gaussian", "pissa"))
    backend: str = option("auto", "kernel that computes the layer", choices=("auto", *BACKENDS))

    def __post_init__(self) -> None:
        check_fields(self)
        check_targets(self)
        if self.dropout and not 1 <= round(self.dropout * 65536) < 65536:
            problem = f"{self.dropout!r} is nearer to 0 or 1 than 1/65536, the mask's resolution"
            raise InputError(problem, where="dropout")
        chosen = [name for name in ("dora", "lora_bias") if getattr(self, name)] + ["pissa"] * (self.init == "pissa")
        if len(chosen) > 1:
            raise InputError(f"{' and '.join(chosen)} cannot be combined", where="LoRAConfig")


def scale_of(config: LoRAConfig, rank: int, alpha: float) -> float:
    """s: alpha / r, or rsLoRA's alpha / sqrt(r)."""
    return alpha / (math.sqrt(rank) if config.rslora else rank)


def plan(model: Decoder, config: LoRAConfig) -> dict[str, tuple[int, float]]:
    """The rank and alpha of each targeted linear, by path. Nothing is touched.

    Raises:
        InputError: a target, layer or pattern matches nothing.
    """
    paths = find_targets(model, config.targets, model.family.default_targets["lora"], config.layers)
    ranks = values_by_path(config.rank_pattern, paths, "rank_pattern")
    alphas = values_by_path(config.alpha_pattern, paths, "alpha_pattern")
    return {path: (ranks.get(path, config.rank), alphas.get(path, config.alpha)) for path in paths}


def find_backend(model: Decoder, config: LoRAConfig, tokens: int = 1024) -> str:
    """The backend of the kernel that a training pass over so many tokens takes here.

    Raises:
        InputError: the backend that the config names cannot run here, with the reason.
    """
    path, (rank, _) = next(iter(plan(model, config).items()))
    weight: Tensor = model.get_submodule(path).weight  # type: ignore[assignment]
    out, width = weight.shape
    call = Call(weight.device, weight.dtype, tokens, width, out, rank, config.dropout > 0, needs_grad=True)
    try:
        return choose_backend(config.backend, call)
    except UnavailableBackend as error:
        raise InputError(str(error), where="backend") from error


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's LoRALinears by path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def remove_lora(model: nn.Module) -> None:
    """Put the plain linears back."""
    restore(model, lora_layers(model))


def merge_lora(model: nn.Module) -> MergeReport:
    """W <- W + s B A (DoRA: times m / ||.||); the model is plain afterwards."""
    return merge(model, lora_layers(model))


def lora_recipe(config: LoRAConfig, parameters: int, family: str) -> Recipe:
    """LoRA's default training: a smaller learning rate from a billion parameters on.

    "Pilot": the held-out loss on CoNaLa after 60 steps of 4 examples with a 135M Llama, 3.31 nats without training.
    """
    if parameters < 1_000_000_000:
        return Recipe(1e-3, source="pilot: 1.63 nats at 1e-3, 1.72 at 3e-4")
    return Recipe(3e-4, source="Weyssow et al. 2023, LoRA r16 at 7B")
