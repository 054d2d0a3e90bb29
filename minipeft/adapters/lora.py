"""LoRA: low-rank adaptation of linear layers (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models").

    h = W0 x + (alpha / r) B A x          their equation 3; A [r, in], B [out, r], W0 frozen

A starts random and B at zero, so at first nothing changes. A LoRALinear replaces the nn.Linear and holds the linear's
own Parameters: names in state_dict() and ties do not change, and removing it restores the model.

Variants, each a field of LoRAConfig (lora_variants.py chooses the layer):

    rslora            alpha / sqrt(r) for alpha / r: the update does not shrink as r grows (Kalajdzievski 2023, thm 3.2)
    dora              a trained length for each row of W + s B A (dora.py)
    init="pissa"      A and B start from W's largest singular values (pissa.py)
    init="olora"      A and B start from W's QR decomposition (pissa.py)
    lora_bias         B gets a bias: h = W0 x + s (B A x + b)
    bias              the base's biases are trained too: of the targets, or all (saved_modules.py)

An embedding and the head can be targets by name (embedding.py). Parts of the base that are trained whole beside the
adapter are modules_to_save, vocabulary (saved_modules.py), trainable_token_indices, head_token_indices (embedding.py).

LoRA+ (Hayou et al. 2024) changes no layer, only the optimizer: B has a larger learning rate than A, 16 times in the
paper. That is TrainConfig(lr_multipliers={"lora_B": 16.0}).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from minipeft_kernels import (
    BACKENDS,
    Call,
    Part,
    UnavailableBackend,
    choose_backend,
    make_lora_linear,
    make_lora_linears,
)
from minipeft_kernels import RowGroups as RowGroups  # for the bank: adapters/ imports minipeft_kernels here alone
from minipeft_kernels import group_rows as group_rows
from minipeft_kernels import lora_rows as lora_rows
from minipeft_kernels import make_dropout as make_dropout  # for the tour
from minipeft_kernels import make_keep_mask as make_keep_mask
from torch import Tensor, nn

from minipeft.adapters.embedding import find_table_layers
from minipeft.adapters.method import Recipe
from minipeft.adapters.patterns import match_values
from minipeft.adapters.saved_modules import BIASES, find_saved_modules
from minipeft.adapters.surgery import merge, restore
from minipeft.adapters.targets import Targets, check_targets, find_targets, list_embeddings
from minipeft.adapters.trainable import TrainableModule
from minipeft.adapters.verdict import MergeReport
from minipeft.errors import InputError, check_fields, option
from minipeft.models import Decoder

INITS = ("uniform", "gaussian", "orthogonal", "pissa", "olora")


class LoRALinear(TrainableModule):
    """y = x W^T + b + s (dropout(x) A^T) B^T; W and b are the Parameters of the linear that it replaces."""

    adopts_linear = True
    trained_bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, config: LoRAConfig):
        super().__init__()
        out, width = linear.weight.shape
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Parameter(self.zeros(rank, width))  # [r, in]
        self.lora_B = nn.Parameter(self.zeros(out, rank))  # [out, r]
        self.rank, self.alpha, self.scale = rank, alpha, compute_scale(config, rank, alpha)
        self.dropout, self.backend = config.dropout, config.backend
        self.register_parameter("trained_bias", None)
        if config.bias != "none" and linear.bias is not None:
            self.trained_bias = nn.Parameter(linear.bias.detach().to(torch.float32, copy=True))  # [out]
        self.bind()

    def bind(self) -> None:
        """Choose the functions that compute the layer on this device: alone, and with layers that share its x."""
        self.product = make_lora_linear(self.backend, self.weight.device)
        self.products = make_lora_linears(self.backend, self.weight.device)

    def used_bias(self) -> Tensor | None:
        """b, or the copy of it that is trained. [out]"""
        return self.bias if self.trained_bias is None else self.trained_bias.to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        bias = self.used_bias()
        return self.product(x, self.weight, bias, self.lora_A, self.lora_B, self.scale, dropout)  # [B, T, out]

    def initialize(self, init: str, generator: torch.Generator) -> None:
        """B A = 0, so nothing changes at first: B = 0 and A random, or both random and orthogonal to each other.

        "uniform": A ~ U(-1/sqrt(in), 1/sqrt(in)) (He et al. 2015 with a = sqrt(5), as HF PEFT).
        "gaussian": A ~ N(0, 1/r^2).
        "orthogonal": A = Q_1^T N_1 / 10, B = N_2^T Q_2 / 10 with Q_1 the rows 0, 2, ... and Q_2 the rows 1, 3, ... of
        an orthogonal matrix, N ~ N(0, 1), so that B A = N_2^T Q_2 Q_1^T N_1 / 100 = 0 (as HF PEFT).
        """
        rank, width = self.lora_A.shape
        with torch.no_grad():
            if init == "orthogonal":
                Q, _ = torch.linalg.qr(torch.randn(rank, rank, generator=generator))  # [r, r]
                half = lambda size: torch.randn(rank // 2, size, generator=generator) / 10
                self.lora_A.copy_(Q[0::2].t() @ half(width))
                self.lora_B.copy_(half(len(self.lora_B)).t() @ Q[1::2])
            elif init == "gaussian":
                self.lora_A.copy_(torch.randn(rank, width, generator=generator) / rank)
            else:
                bound = width**-0.5
                self.lora_A.copy_(torch.rand(rank, width, generator=generator) * (2 * bound) - bound)

    def zeros(self, *shape: int) -> Tensor:
        """A float32 tensor on the weight's device."""
        return torch.zeros(shape, dtype=torch.float32, device=self.weight.device)

    def part(self) -> Part:
        """The tensors of the product: W, b, A, B and s. Variants override it."""
        return Part(self.weight, self.used_bias(), self.lora_A, self.lora_B, self.scale)

    def together(self, x: Tensor, linears: Sequence[nn.Module]) -> tuple[Tensor, ...]:
        """Apply several linears to x (q, k, v; gate, up); those with LoRA share one read of x and one dropout mask."""
        parts = [linear.part() for linear in linears if isinstance(linear, LoRALinear)]
        ys = iter(self.products(x, parts, self.dropout if self.training else 0.0))
        return tuple(next(ys) if isinstance(linear, LoRALinear) else linear(x) for linear in linears)

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """W + s B A and b in float32: a plain linear that computes the same. [out, in], [out]"""
        weight, bias, A, B, scale = self.part()
        return weight.float() + scale * (B.float() @ A.float()), None if bias is None else bias.float()

    def extra_repr(self) -> str:
        out, width = self.weight.shape
        given = f"rank={self.rank}, alpha={self.alpha:g}, scale={self.scale:g}, dropout={self.dropout:g}"
        trained = "" if self.trained_bias is None else ", trained bias"
        return f"in={width}, out={out}, bias={self.bias is not None}, {given}{trained}"


