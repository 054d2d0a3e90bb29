"""LN-tuning: the gains and biases of the norms are trained, all else is frozen (Qi et al. 2022; Zhao et al. 2023).

    LayerNorm    y = g * (x - mean(x)) / sqrt(var(x) + eps) + b        g, b [C] trained
    RMSNorm      y = g * x / sqrt(mean(x^2) + eps)                     g [C] trained

The trained g and b are float32 copies, so that removing the adapter restores the base; at first they are equal. Merging
writes them into the base, and a float32 base holds them exactly. A bfloat16 base computes with their rounded values: a
gain between 1 and 2 then changes in steps of 2^-7.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from minipeft.adapters.method import Encoder, Recipe
from minipeft.adapters.patterns import match_paths
from minipeft.adapters.saved_modules import SavedModule, find_saved_modules, list_leaves
from minipeft.adapters.surgery import merge, replace, restore
from minipeft.adapters.targets import Targets, is_named
from minipeft.adapters.verdict import MergeReport
from minipeft.errors import InputError, check_fields, option
from minipeft.models import Decoder


@dataclass(frozen=True)
class LNTuningConfig:
    """Which norms are trained."""

    targets: Targets = option("default", "norms to train: default, names, or a regular expression")

    def __post_init__(self) -> None:
        check_fields(self)
        if (
            not self.targets
            or self.targets == "all-linear"
            or (isinstance(self.targets, tuple) and not all(self.targets))
        ):
            raise InputError(f"{self.targets!r} names no norm", where="targets")


def list_norms(model: nn.Module) -> list[str]:
    """The paths of the norms: modules without submodules whose weight is a vector."""
    weights = {path: m._parameters.get("weight") for path, m in list_leaves(model).items()}
    return [path for path, weight in weights.items() if weight is not None and weight.ndim == 1]


def list_default_names(model: Decoder) -> tuple[str, ...]:
    """PEFT's default targets for the family: the norms of the residual stream (each in a block, not in its attention,
    and the last one), except where PEFT names others (Family.tuned_norms)."""
    if model.family.tuned_norms:
        return model.family.tuned_norms
    inner = [path for path in list_norms(model) if path.rsplit(".", 2)[0] == model.family.blocks]
    return tuple(sorted({path.rpartition(".")[2] for path in (*inner, model.family.norm)}))


def find_norms(model: Decoder, targets: Targets) -> list[str]:
    """The paths of the norms that `targets` names, in the model's order.

    Raises:
        InputError: a name or the pattern matches no norm.
    """
    norms = list_norms(model)
    names = list_default_names(model) if targets == "default" else targets
    if isinstance(names, str):
        found = match_paths(names, norms, "targets")
        if not found:
            raise InputError(f"{names!r} matches no norm, such as {norms[0]!r}", where="targets")
        return [path for path in norms if path in found]
    for name in names:
        if not any(is_named(path, name) for path in norms):
            known = sorted({path.rpartition(".")[2] for path in norms})
            raise InputError(f"no norm is named {name!r}; this model has {known}", where="targets")
    return [path for path in norms if any(is_named(path, name) for name in names)]


def add_ln_tuning(
    model: Decoder, config: LNTuningConfig, tokenizer: Encoder | None, generator: torch.Generator
) -> list[str]:
    """Replace each targeted norm by a SavedModule, which computes it with trained copies; returns their paths."""
    paths = find_norms(model, config.targets)
    for path in paths:
        norm = model.get_submodule(path)
        replace(model, path, SavedModule(norm, list(dict(norm.named_parameters()))).train(model.training))
    return paths


def remove_ln_tuning(model: nn.Module) -> None:
    """Restore the base's norms."""
    restore(model, find_saved_modules(model))


def merge_ln_tuning(model: nn.Module) -> MergeReport:
    """Write the trained gains and biases into the norms; the model is plain afterwards."""
    return merge(model, find_saved_modules(model))


def ln_tuning_recipe(config: LNTuningConfig, parameters: int, family: str) -> Recipe:
    """LN-tuning's default training. On the demo (60 steps, float32) the held-out loss is 3.23, 2.45, 1.84, 1.58 and
    1.62 at learning rates of 1e-3, 3e-3, 1e-2, 3e-2 and 1e-1; no larger model was measured."""
    return Recipe(1e-2, source="measured on the demo model alone: 3e-2 is better there by 0.26 nats")
