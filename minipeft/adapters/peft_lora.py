"""LoRA and (IA)3 in HF PEFT's format: what stands in adapter_config.json, and each tensor's name and shape.

    base_model.model.<path>.lora_A.weight [r, in]      .lora_B.weight [out, r]      as nn.Linear's, GPT-2's too
    base_model.model.<path>.lora_B.bias [out]          with lora_bias
    base_model.model.<path>.lora_magnitude_vector [out]      DoRA's m
    base_model.model.<path>.ia3_l [out, 1], or [1, in] where it scales the input

PiSSA is written as the plain LoRA that it equals (pissa.py): twice the rank, and an alpha that keeps the scale.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from minipeft.adapters import ia3, lora
from minipeft.adapters.ia3 import IA3Config, ia3_layers
from minipeft.adapters.lora import LoRAConfig, lora_layers
from minipeft.adapters.surgery import Targets
from minipeft.errors import InputError
from minipeft.models import Decoder

ROOT = "base_model.model."
LORA_TENSORS = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_B.bias": "lora_bias",
    "lora_magnitude_vector": "lora_magnitude_vector",
}


def lora_json(config: LoRAConfig, model: Decoder) -> dict[str, object]:
    """LoRA's keys of adapter_config.json: the stable ones, and lora_bias where it is on (a reader without it fails)."""
    if config.init == "pissa":
        config = doubled(config)
    given: dict[str, object] = {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": whole(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": targets_json(
            config.targets, lora.DEFAULT_TARGETS[model.config.model_type], list(lora_layers(model))
        ),
        "bias": "none",
        "fan_in_fan_out": model.config.model_type == "gpt2",
        "init_lora_weights": True,
        "layers_to_transform": None if config.layers is None else list(config.layers),
        "layers_pattern": None,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": {key: whole(alpha) for key, alpha in config.alpha_pattern.items()},
        "use_rslora": config.rslora,
        "use_dora": config.dora,
    }
    return given | {"lora_bias": True} if config.lora_bias else given


def doubled(config: LoRAConfig) -> LoRAConfig:
    """The plain LoRA that PiSSA is: rank 2r, alpha / r (or alpha / sqrt(r)) as before."""
    alpha = math.sqrt(2) if config.rslora else 2
    return dataclasses.replace(
        config,
        init="uniform",
        rank=2 * config.rank,
        alpha=alpha * config.alpha,
        rank_pattern={key: 2 * rank for key, rank in config.rank_pattern.items()},
        alpha_pattern={key: alpha * value for key, value in config.alpha_pattern.items()},
    )


def whole(number: float) -> float:
    """16.0 -> 16: PEFT's lora_alpha is an integer by its type."""
    return int(number) if number == int(number) else number


def targets_json(targets: Targets, default: tuple[str, ...], paths: list[str]) -> str | list[str]:
    """target_modules: names, sorted; "all-linear" as the names that it found."""
    if targets == "all-linear":
        return sorted({path.rsplit(".", 1)[-1] for path in paths})
    if isinstance(targets, str) and targets != "default":
        return targets
    return sorted(default if targets == "default" else targets)


def lora_tensors(model: Decoder) -> dict[str, Tensor]:
    """What is trained, under PEFT's names."""
    tensors: dict[str, Tensor] = {}
    for path, layer in lora_layers(model).items():
        A, B = layer.pair()
        held = {
            "lora_A": A,
            "lora_B": B,
            "lora_bias": layer.lora_bias,
            "lora_magnitude_vector": layer.lora_magnitude_vector,
        }
        found = {ending: held[name] for ending, name in LORA_TENSORS.items()}
        tensors |= {f"{ROOT}{path}.{ending}": t for ending, t in found.items() if t is not None}
    return tensors


