"""Adapters on disk in Hugging Face PEFT's format, both ways: adapter_config.json + adapter_model.safetensors.

    LoRA     base_model.model.<path of the linear>.lora_A.weight [r, in]   .lora_B.weight [out, r]
    prefix   prompt_embeddings [P, L * 2 * K * D]: of each column, in each layer, its key, then its value (after rotary)
    prompt   prompt_embeddings [P, C]

The config has PEFT's own keys and no key of ours. Loading is strict: what is missing, unexpected, of another shape, not
finite, or asks for a feature that is not here is an error that names file and entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minipeft.adapters import (
    AdapterConfig,
    AdapterReport,
    FullConfig,
    LoRAConfig,
    PrefixConfig,
    PromptConfig,
    adapter_of,
    add_adapter,
)
from minipeft.adapters.lora import DEFAULT_TARGETS, lora_layers, targeted
from minipeft.adapters.prefix import attentions
from minipeft.errors import InputError
from minipeft.files import TensorInfo, read_header, read_object, write_json, write_tensors
from minipeft.models import Decoder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_TYPES = {"LORA": "lora", "PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt"}
Header = Mapping[str, tuple[str, TensorInfo]]  # our name -> the file's name, and what its header says of it
FLOATS = ("F32", "F16", "BF16", "F64")

# Every key of PEFT 0.21 that changes what an adapter computes, and the values at which it changes nothing. A file that
# asks for anything else asks for what is not implemented here.
NEUTRAL: dict[str, dict[str, tuple[object, ...]]] = {
    "lora": {
        "alora_invocation_tokens": (None,), "alpha_pattern": ({}, None), "arrow_config": (None,), "bias": ("none",),
        "corda_config": (None,), "ensure_weight_tying": (False, None), "eva_config": (None,),
        "exclude_modules": (None,),
        "init_lora_weights": (True, False, "gaussian"), "kasa_config": (None,), "layer_replication": (None,),
        "layers_pattern": (None,), "layers_to_transform": (None,), "loftq_config": ({}, None), "lora_bias": (False,),
        "lora_ga_config": (None,), "megatron_config": (None,), "modules_to_save": (None,), "monteclora_config": (None,),
        "rank_pattern": ({}, None), "target_parameters": (None,), "trainable_token_indices": (None,),
        "use_bdlora": (None, False), "use_dora": (False,), "use_qalora": (False,), "use_rslora": (False,),
        "velora_config": (None,),
    },
    "prefix": {"modules_to_save": (None,), "num_transformer_submodules": (None, 1)},
    "prompt": {"modules_to_save": (None,), "num_transformer_submodules": (None, 1)},
}  # fmt: skip
IGNORED = {
    "auto_mapping", "base_model_name_or_path", "encoder_hidden_size", "fan_in_fan_out", "inference_mode",
    "init_weights", "lora_alpha", "lora_dropout", "megatron_core", "num_attention_heads", "num_layers",
    "num_virtual_tokens", "peft_type", "peft_version", "prefix_projection", "prompt_tuning_init",
    "prompt_tuning_init_text", "qalora_group_size", "r", "revision", "runtime_config", "target_modules", "task_type",
    "token_dim", "tokenizer_kwargs", "tokenizer_name_or_path",
}  # fmt: skip


def save_adapter(model: Decoder, folder: str | Path) -> None:
    """Write the model's adapter to `folder` as PEFT would; each file whole or not at all.

    Raises:
        InputError: the model holds no adapter, or was tuned in full (save_model keeps that); the folder refuses.
    """
    config = adapter_of(model)
    if config is None or isinstance(config, FullConfig):
        held = "no adapter" if config is None else "a full tuning"
        raise InputError(f"the model holds {held}", where="save_adapter", hint="save_model writes the whole model")
    if isinstance(config, LoRAConfig):
        given, tensors = lora_json(config, model), lora_tensors(model)
    elif isinstance(config, PrefixConfig):
        given, tensors = prefix_json(config, model), {"prompt_embeddings": prefix_table(model)}
    else:
        given, tensors = prompt_json(config, model), {"prompt_embeddings": model.prompt.weight}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise InputError("holds NaN or Inf, and is not saved", where=name)
    write_tensors(Path(folder) / WEIGHTS, tensors)
    write_json(Path(folder) / CONFIG, dict(sorted({**shared_json(model), **given}.items())))


def shared_json(model: Decoder) -> dict[str, object]:
    """The keys that every PEFT config has."""
    return {
        "base_model_name_or_path": model.source,
        "inference_mode": True,
        "modules_to_save": None,
        "revision": None,
        "task_type": "CAUSAL_LM",  # without it PEFT loads a prefix and never applies it
    }


def lora_json(config: LoRAConfig, model: Decoder) -> dict[str, object]:
    """adapter_config.json of LoRA; the targets in full paths' shortest unambiguous form, sorted."""
    paths = list(lora_layers(model))
    if isinstance(config.targets, tuple):
        targets = sorted(config.targets)
    elif config.targets == "default":
        targets = sorted(DEFAULT_TARGETS[model.config.model_type])
    else:
        targets = sorted({path.rsplit(".", 1)[-1] for path in paths})
    return {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": model.config.model_type == "gpt2",
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
    }


