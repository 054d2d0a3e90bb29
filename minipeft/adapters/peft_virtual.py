"""Prefix and prompt in HF PEFT's format, and what PEFT's two files cannot hold in two more that PEFT never reads.

    prompt_embeddings             a prompt's [P, C]; a prefix's [P, L * 2 * K * D]: of each virtual token, in each
                                  layer, its key, then its value (after rotary)
    gates [L, H]                  of a gated prefix, a type of its own that PEFT does not know

    minipeft_adapter.json         the config: init, text, whether a sliding window hides the virtual tokens, ...
    minipeft_state.safetensors    the reparameterization MLP and the fixed init of the table; with `reparam` only

PEFT's files hold the table with the MLP folded in, so that inference needs nothing else. Without
our two files the adapter is PEFT's: a plain table, hidden by a sliding window as PEFT's is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from minipeft.adapters.method import PeftFormat
from minipeft.adapters.prefix import GatedPrefix, Prefix, PrefixConfig, list_attentions, list_prefixes
from minipeft.adapters.prompt import Prompt, PromptConfig
from minipeft.errors import InputError
from minipeft.files import read_object, write_json
from minipeft.models import Decoder
from minipeft.tensor_files import check_header, read_header, write_tensors

GATED = "GATED_PREFIX_TUNING"  # peft_type of a gated prefix, so that PEFT refuses it instead of applying it ungated
OWN, STATE = "minipeft_adapter.json", "minipeft_state.safetensors"
ROUNDING = 1e-4  # between the stored table and the one that the MLP computes: another machine's products differ

C = TypeVar("C", PrefixConfig, PromptConfig)


# The table, and PEFT's two files.


def collect_table(model: Decoder) -> Tensor:
    """All virtual tokens as PEFT's one table, an MLP folded in: a prompt's [P, C], a prefix's [P, L * 2 * K * D]"""
    if model.prompt is not None:
        return model.prompt.vectors().detach()
    layers = [torch.stack(prefix.key_value()) for prefix in list_prefixes(model)]  # each [2, K, P, D]
    return torch.stack(layers).permute(3, 0, 1, 2, 4).flatten(1).detach()


def split_table(table: Tensor, model: Decoder) -> tuple[Tensor, Tensor]:
    """A prefix's table [P, L * 2 * K * D] -> keys and values, two of [L, K, P, D]"""
    c = model.config
    keys, values = table.view(-1, c.layers, 2, c.kv_heads, c.head_width).permute(2, 1, 3, 0, 4)
    return keys, values


def prefix_json(config: PrefixConfig, model: Decoder) -> dict[str, object]:
    """adapter_config.json of prefix-tuning; token_dim counts the key/value heads, as PEFT does since 0.12."""
    return {
        "peft_type": GATED if config.gate else "PREFIX_TUNING",
        "encoder_hidden_size": model.config.width,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": config.length,
        "prefix_projection": False,
        **prefix_shape(model),
    }


def prefix_shape(model: Decoder) -> dict[str, object]:
    """The keys of adapter_config.json that define the layout of a prefix's table."""
    c = model.config
    return {"num_attention_heads": c.kv_heads, "num_layers": c.layers, "token_dim": c.kv_heads * c.head_width}


def prompt_json(config: PromptConfig, model: Decoder) -> dict[str, object]:
    """adapter_config.json of prompt tuning."""
    return {
        "peft_type": "PROMPT_TUNING",
        "num_attention_heads": model.config.heads,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": config.length,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
        **prompt_shape(model),
    }


def prompt_shape(model: Decoder) -> dict[str, object]:
    """The keys of adapter_config.json that a prompt's table depends on."""
    return {"num_layers": model.config.layers, "token_dim": model.config.width}


def check_shape(given: Mapping[str, Any], wanted: Mapping[str, object]) -> None:
    """Check the keys that define the table's layout: a table of equal width and another layout would be misread.

    Raises:
        InputError: a key has another value.
    """
    for name, value in wanted.items():
        if given.get(name) is not None and (given[name] != value or isinstance(given[name], bool)):
            hint = "Is the adapter for another model?"
            raise InputError(f"{given[name]!r}, but this model needs {value}", where=name, hint=hint)


