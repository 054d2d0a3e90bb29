"""VeRA in HF PEFT's format: adapter_config.json, and each tensor's name and shape.

base_model.model.<path>.vera_lambda_b [out]       .vera_lambda_d [r]
base_model.vera_A [r, widest in]                  base_model.vera_B [widest out, r]       with save_projection
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minipeft.adapters.method import PeftFormat
from minipeft.adapters.peft_targets import ROOT, check_blocks, fit_targets, make_targets_json, read_layers, read_targets
from minipeft.adapters.targets import find_targets
from minipeft.adapters.vera import Projection, VeRAConfig, find_shapes, find_vera_layers
from minipeft.models import Decoder

SHARED = {"base_model.vera_A": "A", "base_model.vera_B": "B"}


def vera_json(config: VeRAConfig, model: Decoder) -> dict[str, object]:
    """VeRA's keys of adapter_config.json."""
    return {
        "peft_type": "VERA",
        "r": config.rank,
        "vera_dropout": config.dropout,
        "target_modules": make_targets_json(
            config.targets, model.family.default_targets["lora"], list(find_vera_layers(model))
        ),
        "bias": "none",
        "d_initial": config.d_initial,
        "fan_in_fan_out": bool(model.family.transposed),
        "init_weights": True,
        "layers_to_transform": None if config.layers is None else list(config.layers),
        "layers_pattern": None,
        "projection_prng_key": config.projection_prng_key,
        "save_projection": config.save_projection,
    }


def vera_config(given: Mapping[str, Any]) -> VeRAConfig:
    """PEFT's keys -> ours, with PEFT's defaults."""
    return VeRAConfig(
        rank=given.get("r", 256),
        dropout=given.get("vera_dropout", 0.0),
        targets=read_targets(given.get("target_modules"), "target_modules"),
        layers=read_layers(given),
        d_initial=given.get("d_initial", 0.1),
        projection_prng_key=given.get("projection_prng_key", 0),
        save_projection=given.get("save_projection", True),
    )


def vera_shapes(model: Decoder, config: VeRAConfig) -> dict[str, tuple[int, ...]]:
    """The names and shapes that the file of this adapter must have for this model."""
    linears = find_shapes(model, config)
    shapes: dict[str, tuple[int, ...]] = {}
    for path, (out, _) in linears.items():
        shapes |= {f"{ROOT}{path}.vera_lambda_b": (out,), f"{ROOT}{path}.vera_lambda_d": (config.rank,)}
    if config.save_projection:
        out, width = (max(sizes) for sizes in zip(*linears.values()))
        shapes |= {"base_model.vera_A": (config.rank, width), "base_model.vera_B": (out, config.rank)}
    return shapes


def own_tensors(model: Decoder) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names, the shared pair where it is saved."""
    layers = find_vera_layers(model)
    held = {f"{ROOT}{path}.{name}": t for path, layer in layers.items() for name, t in layer.own_tensors().items()}
    if model.adapter.save_projection:
        projection: Projection = next(iter(layers.values())).projection
        held |= {key: getattr(projection, name) for key, name in SHARED.items()}
    return held


@torch.no_grad()
def fill_vera(model: Decoder, tensors: dict[str, Tensor], folder: Path) -> None:
    """Copy loaded tensors into the VeRALinears; a pair that is not in the file is the one that its seed gives."""
    for name, tensor in own_tensors(model).items():
        tensor.copy_(tensors[name])


VERA_FORMAT = PeftFormat(
    types=("VERA",),
    to_json=vera_json,
    from_json=vera_config,
    shapes=vera_shapes,
    tensors=own_tensors,
    fill=fill_vera,
    check=check_blocks,
    fit=lambda config, given, model, header: fit_targets(
        config, given, model, partial(find_targets, default=model.family.default_targets["lora"])),
    describe=lambda given, header: {"rank": given.get("r"), "targets": given.get("target_modules")},
    fields={"rank": "r", "dropout": "vera_dropout", "targets": "target_modules", "layers": "layers_to_transform"},
    known=frozenset({"d_initial", "fan_in_fan_out", "init_weights", "layers_pattern", "layers_to_transform",
                     "projection_prng_key", "r", "save_projection", "target_modules", "vera_dropout"}),
    neutral={"bias": ("none",), "exclude_modules": (None, []), "modules_to_save": (None, [])},
)  # fmt: skip
