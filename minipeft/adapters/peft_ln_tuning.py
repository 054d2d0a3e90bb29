"""LN-tuning in HF PEFT's format: adapter_config.json, and each tensor's name and shape.

base_model.model.<path>.ln_tuning_layers.weight [C]        .ln_tuning_layers.bias [C]        of each trained norm
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minipeft.adapters.ln_tuning import LNTuningConfig, find_norms, list_default_names
from minipeft.adapters.method import PeftFormat
from minipeft.adapters.peft_targets import ROOT, fit_targets, make_targets_json, read_targets
from minipeft.adapters.saved_modules import find_saved_modules
from minipeft.models import Decoder


def ln_tuning_json(config: LNTuningConfig, model: Decoder) -> dict[str, object]:
    """LN-tuning's keys of adapter_config.json."""
    return {
        "peft_type": "LN_TUNING",
        "exclude_modules": None,
        "target_modules": make_targets_json(config.targets, list_default_names(model), []),
    }


def ln_tuning_config(given: Mapping[str, Any]) -> LNTuningConfig:
    """PEFT's keys -> ours."""
    return LNTuningConfig(targets=read_targets(given.get("target_modules"), "target_modules"))


def ln_tuning_shapes(model: Decoder, config: LNTuningConfig) -> dict[str, tuple[int, ...]]:
    """The names and shapes that the file of this adapter must have for this model."""
    return {
        f"{ROOT}{path}.ln_tuning_layers.{name}": tuple(p.shape)
        for path in find_norms(model, config.targets)
        for name, p in model.get_submodule(path).named_parameters()
    }


def ln_tuning_tensors(model: Decoder) -> dict[str, Tensor]:
    """The trained gains and biases under PEFT's names."""
    return {
        f"{ROOT}{path}.ln_tuning_layers.{name}": t
        for path, module in find_saved_modules(model).items()
        for name, t in module.copies.items()
    }


@torch.no_grad()
def fill_ln_tuning(model: Decoder, tensors: dict[str, Tensor], folder: Path) -> None:
    """Copy loaded gains and biases into the trained copies."""
    for name, copy in ln_tuning_tensors(model).items():
        copy.copy_(tensors[name])


LN_TUNING_FORMAT = PeftFormat(
    types=("LN_TUNING",),
    to_json=ln_tuning_json,
    from_json=ln_tuning_config,
    shapes=ln_tuning_shapes,
    tensors=ln_tuning_tensors,
    fill=fill_ln_tuning,
    fit=lambda config, given, model, header: fit_targets(config, given, model, find_norms, "norm"),
    describe=lambda given, header: {"targets": given.get("target_modules")},
    fields={"targets": "target_modules"},
    known=frozenset({"exclude_modules", "target_modules"}),
    neutral={"modules_to_save": (None, [])},
)
