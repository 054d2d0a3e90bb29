"""Adapters on disk in Hugging Face PEFT's format, both ways: adapter_config.json + adapter_model.safetensors.

    LoRA     base_model.model.<path of the linear>.lora_A.weight [r, in]   .lora_B.weight [out, r]     (peft_lora.py)
    (IA)3    base_model.model.<path of the linear>.ia3_l [out, 1]
    prefix   prompt_embeddings [P, L * 2 * K * D]: of each column, in each layer, its key, then its value (after rotary)
    gated    the same, and gates [L, H]; a type of its own, that PEFT does not know
    prompt   prompt_embeddings [P, C]

The config has PEFT's own keys and no key of ours. Loading is strict: what is missing, unexpected, of another shape, not
finite, or asks for a feature that is not here is an error that names file and entry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minipeft.adapters import (
    AdapterConfig,
    AdapterReport,
    FullConfig,
    IA3Config,
    LoRAConfig,
    PrefixConfig,
    PromptConfig,
    adapter_of,
    add_adapter,
    method_of,
    remove_adapter,
)
from minipeft.adapters.peft_lora import (
    fill_ia3,
    fill_lora,
    ia3_config,
    ia3_json,
    ia3_shapes,
    ia3_tensors,
    lora_config,
    lora_json,
    lora_shapes,
    lora_tensors,
)
from minipeft.adapters.peft_virtual import GATED, columns_of, fill_state, with_own, write_own
from minipeft.adapters.prefix import attentions, prefixes
from minipeft.errors import InputError
from minipeft.files import TensorInfo, read_header, read_object, write_json, write_tensors
from minipeft.models import Decoder

CONFIG, WEIGHTS, LEGACY = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
BLOCKS = {"gpt2": "h", "llama": "layers", "mistral": "layers"}  # the name of the list of blocks
PEFT_TYPES = {"LORA": "lora", "IA3": "ia3", "PREFIX_TUNING": "prefix", GATED: "prefix", "PROMPT_TUNING": "prompt"}
Header = Mapping[str, tuple[str, TensorInfo]]  # our name -> the file's name, and what its header says of it
FLOATS = ("F32", "F16", "BF16", "F64")

# Every key of PEFT 0.21 that changes what an adapter computes and is not honoured here, with the values at which it
# changes nothing. A file that asks for anything else asks for what is not implemented.
NEUTRAL: dict[str, dict[str, tuple[object, ...]]] = {
    "lora": {
        "alora_invocation_tokens": (None,), "arrow_config": (None,), "bias": ("none",), "corda_config": (None,),
        "ensure_weight_tying": (False, None), "eva_config": (None,), "exclude_modules": (None, []),
        "init_lora_weights": (True, False, "gaussian"), "kasa_config": (None,), "layer_replication": (None,),
        "loftq_config": ({}, None), "lora_ga_config": (None,), "megatron_config": (None,),
        "megatron_core": ("megatron.core", None), "modules_to_save": (None, []), "monteclora_config": (None,),
        "target_parameters": (None, []), "trainable_token_indices": (None,), "use_bdlora": (None, False),
        "use_qalora": (False, None), "velora_config": (None,),
    },
    "ia3": {"exclude_modules": (None, []), "modules_to_save": (None, [])},
    "prefix": {"modules_to_save": (None, []), "num_transformer_submodules": (None, 1)},
    "prompt": {"modules_to_save": (None, []), "num_transformer_submodules": (None, 1)},
}  # fmt: skip
# The keys that are honoured, and those that change nothing in an adapter that lies on disk.
KNOWN: dict[str, set[str]] = {
    "lora": {"alpha_pattern", "fan_in_fan_out", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_bias",
             "lora_dropout", "qalora_group_size", "r", "rank_pattern", "target_modules", "use_dora", "use_rslora"},
    "ia3": {"fan_in_fan_out", "feedforward_modules", "init_ia3_weights", "target_modules"},
    "prefix": {"encoder_hidden_size", "init_weights", "num_attention_heads", "num_layers", "num_virtual_tokens",
               "prefix_projection", "token_dim"},
    "prompt": {"num_attention_heads", "num_layers", "num_virtual_tokens", "prompt_tuning_init",
               "prompt_tuning_init_text", "token_dim", "tokenizer_kwargs", "tokenizer_name_or_path"},
}  # fmt: skip
ANY = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision",
       "runtime_config", "task_type"}  # fmt: skip
FIELDS = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules",
          "layers": "layers_to_transform", "rslora": "use_rslora", "dora": "use_dora", "length": "num_virtual_tokens",
          "feedforward": "feedforward_modules"}  # fmt: skip


def save_adapter(model: Decoder, folder: str | Path) -> None:
    """Write the model's adapter to `folder` as PEFT would; each file whole or not at all.

    Raises:
        InputError: the model holds no adapter, or was tuned in full (save_model keeps that); the folder refuses.
    """
    config = adapter_of(model)
    if not isinstance(config, AdapterConfig) or isinstance(config, FullConfig):
        held = "no adapter" if config is None else method_of(config)
        raise InputError(f"the model holds {held}", where="save_adapter", hint="save_model writes the whole model")
    if isinstance(config, LoRAConfig):
        given, tensors = lora_json(config, model), lora_tensors(model)
    elif isinstance(config, IA3Config):
        given, tensors = ia3_json(config, model), ia3_tensors(model)
    elif isinstance(config, PrefixConfig):
        given, tensors = prefix_json(config, model), {"prompt_embeddings": columns_of(model)}
        if config.gate:
            tensors["gates"] = torch.stack([a.beside.gate for a in attentions(model)])  # [L, H]
    else:
        given, tensors = prompt_json(config, model), {"prompt_embeddings": columns_of(model)}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise InputError("holds NaN or Inf, and is not saved", where=name)
    write_tensors(Path(folder) / WEIGHTS, tensors)
    write_json(Path(folder) / CONFIG, dict(sorted({**shared_json(model), **given}.items())))
    write_own(model, config, Path(folder))


def shared_json(model: Decoder) -> dict[str, object]:
    """The keys that every PEFT config has."""
    return {
        "base_model_name_or_path": model.source,
        "inference_mode": True,
        "modules_to_save": None,
        "revision": None,
        "task_type": "CAUSAL_LM",  # without it PEFT loads a prefix and never applies it
    }


def prefix_json(config: PrefixConfig, model: Decoder) -> dict[str, object]:
    """adapter_config.json of prefix-tuning; token_dim counts the key/value heads, as PEFT does since 0.12."""
    c = model.config
    return {
        "peft_type": GATED if config.gate else "PREFIX_TUNING",
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
    if adapter_of(model) is not None:
        add_adapter(model, FullConfig())  # says what the model holds and what to do
    config, tensors, notes = read_adapter(model, Path(folder))
    if isinstance(config, PrefixConfig | PromptConfig):
        config = with_own(config, Path(folder), trainable=trainable)
    report = add_adapter(model, without_text(config))  # its start is overwritten at once
    model.adapter = config
    try:
        if isinstance(config, PrefixConfig | PromptConfig) and config.reparam is not None:
            fill_state(model, Path(folder), tensors["prompt_embeddings"])
        else:
            fill(model, tensors, Path(folder))
    except InputError:
        remove_adapter(model)
        raise
    if not trainable:
        for p in model.parameters():
            p.requires_grad_(False)
        report = dataclasses.replace(report, trainable=0)
    return dataclasses.replace(report, notes=notes)


def without_text(config: AdapterConfig) -> AdapterConfig:
    """The config with a start that needs no tokenizer, for an adapter that will be filled from files."""
    if isinstance(config, PrefixConfig | PromptConfig):
        return dataclasses.replace(config, init="peft" if isinstance(config, PrefixConfig) else "normal")
    return config


def read_adapter(model: Decoder, folder: Path) -> tuple[Any, dict[str, Tensor], tuple[str, ...]]:
    """The config, the tensors under PEFT's names and what is notable of the adapter in `folder`, checked against the
    model, which is not touched."""
    file = folder / WEIGHTS
    given = read_object(folder / CONFIG)
    try:
        config = config_from(given, model.config.model_type)
        wanted = shapes_wanted(model, config)
    except InputError as error:
        field, separator, problem = str(error).partition(": ")
        raise InputError(FIELDS.get(field, field) + separator + problem, file=folder / CONFIG) from error
    if not file.exists() and (folder / LEGACY).exists():
        hint = "Load it with PEFT and save it again: its save_pretrained writes safetensors"
        raise InputError(f"holds only {LEGACY}, a pickle, which is not read", file=folder, hint=hint)
    raw = read_header(file)
    header = {name.replace(".default.", "."): (name, info) for name, info in raw.items()}  # old PEFT's, by adapter name
    if len(header) < len(raw):
        raise InputError("a tensor is there twice, with and without '.default.'", file=file)
    compare(header, wanted, file)
    notes = []
    base = given.get("base_model_name_or_path")
    if base and model.source and Path(str(base)).name != Path(model.source).name:
        notes.append(f"trained on {base}, loaded on {model.source}")
    if any(info.dtype == "F64" for info in raw.values()):
        notes.append("float64 in the file, float32 here")
    return config, read_finite(file, header), tuple(notes)


def config_from(given: Mapping[str, Any], model_type: str) -> Any:
    """adapter_config.json -> our config; refuses what is not implemented, and keys that are not PEFT's."""
    kind = given.get("peft_type")
    if not isinstance(kind, str) or kind not in PEFT_TYPES:
        raise InputError(f"{kind!r} is not supported ({', '.join(PEFT_TYPES)})", where="peft_type")
    method = PEFT_TYPES[kind]
    for key, value in given.items():
        if key in NEUTRAL[method]:
            if value not in NEUTRAL[method][key]:
                raise InputError(f"{value!r} is not supported", where=key)
        elif key not in KNOWN[method] | ANY and value not in (None, False, {}, []):
            raise InputError(f"unknown field with value {value!r}", where=key)
    if given.get("layers_pattern") not in (None, "", [], BLOCKS[model_type], [BLOCKS[model_type]]):
        wanted = f"{given['layers_pattern']!r} is not supported (this model's blocks are {BLOCKS[model_type]!r})"
        raise InputError(wanted, where="layers_pattern")
    if method == "lora":
        return lora_config(given)
    if method == "ia3":
        return ia3_config(given)
    length = required(given, "num_virtual_tokens")
    if method == "prompt":
        return PromptConfig(length, init="normal")
    return PrefixConfig(length, init="peft", gate=kind == GATED)