@dataclass(frozen=True)
class LoRAConfig:
    """Rank, scale and targets (targets.py; patterns.py for rank_pattern and alpha_pattern)."""

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
    init: str = option("uniform", "initialization of A and B", choices=INITS)
    bias: str = option("none", "biases of the base that are trained", choices=BIASES)
    modules_to_save: tuple[str, ...] = option((), "module of the base to train whole, by name: lm_head, norm")
    vocabulary: int | None = option(None, "resize the vocabulary; embedding and head are trained whole", least=1)
    trainable_token_indices: tuple[int, ...] = option((), "rows of the embedding to train (and of a tied head)")
    head_token_indices: tuple[int, ...] = option((), "rows of the head to train")
    backend: str = option("auto", "kernel that computes the layer", choices=("auto", *BACKENDS))

    def __post_init__(self) -> None:
        check_fields(self)
        check_targets(self)
        if self.vocabulary is not None and (self.trainable_token_indices or self.head_token_indices):
            raise InputError("trains whole tables, so that no rows can be named", where="vocabulary")
        if self.dropout and not 1 <= round(self.dropout * 65536) < 65536:
            problem = f"{self.dropout!r} is nearer to 0 or 1 than 1/65536, the mask's resolution"
            raise InputError(problem, where="dropout")
        chosen = [name for name in ("dora", "lora_bias") if getattr(self, name)]
        chosen += [self.init] * (self.init in ("pissa", "olora"))
        if len(chosen) > 1:
            raise InputError(f"{' and '.join(chosen)} cannot be combined", where="LoRAConfig")

    @property
    def is_plain(self) -> bool:
        """Whether the update of each target is s B A and nothing else is trained."""
        parts = (self.dora, self.lora_bias, self.bias != "none", self.modules_to_save, self.vocabulary,
                 self.trainable_token_indices, self.head_token_indices)  # fmt: skip
        return not any(parts)