def lora_tensors(model: Decoder) -> dict[str, Tensor]:
    """A and B under PEFT's names."""
    pairs = lora_layers(model).items()
    return {
        f"base_model.model.{path}.lora_{letter}.weight": getattr(layer, f"lora_{letter}")
        for path, layer in pairs
        for letter in "AB"
    }


def prefix_json(config: PrefixConfig, model: Decoder) -> dict[str, object]:
    """adapter_config.json of prefix-tuning; token_dim counts the key/value heads, as PEFT does since 0.12."""
    c = model.config
    return {
        "peft_type": "PREFIX_TUNING",
        "encoder_hidden_size": c.width,
        "num_attention_heads": c.kv_heads,
        "num_layers": c.layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": config.length,
        "prefix_projection": False,
        "token_dim": c.kv_heads * c.head_width,
    }


def prompt_json(config: PromptConfig, model: Decoder) -> dict[str, object]:
    """adapter_config.json of prompt tuning."""
    return {
        "peft_type": "PROMPT_TUNING",
        "num_attention_heads": model.config.heads,
        "num_layers": model.config.layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": config.length,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "token_dim": model.config.width,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    }


def prefix_table(model: Decoder) -> Tensor:
    """All layers' keys and values as PEFT's one table. -> [P, L * 2 * K * D]"""
    layers = [torch.stack([a.prefix.key, a.prefix.value]) for a in attentions(model)]  # each [2, K, P, D]
    return torch.stack(layers).permute(3, 0, 1, 2, 4).flatten(1).detach()


def prefix_tensors(table: Tensor, model: Decoder) -> tuple[Tensor, Tensor]:
    """PEFT's table [P, L * 2 * K * D] -> keys and values, two of [L, K, P, D]"""
    c = model.config
    keys, values = table.view(-1, c.layers, 2, c.kv_heads, c.head_width).permute(2, 1, 3, 0, 4)
    return keys, values


def load_adapter(model: Decoder, folder: str | Path, *, trainable: bool = False) -> AdapterReport:
    """Put the adapter that lies in `folder` (ours or PEFT's) into the model; frozen, unless `trainable`.

    Raises:
        InputError: the model holds an adapter already; a file is missing or malformed; a tensor is missing, unexpected,
            wrongly shaped, not floating or not finite; the config asks for what is not implemented.
    """
    folder = Path(folder)
    config = read_adapter_config(folder / CONFIG, model.config.model_type)
    header = {name.replace(".default.", "."): (name, info) for name, info in read_header(folder / WEIGHTS).items()}
    try:
        wanted = shapes_wanted(model, config)
    except InputError as error:
        raise InputError(str(error), file=folder / CONFIG) from error
    compare(header, wanted, folder / WEIGHTS)
    tensors = read_finite(folder / WEIGHTS, header)
    report = add_adapter(model, config)  # its start is overwritten at once
    fill(model, tensors)
    for p in model.parameters():
        p.requires_grad_(p.requires_grad and trainable)
    return report


def read_adapter_config(file: Path, model_type: str) -> Any:
    """adapter_config.json -> our config; refuses what is not implemented, and keys that are not PEFT's."""
    given = read_object(file)
    kind = given.get("peft_type")
    if kind not in PEFT_TYPES:
        raise InputError(f"{kind!r} is not supported ({', '.join(PEFT_TYPES)})", file=file, where="peft_type")
    method = PEFT_TYPES[kind]
    for key, value in given.items():
        if key in NEUTRAL[method]:
            if value not in NEUTRAL[method][key]:
                raise InputError(f"{value!r} is not supported", file=file, where=key)
        elif key not in IGNORED and value not in (None, False, {}, []):
            raise InputError(f"unknown field with value {value!r}", file=file, where=key)
    if given.get("megatron_core", "megatron.core") != "megatron.core":
        raise InputError("is not supported, and never imported", file=file, where="megatron_core")
    try:
        if method == "lora":
            return lora_config(given, model_type)
        length = required(given, "num_virtual_tokens")
        return PrefixConfig(length, init="peft") if method == "prefix" else PromptConfig(length, init="normal")
    except InputError as error:
        raise InputError(str(error), file=file) from error


def required(given: Mapping[str, Any], name: str) -> Any:
    """The value of a key that must be there."""
    if given.get(name) is None:
        raise InputError("is missing", where=name)
    return given[name]


def lora_config(given: Mapping[str, Any], model_type: str) -> LoRAConfig:
    """PEFT's names -> ours."""
    targets = given.get("target_modules")
    if targets is None:
        targets = DEFAULT_TARGETS[model_type]
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = "all-linear"
    elif not isinstance(targets, list | tuple) or not all(isinstance(t, str) for t in targets):
        raise InputError(f"{targets!r} must be 'all-linear' or a list of names", where="target_modules")
    return LoRAConfig(
        rank=given.get("r", 8),
        alpha=given.get("lora_alpha", 8),
        dropout=given.get("lora_dropout", 0.0),
        targets=targets if isinstance(targets, str) else tuple(targets),
    )


def shapes_wanted(model: Decoder, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """The names and shapes that the file of this adapter must have for this model."""
    c = model.config
    if isinstance(config, LoRAConfig):
        shapes: dict[str, tuple[int, ...]] = {}
        for path in targeted(model, config.targets):
            out, width = model.get_parameter(f"{path}.weight").shape
            shapes[f"base_model.model.{path}.lora_A.weight"] = (config.rank, int(width))
            shapes[f"base_model.model.{path}.lora_B.weight"] = (int(out), config.rank)
        return shapes
    assert isinstance(config, PrefixConfig | PromptConfig)
    wide = c.layers * 2 * c.kv_heads * c.head_width if isinstance(config, PrefixConfig) else c.width
    return {"prompt_embeddings": (config.length, wide)}


def compare(header: Header, wanted: Mapping[str, tuple[int, ...]], file: Path) -> None:
    """Hold the file's header against what the model and the config ask for."""
    missing = [name for name in wanted if name not in header]
    unexpected = [name for name in header if name not in wanted]
    if missing and len(unexpected) == len(header):
        first = next(iter(header), None)
        raise InputError(f"no adapter tensors recognised; the first is {first!r}, want {missing[0]!r}", file=file)
    if missing:
        raise InputError(f"missing tensors: {', '.join(missing[:3])} ({len(missing)} in all)", file=file)
    if unexpected:
        raise InputError(f"{len(unexpected)} tensors are not used: {', '.join(unexpected[:3])}", file=file)
    for name, (raw, info) in header.items():
        where = f"tensor {raw!r}"
        if info.shape != wanted[name]:
            hint = "Is the adapter for another model?"
            raise InputError(f"shape {list(info.shape)}, want {list(wanted[name])}", file=file, where=where, hint=hint)
        if info.dtype not in FLOATS:
            raise InputError(f"dtype {info.dtype}, want {'/'.join(FLOATS)}", file=file, where=where)


def read_finite(file: Path, header: Header) -> dict[str, Tensor]:
    """The tensors in float32, copied out of the file (which may be rewritten while it is mapped), all finite."""
    from safetensors import safe_open

    tensors = {}
    with safe_open(file, framework="pt") as opened:
        for name, (raw, _) in header.items():
            tensors[name] = opened.get_tensor(raw).to(torch.float32, copy=True)
            if not torch.isfinite(tensors[name]).all():
                raise InputError("holds NaN or Inf", file=file, where=f"tensor {raw!r}")
    return tensors


def fill(model: Decoder, tensors: dict[str, Tensor]) -> None:
    """Copy loaded tensors into the adapter that stands in the model."""
    with torch.no_grad():
        if isinstance(model.adapter, LoRAConfig):
            for path, layer in lora_layers(model).items():
                for letter in "AB":
                    getattr(layer, f"lora_{letter}").copy_(tensors[f"base_model.model.{path}.lora_{letter}.weight"])
        elif isinstance(model.adapter, PrefixConfig):
            for attention, key, value in zip(attentions(model), *prefix_tensors(tensors["prompt_embeddings"], model)):
                attention.prefix.key.copy_(key)
                attention.prefix.value.copy_(value)
        else:
            model.prompt.weight.copy_(tensors["prompt_embeddings"])