def required(given: Mapping[str, Any], name: str) -> Any:
    """The value of a key that must be there."""
    if given.get(name) is None:
        raise InputError("is missing", where=name)
    return given[name]


def shapes_wanted(model: Decoder, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """The names and shapes that the file of this adapter must have for this model."""
    c = model.config
    if isinstance(config, LoRAConfig):
        return lora_shapes(model, config)
    if isinstance(config, IA3Config):
        return ia3_shapes(model, config)
    assert isinstance(config, PrefixConfig | PromptConfig)
    wide = c.layers * 2 * c.kv_heads * c.head_width if isinstance(config, PrefixConfig) else c.width
    gates = {"gates": (c.layers, c.heads)} if isinstance(config, PrefixConfig) and config.gate else {}
    return {"prompt_embeddings": (config.length, wide), **gates}


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


def fill(model: Decoder, tensors: dict[str, Tensor], folder: Path) -> None:
    """Copy loaded tensors into the adapter that stands in the model."""
    with torch.no_grad():
        if isinstance(model.adapter, LoRAConfig):
            fill_lora(model, tensors)
        elif isinstance(model.adapter, IA3Config):
            fill_ia3(model, tensors)
        elif getattr(model.adapter, "reparam", None) is not None:
            fill_state(model, folder, tensors["prompt_embeddings"])
        elif isinstance(model.adapter, PrefixConfig):
            for prefix, key, value in zip(prefixes(model), *prefix_tensors(tensors["prompt_embeddings"], model)):
                prefix.assign(key, value)
            for attention, gate in zip(attentions(model), tensors.get("gates", ())):
                attention.beside.gate.copy_(gate)
        else:
            model.prompt.weight.copy_(tensors["prompt_embeddings"])