def compute_scale(config: LoRAConfig, rank: int, alpha: float) -> float:
    """s: alpha / r, or rsLoRA's alpha / sqrt(r)."""
    return alpha / (math.sqrt(rank) if config.rslora else rank)


def choose_ranks(model: Decoder, config: LoRAConfig) -> dict[str, tuple[int, float]]:
    """The rank and alpha of each targeted linear or embedding, by path. Nothing is touched.

    Raises:
        InputError: a target, layer or pattern matches nothing.
    """
    paths = find_targets(model, config.targets, model.family.default_targets["lora"], config.layers, tables=True)
    ranks = match_values(config.rank_pattern, paths, "rank_pattern")
    alphas = match_values(config.alpha_pattern, paths, "alpha_pattern")
    return {path: (ranks.get(path, config.rank), alphas.get(path, config.alpha)) for path in paths}


def find_backend(model: Decoder, config: LoRAConfig, tokens: int = 1024) -> str:
    """Return the backend of a training pass over `tokens` tokens on this device.

    Raises:
        InputError: the backend that the config names cannot run here; the message gives the reason.
    """
    planned = choose_ranks(model, config)
    path, (rank, _) = next((item for item in planned.items() if item[0] not in list_embeddings(model)), (None, (0, 0)))
    if path is None:
        return "reference"
    weight: Tensor = model.get_submodule(path).weight  # type: ignore[assignment]
    out, width = weight.shape
    call = Call(weight.device, weight.dtype, tokens, width, out, rank, config.dropout > 0, needs_grad=True)
    try:
        return choose_backend(config.backend, call)
    except UnavailableBackend as error:
        raise InputError(str(error), where="backend") from error


def find_lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Find the model's LoRALinears by path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def find_all_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every module that the adapter has put in the place of one of the base, in the model's order."""
    found = {**find_lora_layers(model), **find_table_layers(model), **find_saved_modules(model)}
    return {path: found[path] for path, _ in model.named_modules() if path in found}


def remove_lora(model: Decoder) -> None:
    """Put the plain modules back."""
    restore(model, find_all_layers(model))
    if len(model.embedding.weight) != model.config.vocab_size:
        model.config = dataclasses.replace(model.config, vocab_size=len(model.embedding.weight))


def merge_lora(model: nn.Module) -> MergeReport:
    """W <- W + s B A (DoRA: times m / ||.||), and the trained parts of the base; the model is plain afterwards."""
    return merge(model, find_all_layers(model))


def lora_recipe(config: LoRAConfig, parameters: int, family: str) -> Recipe:
    """LoRA's default training: a smaller learning rate from a billion parameters on.

    "Pilot": the held-out loss on CoNaLa after 60 steps of 4 examples with a 135M Llama, 3.31 nats without training.
    """
    if parameters < 1_000_000_000:
        return Recipe(1e-3, source="pilot: 1.63 nats at 1e-3, 1.72 at 3e-4")
    return Recipe(3e-4, source="Weyssow et al. 2023, LoRA r16 at 7B")