def lora_config(given: Mapping[str, Any]) -> LoRAConfig:
    """PEFT's keys -> ours, with PEFT's defaults."""
    layers: Any = given.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    patterns = {key: given.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    for key, value in patterns.items():
        if not isinstance(value, dict):
            raise InputError(f"{value!r} is not an object", where=key)
    if given.get("layers_pattern") and layers is None:
        raise InputError("has no meaning without layers_to_transform", where="layers_pattern")
    return LoRAConfig(
        rank=given.get("r", 8),
        alpha=given.get("lora_alpha", 8),
        dropout=given.get("lora_dropout", 0.0),
        targets=targets_from(given.get("target_modules"), "target_modules"),
        layers=layers or None,
        rslora=given.get("use_rslora", False),
        dora=given.get("use_dora", False),
        lora_bias=given.get("lora_bias", False),
        rank_pattern=patterns["rank_pattern"],
        alpha_pattern=patterns["alpha_pattern"],
    )


def targets_from(targets: Any, where: str) -> Targets:
    """target_modules or feedforward_modules; null is PEFT's choice for the family."""
    if targets is None:
        return "default"
    if isinstance(targets, str):
        return "all-linear" if targets.lower() == "all-linear" else targets
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise InputError(f"{targets!r} must be a list of names, a regular expression or 'all-linear'", where=where)
    return tuple(targets)


def lora_shapes(model: Decoder, config: LoRAConfig) -> dict[str, tuple[int, ...]]:
    """The names and shapes that the file of this adapter must have for this model."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, (rank, _) in lora.plan(model, config).items():
        out, width = map(int, model.get_parameter(f"{path}.weight").shape)
        shapes[f"{ROOT}{path}.lora_A.weight"] = (rank, width)
        shapes[f"{ROOT}{path}.lora_B.weight"] = (out, rank)
        if config.lora_bias:
            shapes[f"{ROOT}{path}.lora_B.bias"] = (out,)
        if config.dora:
            shapes[f"{ROOT}{path}.lora_magnitude_vector"] = (out,)
    return shapes


def fill_lora(model: Decoder, tensors: Mapping[str, Tensor]) -> None:
    """Copy loaded tensors into the LoRALinears."""
    with torch.no_grad():
        for path, layer in lora_layers(model).items():
            for ending, name in LORA_TENSORS.items():
                if getattr(layer, name) is not None:
                    getattr(layer, name).copy_(tensors[f"{ROOT}{path}.{ending}"])


def ia3_json(config: IA3Config, model: Decoder) -> dict[str, object]:
    """(IA)3's keys of adapter_config.json."""
    kind, layers = model.config.model_type, ia3_layers(model)
    inner = [path for path, layer in layers.items() if layer.feedforward]
    return {
        "peft_type": "IA3",
        "exclude_modules": None,
        "fan_in_fan_out": kind == "gpt2",
        "feedforward_modules": targets_json(config.feedforward, ia3.DEFAULT_FEEDFORWARD[kind], inner),
        "init_ia3_weights": True,
        "target_modules": targets_json(config.targets, ia3.DEFAULT_TARGETS[kind], list(layers)),
    }


def ia3_tensors(model: Decoder) -> dict[str, Tensor]:
    """The scales under PEFT's names, as the rows or columns that PEFT makes of them."""
    return {
        f"{ROOT}{path}.ia3_l": layer.ia3_l[None] if layer.feedforward else layer.ia3_l[:, None]
        for path, layer in ia3_layers(model).items()
    }


def ia3_config(given: Mapping[str, Any]) -> IA3Config:
    """PEFT's keys -> ours."""
    feedforward = given.get("feedforward_modules")
    return IA3Config(
        targets=targets_from(given.get("target_modules"), "target_modules"),
        feedforward=() if feedforward == [] else targets_from(feedforward, "feedforward_modules"),
    )


def ia3_shapes(model: Decoder, config: IA3Config) -> dict[str, tuple[int, ...]]:
    """The names and shapes that the file of this adapter must have for this model."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, feedforward in ia3.plan(model, config).items():
        out, width = map(int, model.get_parameter(f"{path}.weight").shape)
        shapes[f"{ROOT}{path}.ia3_l"] = (1, width) if feedforward else (out, 1)
    return shapes


def fill_ia3(model: Decoder, tensors: Mapping[str, Tensor]) -> None:
    """Copy loaded scales into the IA3Linears."""
    with torch.no_grad():
        for path, layer in ia3_layers(model).items():
            layer.ia3_l.copy_(tensors[f"{ROOT}{path}.ia3_l"].flatten())
