"""LoRA: low-rank adaptation of linear layers (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models").

    h = W0 x + (alpha / r) B A x          their equation 3; A [r, in], B [out, r], W0 frozen

A starts random and B at zero, so at first nothing changes. A LoRALinear stands where the nn.Linear stood and adopts its
very Parameters: the names in state_dict() stay, ties stay, and removing it gives the model back as it was.

Variants, each a field of LoRAConfig:

    rslora            alpha / sqrt(r) for alpha / r: the update does not shrink as r grows (Kalajdzievski 2023, thm 3.2)
    dora              a trained length for each row of W + s B A (dora.py)
    init="pissa"      A and B start from W's largest singular values (pissa.py)
    lora_bias         B gets a bias: h = W0 x + s (B A x + b)

LoRA+ (Hayou et al. 2024) is not a change of the layer but of the rate: B learns faster than A, by 16 in the paper. That
is TrainConfig(lr_multipliers={"lora_B": 16.0}).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from minipeft_kernels import BACKENDS, Call, Part, UnavailableBackend, choose_backend, lora_linear, lora_linears
from minipeft_kernels import RowGroups as RowGroups  # the bank's, as lora_rows: minipeft_kernels is imported here alone
from minipeft_kernels import lora_rows as lora_rows
from torch import Tensor, nn

from minipeft.adapters.dora import row_norms
from minipeft.adapters.pissa import principal
from minipeft.adapters.surgery import MergeReport, Targets, by_pattern, keep_float32, merge, replace, restore, targeted
from minipeft.errors import InputError
from minipeft.models import Decoder

DEFAULT_TARGETS = {"gpt2": ("c_attn",), "llama": ("q_proj", "v_proj"), "mistral": ("q_proj", "v_proj")}  # as HF PEFT
INITS = ("uniform", "gaussian", "pissa")


@dataclass(frozen=True)
class LoRAConfig:
    """How much to add, and where.

    targets: "all-linear" (every linear of the blocks, not the head), "default" (HF PEFT's choice for the family), a
    list of names, each a module's own (`q_proj`) or the end of its path (`attn.c_proj`), or a regular expression over
    the whole path. rank_pattern, alpha_pattern: another rank or alpha for some of them (linears.by_pattern).
    backend: which implementation of the kernel: "auto", or one of minipeft_kernels.BACKENDS.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0  # of x, on its way into A
    targets: Targets = "all-linear"
    layers: tuple[int, ...] | None = None  # only these blocks; None: all
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    lora_bias: bool = False
    init: str = "uniform"
    backend: str = "auto"

    def __post_init__(self) -> None:
        check_rank(self.rank, "rank")
        check_alpha(self.alpha, "alpha")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise InputError(f"{self.dropout!r} must be in [0, 1)", where="dropout")
        if self.dropout and not 1 <= round(self.dropout * 65536) < 65536:
            raise InputError(
                f"{self.dropout!r} is nearer to 0 or 1 than 1/65536, the mask's resolution", where="dropout"
            )
        freeze_targets(self)
        for key, rank in self.rank_pattern.items():
            check_rank(rank, f"rank_pattern {key!r}")
        for key, alpha in self.alpha_pattern.items():
            check_alpha(alpha, f"alpha_pattern {key!r}")
        for name in ("rslora", "dora", "lora_bias"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{getattr(self, name)!r} must be true or false", where=name)
        if self.init not in INITS:
            raise InputError(f"{self.init!r} is not known ({', '.join(INITS)})", where="init")
        if self.backend not in ("auto", *BACKENDS):
            raise InputError(f"{self.backend!r} is not known (auto, {', '.join(BACKENDS)})", where="backend")
        chosen = [name for name in ("dora", "lora_bias") if getattr(self, name)] + ["pissa"] * (self.init == "pissa")
        if len(chosen) > 1:
            raise InputError(f"{' and '.join(chosen)} cannot be combined", where="LoRAConfig")


def check_rank(rank: object, where: str) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise InputError(f"{rank!r} must be an integer >= 1", where=where)


def check_alpha(alpha: object, where: str) -> None:
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha) or alpha <= 0:
        raise InputError(f"{alpha!r} must be a finite number > 0", where=where)


def freeze_targets(config: object) -> None:
    """Make a config's lists tuples, and refuse targets or layers that are none."""
    for name in ("targets", "layers"):
        if isinstance(getattr(config, name, None), list):
            object.__setattr__(config, name, tuple(getattr(config, name)))
    targets, layers = config.targets, getattr(config, "layers", None)  # type: ignore[attr-defined]
    if not targets or not isinstance(targets, (str, tuple)) or not all(isinstance(t, str) and t for t in targets):
        raise InputError(f"{targets!r} names no linear layer", where="targets")
    if layers is None:
        return
    if not isinstance(layers, tuple) or not layers or not all(type(n) is int for n in layers):
        raise InputError(f"{layers!r} must be a list of block numbers", where="layers")
    if isinstance(targets, str) and targets not in ("all-linear", "default"):
        raise InputError("cannot be combined with a regular expression, which names the layers itself", where="layers")


class LoRALinear(nn.Module):
    """y = x W^T + b + s (dropout(x) A^T) B^T, with W and b the very Parameters of the linear it replaces."""

    adopts_linear = True

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, config: LoRAConfig):
        super().__init__()
        out, width = linear.weight.shape
        device = linear.weight.device
        zeros = lambda *shape: nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device))
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = zeros(rank, width)  # [r, in]
        self.lora_B = zeros(out, rank)  # [out, r]
        self.lora_bias = zeros(out) if config.lora_bias else None  # [out]
        self.lora_magnitude_vector = zeros(out) if config.dora else None  # [out], DoRA's m
        pissa = config.init == "pissa"
        self.register_buffer("A0", torch.zeros_like(self.lora_A) if pissa else None, persistent=False)  # [r, in]
        self.register_buffer("B0", torch.zeros_like(self.lora_B) if pissa else None, persistent=False)  # [out, r]
        self.rank, self.alpha, self.dropout, self.backend = rank, alpha, config.dropout, config.backend
        self.scale = alpha / (math.sqrt(rank) if config.rslora else rank)

    def initialize(self, init: str, generator: torch.Generator) -> None:
        """B = 0, so nothing changes at first, and A random; or PiSSA's pair, twice.

        "uniform": A ~ U(-1/sqrt(in), 1/sqrt(in)) (He et al. 2015 with a = sqrt(5), as HF PEFT).
        "gaussian": A ~ N(0, 1/r^2).
        """
        rank, width = self.lora_A.shape
        with torch.no_grad():
            if init == "pissa":
                A, B = principal(self.weight, rank, self.scale)
                for mine, drawn in ((self.lora_A, A), (self.A0, A), (self.lora_B, B), (self.B0, B)):
                    mine.copy_(drawn)  # type: ignore[operator]
            elif init == "gaussian":
                self.lora_A.copy_(torch.randn(rank, width, generator=generator) / rank)
            else:
                bound = width**-0.5
                self.lora_A.copy_(torch.rand(rank, width, generator=generator) * (2 * bound) - bound)
            if self.lora_magnitude_vector is not None:
                self.lora_magnitude_vector.copy_(row_norms(self.weight, self.lora_A, self.lora_B, self.scale))

    def pair(self) -> tuple[Tensor, Tensor]:
        """A and B as they enter the product: with PiSSA the frozen start beside them, subtracted."""
        if self.A0 is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.A0]), torch.cat([self.lora_B, -self.B0], dim=1)  # type: ignore[operator,list-item]

    def part(self) -> Part:
        """What the kernel takes of this layer."""
        A, B = self.pair()
        bias: Tensor | None = self.bias
        if self.lora_bias is not None:
            added = self.scale * self.lora_bias  # [out]
            bias = (added if bias is None else bias + added).to(self.weight.dtype)
        return Part(self.weight, bias, A, B, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        part = self.part()
        if self.lora_magnitude_vector is None:
            return lora_linear(x, *part, dropout=dropout, backend=self.backend)  # [B, T, out]
        gain = self.lora_magnitude_vector / row_norms(self.weight, part.lora_A, part.lora_B, self.scale)  # [out]
        y = lora_linear(x, *part._replace(bias=None), dropout=dropout, backend=self.backend) * gain.to(
            x.dtype
        )  # [B, T, out]
        return y if self.bias is None else y + self.bias

    def together(self, x: Tensor, linears: Sequence[nn.Module]) -> tuple[Tensor, ...]:
        """Each linear of the same x: those with LoRA share one read of x and one dropout mask (q, k, v; gate, up)."""
        if self.lora_magnitude_vector is not None:
            return tuple(linear(x) for linear in linears)
        parts = [linear.part() for linear in linears if isinstance(linear, LoRALinear)]
        ys = iter(lora_linears(x, parts, dropout=self.dropout if self.training else 0.0, backend=self.backend))
        return tuple(next(ys) if isinstance(linear, LoRALinear) else linear(x) for linear in linears)

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """The weight and bias of a plain linear that computes the same, in float32. [out, in], [out]"""
        weight, bias, A, B, scale = self.part()
        whole = weight.float() + scale * (B.float() @ A.float())  # [out, in]
        if self.lora_magnitude_vector is not None:
            whole *= (self.lora_magnitude_vector / row_norms(weight, A, B, scale))[:, None]
        return whole, None if bias is None else bias.float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRALinear:
        """Keep what is trained float32 through model.to(bfloat16): nn.Module's one door for to(), half(), cuda()."""
        own = [*self._parameters, *self._buffers]
        names = [name for name in own if name not in ("weight", "bias") and getattr(self, name) is not None]
        keep_float32(self, names, lambda: super(LoRALinear, self)._apply(fn, recurse))
        return self

    def extra_repr(self) -> str:
        out, width = self.weight.shape
        variants = [("dora", self.lora_magnitude_vector), ("lora_bias", self.lora_bias), ("pissa", self.A0)]
        given = f"rank={self.rank}, alpha={self.alpha:g}, scale={self.scale:g}, dropout={self.dropout:g}"
        said = "".join(f", {name}" for name, tensor in variants if tensor is not None)
        return f"in={width}, out={out}, bias={self.bias is not None}, {given}{said}"


def plan(model: Decoder, config: LoRAConfig) -> dict[str, tuple[int, float]]:
    """The rank and alpha of each targeted linear, by path. Nothing is touched.

    Raises:
        InputError: a target, layer or pattern matches nothing.
    """
    paths = targeted(model, config.targets, DEFAULT_TARGETS, config.layers)
    ranks = by_pattern(config.rank_pattern, paths, "rank_pattern")
    alphas = by_pattern(config.alpha_pattern, paths, "alpha_pattern")
    return {path: (ranks.get(path, config.rank), alphas.get(path, config.alpha)) for path in paths}


def add_lora(model: Decoder, config: LoRAConfig, generator: torch.Generator) -> list[str]:
    """Put a LoRALinear in the place of each targeted linear; returns their paths."""
    layers = {}
    for path, (rank, alpha) in plan(model, config).items():
        linear = model.get_submodule(path)
        if config.init == "pissa" and rank > min(linear.weight.shape):  # type: ignore[arg-type]
            limit = min(linear.weight.shape)  # type: ignore[arg-type]
            raise InputError(f"{rank} exceeds the {limit} singular values of {path!r}", where="rank")
        layers[path] = LoRALinear(linear, rank, alpha, config)  # type: ignore[arg-type]
        if not linear.weight.is_meta:
            layers[path].initialize(config.init, generator)
    for path, layer in layers.items():
        replace(model, path, layer.train(model.training))
    return list(layers)


def kernel_backend(model: Decoder, config: LoRAConfig, tokens: int = 1024) -> str:
    """Which of the kernel's paths a training pass over so many tokens takes here.

    Raises:
        InputError: the path that the config names cannot run here, with the reason.
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
