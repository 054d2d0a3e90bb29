"""(IA)3 in HF PEFT's format: adapter_config.json, and each tensor's name and shape.

base_model.model.<path>.ia3_l [out, 1], or [1, in] where it scales the input
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minipeft.adapters.ia3 import IA3Config, find_ia3_layers, find_scaled
from minipeft.adapters.method import PeftFormat
from minipeft.adapters.peft_targets import ROOT, fit_targets, make_targets_json, read_targets
from minipeft.adapters.targets import find_targets
from minipeft.models import Decoder
from minipeft.tensor_files import TensorInfo


def ia3_json(config: IA3Config, model: Decoder) -> dict[str, object]:
    """(IA)3's keys of adapter_config.json."""
    layers, default = find_ia3_layers(model), model.family.default_targets
    inner = [path for path, layer in layers.items() if layer.feedforward]
    return {
        "peft_type": "IA3",
        "exclude_modules": None,
        "fan_in_fan_out": bool(model.family.transposed),
        "feedforward_modules": make_targets_json(config.feedforward, default["ia3_feedforward"], inner),
        "init_ia3_weights": True,
        "target_modules": make_targets_json(config.targets, default["ia3"], list(layers)),
    }


def ia3_tensors(model: Decoder) -> dict[str, Tensor]:
    """The scales under PEFT's names, as the rows or columns that PEFT makes of them."""
    return {
        f"{ROOT}{path}.ia3_l": layer.ia3_l[None] if layer.feedforward else layer.ia3_l[:, None]
        for path, layer in find_ia3_layers(model).items()
    }


def ia3_config(given: Mapping[str, Any]) -> IA3Config:
    """PEFT's keys -> ours."""
    feedforward = given.get("feedforward_modules")
    return IA3Config(
        targets=read_targets(given.get("target_modules"), "target_modules"),
        feedforward=() if feedforward == [] else read_targets(feedforward, "feedforward_modules"),
    )


def fit_ia3(
    config: IA3Config, given: Mapping[str, Any], model: Decoder, header: Mapping[str, TensorInfo]
) -> tuple[IA3Config, list[str]]:
    """Read target_modules and exclude_modules; an excluded linear is not scaled at its input either."""
    config, notes = fit_targets(
        config, given, model, partial(find_targets, default=model.family.default_targets["ia3"])
    )
    if given.get("exclude_modules") and config.feedforward:
        inner = find_targets(model, config.feedforward, model.family.default_targets["ia3_feedforward"])
        config = dataclasses.replace(config, feedforward=tuple(path for path in inner if path in config.targets))
    return config, notes


def ia3_shapes(model: Decoder, config: IA3Config) -> dict[str, tuple[int, ...]]:
    """The names and shapes that the file of this adapter must have for this model."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, feedforward in find_scaled(model, config).items():
        out, width = map(int, model.get_parameter(f"{path}.weight").shape)
        shapes[f"{ROOT}{path}.ia3_l"] = (1, width) if feedforward else (out, 1)
    return shapes


def fill_ia3(model: Decoder, tensors: dict[str, Tensor], folder: Path) -> None:
    """Copy loaded scales into the IA3Linears."""
    with torch.no_grad():
        for path, layer in find_ia3_layers(model).items():
            layer.ia3_l.copy_(tensors[f"{ROOT}{path}.ia3_l"].flatten())


IA3_FORMAT = PeftFormat(
    types=("IA3",),
    to_json=ia3_json,
    from_json=ia3_config,
    shapes=ia3_shapes,
    tensors=ia3_tensors,
    fill=fill_ia3,
    fit=fit_ia3,
    describe=lambda given, header: {
        "targets": given.get("target_modules"), "feedforward": given.get("feedforward_modules")},
    fields={"targets": "target_modules", "feedforward": "feedforward_modules"},
    known=frozenset({"exclude_modules", "fan_in_fan_out", "feedforward_modules", "init_ia3_weights", "target_modules"}),
    neutral={"modules_to_save": (None, [])},
)  # fmt: skip