def prefix_config(given: Mapping[str, Any]) -> PrefixConfig:
    """PEFT's keys -> ours."""
    return PrefixConfig(read_virtual_tokens(given), init="peft", gate=given["peft_type"] == GATED)


def prompt_config(given: Mapping[str, Any]) -> PromptConfig:
    """PEFT's keys -> ours."""
    return PromptConfig(read_virtual_tokens(given), init="normal")


def read_virtual_tokens(given: Mapping[str, Any]) -> Any:
    """Read num_virtual_tokens, which is required."""
    if given.get("num_virtual_tokens") is None:
        raise InputError("is missing", where="num_virtual_tokens")
    return given["num_virtual_tokens"]


def prefix_shapes(model: Decoder, config: PrefixConfig) -> dict[str, tuple[int, ...]]:
    """The names and shapes that the file of this adapter must have for this model."""
    c = model.config
    gates = {"gates": (c.layers, c.heads)} if config.gate else {}
    return {"prompt_embeddings": (config.length, c.layers * 2 * c.kv_heads * c.head_width), **gates}


def prompt_shapes(model: Decoder, config: PromptConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape that the file of this adapter must have for this model."""
    return {"prompt_embeddings": (config.length, model.config.width)}


def prefix_tensors(model: Decoder) -> dict[str, Tensor]:
    """The table, and the gates of a gated prefix."""
    gates = [a.beside.gate for a in list_attentions(model) if a.beside is not None]
    return {"prompt_embeddings": collect_table(model)} | ({"gates": torch.stack(gates)} if gates else {})


def prompt_tensors(model: Decoder) -> dict[str, Tensor]:
    """The table."""
    return {"prompt_embeddings": collect_table(model)}


@torch.no_grad()
def fill_prefix(model: Decoder, tensors: dict[str, Tensor], folder: Path) -> None:
    """Copy the table and the gates into the prefixes; with an MLP, its state."""
    if model.adapter.reparam is not None:
        return fill_state(model, folder, tensors["prompt_embeddings"])
    for prefix, key, value in zip(list_prefixes(model), *split_table(tensors["prompt_embeddings"], model)):
        prefix.assign(key, value)
    for attention, gate in zip(list_attentions(model), tensors.get("gates", ())):
        attention.beside.gate.copy_(gate)


@torch.no_grad()
def fill_prompt(model: Decoder, tensors: dict[str, Tensor], folder: Path) -> None:
    """Copy the table into the prompt; with an MLP, its state."""
    if model.adapter.reparam is not None:
        return fill_state(model, folder, tensors["prompt_embeddings"])
    model.prompt.weight.copy_(tensors["prompt_embeddings"])


# Our two files.


def write_extra(model: Decoder, config: PrefixConfig | PromptConfig, folder: Path) -> None:
    """Write our config, and the MLP's state where there is one."""
    if config.reparam is not None:
        write_tensors(folder / STATE, collect_state(model))
    else:
        (folder / STATE).unlink(missing_ok=True)  # an older adapter's, in the same folder
    write_json(folder / OWN, dataclasses.asdict(config))


def collect_state(model: Decoder) -> dict[str, Tensor]:
    """Every tensor of the model's prefix or prompt, trained or fixed, by its path in the model; a shared one once."""
    kinds = GatedPrefix | Prefix | Prompt
    sites = [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
    found: dict[int, tuple[str, Tensor]] = {}
    for path, site in sites:
        for name, tensor in (*site.named_parameters(), *site.named_buffers()):
            found.setdefault(id(tensor), (f"{path}.{name}", tensor))
    return {name: tensor.detach() for name, tensor in found.values()}


def read_extra(config: C, folder: Path, trainable: bool) -> C:
    """Add the fields of our file to the config from PEFT's file; without `trainable`, a plain table.

    Raises:
        InputError: our file belongs to another adapter, or the state of its MLP is missing.
    """
    file = folder / OWN
    if not file.exists():
        return dataclasses.replace(config, windowed=not getattr(config, "gate", False))
    given = read_object(file)
    fields = {field.name for field in dataclasses.fields(config)}
    if unknown := [name for name in given if name not in fields]:
        raise InputError(f"unknown field {unknown[0]!r}", file=file)
    try:
        own = type(config)(**given)
    except InputError as error:
        raise InputError(str(error), file=file) from error
    for name in ("length", "gate"):
        if getattr(own, name, None) != getattr(config, name, None):
            problem = f"{getattr(own, name)!r}, but adapter_config.json says {getattr(config, name)!r}"
            hint = f"Delete {OWN} and {STATE} if they are another adapter's"
            raise InputError(problem, file=file, where=name, hint=hint)
    if not trainable:
        return dataclasses.replace(own, reparam=None)
    if own.reparam is not None and not (folder / STATE).exists():
        hint = f"Load it without trainable, or set reparam to null in {OWN} to train the table alone"
        problem = f"asks for a reparameterization MLP of width {own.reparam}, but {STATE} is missing"
        raise InputError(problem, file=file, hint=hint)
    return own


def fill_state(model: Decoder, folder: Path, table: Tensor) -> None:
    """Copy the MLP and the init into the model, and compare the table that they make with the stored one.

    Raises:
        InputError: a tensor is missing, unexpected, of another shape or not finite, or the tables differ.
    """
    from safetensors import safe_open

    file, wanted = folder / STATE, collect_state(model)
    header = read_header(file)
    check_header(header, {name: tuple(tensor.shape) for name, tensor in wanted.items()}, file, dtypes=("F32",))
    with safe_open(file, framework="pt") as stored:
        for name, tensor in wanted.items():
            given = stored.get_tensor(name)
            if not torch.isfinite(given).all():
                raise InputError("holds NaN or Inf", file=file, where=f"tensor {name!r}")
            tensor.copy_(given)
    made = collect_table(model).to(table.device)
    difference = float((made - table).abs().max() / table.abs().max().clamp(min=1e-6))
    if difference > ROUNDING:
        raise InputError(
            f"makes another table than adapter_model.safetensors holds (by {difference:.1e} of its largest entry)",
            file=file,
            hint=f"Delete {OWN} and {STATE} to use the stored table",
        )


def describe_virtual(given: Mapping[str, Any], header: Mapping[str, Any]) -> dict[str, object]:
    """Describe the number of virtual tokens."""
    return {"virtual tokens": given.get("num_virtual_tokens")}


PREFIX_FORMAT = PeftFormat(
    types=("PREFIX_TUNING", GATED),
    to_json=prefix_json,
    from_json=prefix_config,
    shapes=prefix_shapes,
    tensors=prefix_tensors,
    fill=fill_prefix,
    check=lambda given, model: check_shape(given, prefix_shape(model)),
    bare=lambda config: dataclasses.replace(config, init="peft"),
    read_extra=read_extra,
    write_extra=write_extra,
    describe=describe_virtual,
    fields={"length": "num_virtual_tokens"},
    known=frozenset({"encoder_hidden_size", "init_weights", "num_attention_heads", "num_layers", "num_virtual_tokens",
                     "prefix_projection", "token_dim"}),
    neutral={"modules_to_save": (None, []), "num_transformer_submodules": (None, 1)},
)  # fmt: skip

PROMPT_FORMAT = PeftFormat(
    types=("PROMPT_TUNING",),
    to_json=prompt_json,
    from_json=prompt_config,
    shapes=prompt_shapes,
    tensors=prompt_tensors,
    fill=fill_prompt,
    check=lambda given, model: check_shape(given, prompt_shape(model)),
    bare=lambda config: dataclasses.replace(config, init="normal"),
    read_extra=read_extra,
    write_extra=write_extra,
    describe=describe_virtual,
    fields={"length": "num_virtual_tokens"},
    known=frozenset({"num_attention_heads", "num_layers", "num_virtual_tokens", "prompt_tuning_init",
                     "prompt_tuning_init_text", "token_dim", "tokenizer_kwargs", "tokenizer_name_or_path"}),
    neutral={"modules_to_save": (None, []), "num_transformer_submodules": (None, 1)},
)  # fmt: skip
