"""LoRA in HF PEFT's format: adapter_config.json, and each tensor's name and shape.

    base_model.model.<path>.lora_A.weight [r, in]      .lora_B.weight [out, r]      as nn.Linear's, GPT-2's too
    base_model.model.<path>.lora_B.bias [out]          with lora_bias
    base_model.model.<path>.lora_magnitude_vector [out]      DoRA's m
    embeddings, and parts of the base that are trained with them      peft_saved.py

PiSSA and OLoRA are written as the plain LoRA that they equal (pissa.py): twice the rank, the same scale.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minipeft.adapters.embedding import LoRAEmbedding, find_table_layers
from minipeft.adapters.lora import LoRAConfig, choose_ranks, find_lora_layers
from minipeft.adapters.method import PeftFormat
from minipeft.adapters.peft_saved import (
    fill_saved,
    fit_saved,
    list_optional_shapes,
    list_saved_shapes,
    list_saved_tensors,
    make_saved_json,
    read_saved_fields,
    rename_saved,
    settle_saved,
)
from minipeft.adapters.peft_targets import ROOT, check_blocks, fit_targets, make_targets_json, read_layers, read_targets
from minipeft.adapters.pissa import RESIDUAL
from minipeft.adapters.targets import find_targets, list_embeddings
from minipeft.errors import InputError
from minipeft.models import Decoder
from minipeft.tensor_files import TensorInfo

LORA_TENSORS = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_B.bias": "lora_bias",
    "lora_magnitude_vector": "lora_magnitude_vector",
}


def lora_json(config: LoRAConfig, model: Decoder) -> dict[str, object]:
    """LoRA's keys of adapter_config.json: the stable ones, and lora_bias where it is on (a reader without it fails)."""
    if config.init in RESIDUAL:
        config = double_rank(config)
    given: dict[str, object] = {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": as_integer(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": make_targets_json(
            config.targets, model.family.default_targets["lora"], list(find_lora_layers(model))
        ),
        **make_saved_json(config, model),
        "fan_in_fan_out": bool(model.family.transposed),
        "init_lora_weights": True,
        "layers_to_transform": None if config.layers is None else list(config.layers),
        "layers_pattern": None,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": {key: as_integer(alpha) for key, alpha in config.alpha_pattern.items()},
        "use_rslora": config.rslora,
        "use_dora": config.dora,
    }
    return given | {"lora_bias": True} if config.lora_bias else given


def double_rank(config: LoRAConfig) -> LoRAConfig:
    """The plain LoRA that PiSSA or OLoRA is: rank 2r, alpha / r (or alpha / sqrt(r)) as before."""
    alpha = math.sqrt(2) if config.rslora else 2
    return dataclasses.replace(
        config,
        init="uniform",
        rank=2 * config.rank,
        alpha=alpha * config.alpha,
        rank_pattern={key: 2 * rank for key, rank in config.rank_pattern.items()},
        alpha_pattern={key: alpha * value for key, value in config.alpha_pattern.items()},
    )


def as_integer(number: float) -> float:
    """16.0 -> 16: PEFT's lora_alpha is an integer by its type."""
    return int(number) if number == int(number) else number


def lora_tensors(model: Decoder) -> dict[str, Tensor]:
    """The trained tensors, under PEFT's names."""
    tensors: dict[str, Tensor] = {}
    for path, layer in find_lora_layers(model).items():
        _, _, A, B, _ = layer.part()  # of PiSSA and OLoRA, the plain pair of twice the rank
        held = {**layer.own_tensors(), "lora_A": A, "lora_B": B}
        tensors |= {f"{ROOT}{path}.{key}": held[name] for key, name in LORA_TENSORS.items() if name in held}
    return tensors | list_saved_tensors(model)


def bake_scales(config: LoRAConfig, tensors: dict[str, Tensor], model: Decoder) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """The same updates for a reader that scales each by lora_alpha / (the rank of its tensors): what rsLoRA or
    alpha_pattern change of the scale goes into B.

    Raises:
        InputError: DoRA or a bias on B, which such a reader does not support.
    """
    if config.dora or config.lora_bias:
        problem = "DoRA and lora_bias cannot be baked: their update is not B A alone"
        raise InputError(problem, where="baked", hint="merge_adapter")
    plain = dataclasses.replace(config, rslora=False, alpha_pattern={})
    alpha = lora_json(plain, model)["lora_alpha"]
    baked = dict(tensors)
    for path, layer in find_lora_layers(model).items():
        name = f"{ROOT}{path}.lora_B.weight"
        rank = tensors[name].shape[1]  # of PiSSA and OLoRA twice the layer's
        baked[name] = tensors[name] * (layer.scale * rank / alpha)  # type: ignore[operator]
    for path, table in find_table_layers(model).items():
        if isinstance(table, LoRAEmbedding):
            name = f"{ROOT}{path}.lora_embedding_B"
            baked[name] = tensors[name] * (table.scale * table.rank / alpha)  # type: ignore[operator]
    return plain, baked


