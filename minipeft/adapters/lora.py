"""LoRA: low-rank adaptation of linear layers (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models").

    h = W0 x + (alpha / r) B A x          their equation 3; A [r, in], B [out, r], W0 frozen

A starts random and B at zero, so at first nothing changes. A LoRALinear stands where the nn.Linear stood and adopts its
very Parameters: the names in state_dict() stay, ties stay, and removing it gives the model back as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.errors import InputError
from minipeft.models import Decoder

DEFAULT_TARGETS = {"gpt2": ("c_attn",), "llama": ("q_proj", "v_proj"), "mistral": ("q_proj", "v_proj")}  # as HF PEFT


@dataclass(frozen=True)
class LoRAConfig:
    """How much to add, and where.

    targets: "all-linear" (every linear of the blocks, not the head), "default" (HF PEFT's choice for the family), or
    names of linears: each is a module's own name (`q_proj`) or the end of its path (`attn.c_proj`).
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0  # of x, on its way into A
    targets: str | tuple[str, ...] = "all-linear"

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise InputError(f"{self.rank!r} must be an integer >= 1", where="rank")
        if isinstance(self.alpha, (bool, str)) or not math.isfinite(self.alpha) or self.alpha <= 0:
            raise InputError(f"{self.alpha!r} must be a finite number > 0", where="alpha")
        if isinstance(self.dropout, (bool, str)) or not 0 <= self.dropout < 1:
            raise InputError(f"{self.dropout!r} must be in [0, 1)", where="dropout")
        if isinstance(self.targets, list):
            object.__setattr__(self, "targets", tuple(self.targets))
        if not self.targets:
            raise InputError("names no linear layer", where="targets")


class LoRALinear(nn.Module):
    """y = x W^T + b + scale * (dropout(x) A^T) B^T, with W and b the very Parameters of the linear it replaces."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        out, width = linear.weight.shape
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Parameter(torch.empty(rank, width, device=self.weight.device))  # [r, in]
        self.lora_B = nn.Parameter(torch.zeros(out, rank, device=self.weight.device))  # [out, r]
        self.rank, self.alpha, self.dropout = rank, alpha, dropout

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def initialize(self, generator: torch.Generator) -> None:
        """A ~ U(-1/sqrt(in), 1/sqrt(in)) (He et al. 2015 with a = sqrt(5), as HF PEFT), B = 0: a no-op at first."""
        bound = self.lora_A.shape[1] ** -0.5
        drawn = torch.rand(self.lora_A.shape, generator=generator) * (2 * bound) - bound
        with torch.no_grad():
            self.lora_A.copy_(drawn)
            self.lora_B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)  # float32 masters, computed in the base's dtype
        s = F.linear(F.dropout(x, self.dropout, self.training), A)  # [B, T, r]
        return F.linear(x, self.weight, self.bias) + self.scale * F.linear(s, B)  # [B, T, out]

    def update(self) -> Tensor:
        """scale * B A in float32: what merging adds to the weight. [out, in]"""
        return self.scale * (self.lora_B.float() @ self.lora_A.float())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRALinear:
        """Keep A and B float32 through model.to(bfloat16): nn.Module's one door for to(), half(), cuda()."""
        keep_float32(self, ("lora_A", "lora_B"), lambda: super(LoRALinear, self)._apply(fn, recurse))
        return self

    def extra_repr(self) -> str:
        out, width = self.weight.shape
        given = f"rank={self.rank}, alpha={self.alpha:g}, dropout={self.dropout:g}"
        return f"in={width}, out={out}, bias={self.bias is not None}, {given}"


def keep_float32(module: nn.Module, names: tuple[str, ...], apply: Callable[[], nn.Module]) -> None:
    """Run `apply`, a move or cast of the module's tensors; then undo the cast of the named Parameters, not the move."""
    kept = {name: getattr(module, name).detach() for name in names}
    apply()
    for name, tensor in kept.items():
        parameter = getattr(module, name)
        if parameter.dtype != tensor.dtype:
            parameter.data = tensor.to(parameter.device)


def targeted(model: Decoder, targets: str | tuple[str, ...]) -> list[str]:
    """The paths of the linears that `targets` names, in the model's order.

    Raises:
        InputError: a name matches nothing, with the names that would.
    """
    head = "lm_head"
    linears = [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, LoRALinear)) and name != head]
    if targets == "all-linear":
        return linears
    if targets == "default":
        targets = DEFAULT_TARGETS[model.config.model_type]
    wanted = (targets,) if isinstance(targets, str) else targets
    chosen = {}
    for target in wanted:
        matched = [name for name in linears if name == target or name.endswith("." + target)]
        if not matched:
            known = sorted({name.rsplit(".", 1)[-1] for name in linears})
            raise InputError(f"no linear layer is named {target!r}; this model has {known}", where="targets")
        chosen.update(dict.fromkeys(matched))
    return [name for name in linears if name in chosen]


def add_lora(model: Decoder, config: LoRAConfig, generator: torch.Generator) -> list[str]:
    """Put a LoRALinear in the place of each targeted linear; returns their paths."""
    names = targeted(model, config.targets)
    for name in names:
        layer = LoRALinear(model.get_submodule(name), config.rank, config.alpha, config.dropout)  # type: ignore[arg-type]
        if not layer.lora_A.is_meta:
            layer.initialize(generator)
        replace(model, name, layer.train(model.training))
    return names


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at the path `name`."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's LoRALinears by path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def remove_lora(model: nn.Module) -> None:
    """Put a plain nn.Linear with the same Parameters in the place of each LoRALinear.

    A new one: the linear that was replaced may hold an old weight, if the model has been loaded again since.
    """
    for name, layer in lora_layers(model).items():
        out, width = layer.weight.shape
        linear = nn.Linear(width, out, bias=layer.bias is not None, device="meta")
        linear.weight, linear.bias = layer.weight, layer.bias
        replace(model, name, linear.train(model.training))


@dataclass(frozen=True)
class MergeReport:
    """What merging did: how many weights, the largest change of one, and how much of the update rounding took away."""

    modules: int
    largest_change: float
    relative_error: float  # |W_new - W_old - update| / |update|, over all modules: the rounding to the weight's dtype


def merge_lora(model: nn.Module) -> MergeReport:
    """W <- W + scale * B A, summed in float32 and rounded once to W's dtype; the model is plain afterwards.

    Raises:
        InputError: a targeted weight is also another's (tied), or a merged weight would not be finite; nothing is
            touched then.
    """
    layers = lora_layers(model)
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    for name, layer in layers.items():
        others = [other for other in names[id(layer.weight)] if other != f"{name}.weight"]
        if others:
            raise InputError(f"cannot merge into {name!r}: its weight is also {others}", hint="Untie it first")
        if not torch.isfinite(layer.weight.float() + layer.update()).all():
            raise InputError(f"cannot merge into {name!r}: the merged weight would not be finite")
    largest, missed, whole = 0.0, 0.0, 0.0
    with torch.no_grad():
        for layer in layers.values():
            before, update = layer.weight.float(), layer.update()
            layer.weight.copy_(before + update)
            change = layer.weight.float() - before
            largest = max(largest, change.abs().max().item())
            missed += (change - update).square().sum().item()
            whole += update.square().sum().item()
    remove_lora(model)
    return MergeReport(len(layers), largest, math.sqrt(missed / whole) if whole else 0.0)