def lora_config(given: Mapping[str, Any]) -> LoRAConfig:
    """PEFT's keys -> ours, with PEFT's defaults."""
    patterns = {key: given.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    for key, value in patterns.items():
        if not isinstance(value, dict):
            raise InputError(f"{value!r} is not an object", where=key)
    return LoRAConfig(
        rank=given.get("r", 8),
        alpha=given.get("lora_alpha", 8),
        dropout=given.get("lora_dropout", 0.0),
        targets=read_targets(given.get("target_modules"), "target_modules"),
        layers=read_layers(given),
        rslora=given.get("use_rslora", False),
        dora=given.get("use_dora", False),
        lora_bias=given.get("lora_bias", False),
        rank_pattern=patterns["rank_pattern"],
        alpha_pattern=patterns["alpha_pattern"],
        init="olora" if given.get("init_lora_weights") == "olora" else "uniform",
        **read_saved_fields(given),
    )


def fit_lora(
    config: LoRAConfig, given: Mapping[str, Any], model: Decoder, header: Mapping[str, TensorInfo]
) -> tuple[LoRAConfig, list[str]]:
    """Read the targets and the parts of the base as the tensors show them; ensure_weight_tying adds the head."""
    find = partial(find_targets, default=model.family.default_targets["lora"], tables=True)
    config, notes = fit_targets(config, given, model, find)
    if given.get("ensure_weight_tying") and f"{ROOT}lm_head.lora_A.weight" in header:
        paths = list(choose_ranks(model, config))
        config = dataclasses.replace(config, targets=(*(path for path in paths if path != "lm_head"), "lm_head"))
    config, more = fit_saved(config, model, header)
    return config, notes + more


def check_lora(given: Mapping[str, Any], model: Decoder) -> None:
    """Check layers_pattern, and that an OLoRA's initial pair can be computed again from this model's weights.

    Raises:
        InputError: another list of blocks, or OLoRA where PEFT decomposes W^T and not W.
    """
    check_blocks(given, model)
    if given.get("init_lora_weights") == "olora" and model.family.transposed:
        raise InputError("'olora' is not supported for weights stored as [in, out]", where="init_lora_weights")


def lora_shapes(model: Decoder, config: LoRAConfig) -> dict[str, tuple[int, ...]]:
    """The names and shapes that the file of this adapter must have for this model."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, (rank, _) in choose_ranks(model, config).items():
        out, width = map(int, model.get_parameter(f"{path}.weight").shape)
        if path in list_embeddings(model):
            shapes[f"{ROOT}{path}.lora_embedding_A"] = (rank, out)
            shapes[f"{ROOT}{path}.lora_embedding_B"] = (width, rank)
            continue
        shapes[f"{ROOT}{path}.lora_A.weight"] = (rank, width)
        shapes[f"{ROOT}{path}.lora_B.weight"] = (out, rank)
        if config.lora_bias:
            shapes[f"{ROOT}{path}.lora_B.bias"] = (out,)
        if config.dora:
            shapes[f"{ROOT}{path}.lora_magnitude_vector"] = (out,)
    return shapes | list_saved_shapes(model, config)


def fill_lora(model: Decoder, tensors: dict[str, Tensor], folder: Path) -> None:
    """Copy loaded tensors into the LoRALinears and the trained parts of the base."""
    with torch.no_grad():
        for path, layer in find_lora_layers(model).items():
            own = layer.own_tensors()
            for key, name in LORA_TENSORS.items():
                if name in own:
                    own[name].copy_(tensors[f"{ROOT}{path}.{key}"])
    fill_saved(model, tensors)


def describe_lora(given: Mapping[str, Any], header: Mapping[str, TensorInfo]) -> dict[str, object]:
    """Describe the ranks of the tensors, and the variants that are on."""
    ranks = sorted({info.shape[0] for name, info in header.items() if ".lora_A" in name and info.shape})
    names = {"use_rslora": "rsLoRA", "use_dora": "DoRA", "lora_bias": "lora_bias"}
    return {
        "rank": ranks[0] if len(ranks) == 1 else ranks,
        "alpha": given.get("lora_alpha", 8),
        "dropout": given.get("lora_dropout", 0.0),
        "targets": given.get("target_modules"),
        "layers": given.get("layers_to_transform"),
        "bias": None if given.get("bias", "none") == "none" else given["bias"],
        "trained whole": given.get("modules_to_save"),
        "trained rows": given.get("trainable_token_indices"),
        "variants": [name for key, name in names.items() if given.get(key)],
        "modules": len({name.rsplit(".lora_", 1)[0] for name in header if ".lora_" in name}),
    }


LORA_FORMAT = PeftFormat(
    types=("LORA",),
    to_json=lora_json,
    from_json=lora_config,
    shapes=lora_shapes,
    tensors=lora_tensors,
    fill=fill_lora,
    check=check_lora,
    bake=bake_scales,
    rename=rename_saved,
    fit=fit_lora,
    optional=list_optional_shapes,
    settle=settle_saved,
    describe=describe_lora,
    fields={"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules",
            "layers": "layers_to_transform", "rslora": "use_rslora", "dora": "use_dora"},
    known=frozenset({
        "alpha_pattern", "bias", "exclude_modules", "fan_in_fan_out", "layers_pattern", "layers_to_transform",
        "lora_alpha", "lora_bias", "lora_dropout",
        "modules_to_save", "qalora_group_size", "r", "rank_pattern", "target_modules", "trainable_token_indices",
        "use_dora", "use_rslora"}),
    noted={
        "ensure_weight_tying": (True,),
        "init_lora_weights": ("orthogonal", "eva", "mica", "lora_ga"), "eva_config": None, "lora_ga_config": None,
        "lora_dtype": None, "lorap_emb_lr": None, "lorap_lr_ratio": None},  # the last three are ms-swift's
    neutral={
        "alora_invocation_tokens": (None,), "arrow_config": (None,), "corda_config": (None,),
        "ensure_weight_tying": (False, None), 
        "init_lora_weights": (True, False, "gaussian", "olora"), "kasa_config": (None,), "layer_replication": (None,),
        "loftq_config": ({}, None), "megatron_config": (None,),
        "megatron_core": ("megatron.core", None), "monteclora_config": (None,),
        "target_parameters": (None, []), "use_bdlora": (None, False),
        "use_qalora": (False, None), "velora_config": (None,)},
)  # fmt: skip
