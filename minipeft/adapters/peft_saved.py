"""Trained parts of the base in HF PEFT's LoRA files: keys of adapter_config.json, and each tensor's name and shape.

    base_model.model.<path>.weight, .bias                             modules_to_save, bias="all", a resized vocabulary
    base_model.model.<path>.base_layer.bias [out]                     bias, of an adapted linear
    base_model.model.<path>.token_adapter.trainable_tokens_delta      trainable_token_indices; [n, C], of a tie once
    base_model.model.<path>.lora_embedding_A [r, V]                   .lora_embedding_B [C, r]

Which modules a file holds whole is read from its tensors: PEFT writes embedding and head by itself where the vocabulary
was resized. For some of these files it also writes tensors that hold nothing new, which are left out:

    .modules_to_save.weight, .original_module.weight    beside .weight: the same again, and the base's
    .base_layer.weight                                  of an adapted embedding or head: must be the base's own
    .token_adapter.base_layer.weight                    of a resized table, into which the trained rows go
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minipeft.adapters.embedding import LoRAEmbedding, find_table_layers, plan_rows
from minipeft.adapters.lora import LoRAConfig, choose_ranks, find_lora_layers
from minipeft.adapters.peft_targets import ROOT
from minipeft.adapters.saved_modules import find_modules, find_saved_modules, list_leaves, name_tables, plan_saved
from minipeft.errors import InputError
from minipeft.models import Decoder
from minipeft.models.checkpoint import is_transposed
from minipeft.tensor_files import TensorInfo

ROWS, TABLE = ".token_adapter.trainable_tokens_delta", ".token_adapter.base_layer.weight"
BASE, BASE_BIAS = ".base_layer.weight", ".base_layer.bias"
REPEATED = (".modules_to_save.weight", ".original_module.weight")


def make_saved_json(config: LoRAConfig, model: Decoder) -> dict[str, object]:
    """bias, modules_to_save and, where it is set, trainable_token_indices."""
    whole = [path for path, module in find_saved_modules(model).items() if "weight" in module.copies]
    names = list(config.modules_to_save)
    if config.vocabulary is not None:
        names += [name for name in (path.rsplit(".", 1)[-1] for path in name_tables(model)) if name not in names]
    if set(find_named_by_peft(model, names)) != set(whole):
        names = whole
    given: dict[str, object] = {"bias": config.bias, "modules_to_save": names or None}
    if config.head_token_indices:
        tables = zip(name_tables(model), (config.trainable_token_indices, config.head_token_indices))
        rows = {path.rsplit(".", 1)[-1]: list(tokens) for path, tokens in tables if tokens}
        return {**given, "trainable_token_indices": rows}
    return {**given, "trainable_token_indices": list(config.trainable_token_indices)} if has_rows(config) else given


def find_named_by_peft(model: Decoder, names: list[str]) -> list[str]:
    """The modules that PEFT saves for these names: those whose path ends in one, "norm" in "input_layernorm" too."""
    roots = tuple(path for path, _ in model.named_modules() if path.endswith(tuple(names)))
    weighted = [path for path, module in model.named_modules() if module._parameters.get("weight") is not None]
    return [path for path in weighted if path in roots or path.startswith(tuple(f"{root}." for root in roots))]


def has_rows(config: LoRAConfig) -> bool:
    """Whether rows of a table are trained."""
    return bool(config.trainable_token_indices or config.head_token_indices)


def read_saved_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of LoRAConfig for PEFT's bias, modules_to_save and trainable_token_indices.

    Raises:
        InputError: trainable_token_indices is neither a list nor an object.
    """
    rows = given.get("trainable_token_indices") or []
    if not isinstance(rows, list | dict):
        raise InputError(f"{rows!r} must be a list of tokens or an object", where="trainable_token_indices")
    tables = rows if isinstance(rows, dict) else {"": rows}
    head = tables.get("lm_head", [])
    others = [tokens for name, tokens in tables.items() if name != "lm_head"]
    if len(others) > 1:
        raise InputError(f"names {list(tables)}: an embedding and a head at most", where="trainable_token_indices")
    return {
        "bias": given.get("bias", "none"),
        "modules_to_save": given.get("modules_to_save") or (),
        "trainable_token_indices": others[0] if others else (),
        "head_token_indices": head,
    }


def rename_saved(header: Mapping[str, TensorInfo], model: Decoder) -> dict[str, TensorInfo]:
    """The header without tensors that PEFT repeats, a resized table under its own name, and a tied head beside it."""
    kept = {}
    for name, info in header.items():
        stem = next((name.removesuffix(end) for end in REPEATED if name.endswith(end)), None)
        if stem is None or f"{stem}.weight" not in header:
            kept[name.removesuffix(TABLE) + ".weight" if name.endswith(TABLE) else name] = info
    embedding, head = (f"{ROOT}{path}.weight" for path in name_tables(model))
    resized = embedding in kept and kept[embedding].shape[:1] != (model.config.vocab_size,)
    if resized and head not in kept and model.config.tie_word_embeddings:
        kept[head] = kept[embedding]
    return kept


def fit_saved(config: LoRAConfig, model: Decoder, header: Mapping[str, TensorInfo]) -> tuple[LoRAConfig, list[str]]:
    """The config with the modules that the file really holds whole, and the size of their vocabulary, with notes.

    Raises:
        InputError: embedding and head have different sizes.
    """
    tables, notes = name_tables(model), []
    whole = {name.removeprefix(ROOT).rpartition(".")[0]: info for name, info in header.items() if is_whole(name, model)}
    sizes = {path: whole[path].shape[0] for path in tables if path in whole}
    size = next((n for n in sizes.values() if n != model.config.vocab_size), None)
    if size is not None:
        if set(sizes.values()) != {size} or len(sizes) < 2:
            problem = f"the vocabulary was resized, but not of embedding and head alike: {sizes}"
            raise InputError(problem, where="modules_to_save")
        notes.append(f"the vocabulary has {size} tokens, the base's {model.config.vocab_size}")
        if has_rows(config):
            notes.append("trainable_token_indices: the rows are read into the resized tables, which are whole here")
            config = dataclasses.replace(config, trainable_token_indices=(), head_token_indices=())
    names = tuple(name for name in config.modules_to_save if size is None or name not in list_endings(tables))
    if unmatched := [name for name in names if not list_modules(model, name)]:
        notes.append(f"modules_to_save: {', '.join(map(repr, unmatched))} matches nothing in this model")
    names = tuple(name for name in names if name not in unmatched)
    known = {path for name in names for path in list_modules(model, name)}
    names += tuple(path for path in whole if path not in known and (size is None or path not in tables))
    head = config.head_token_indices
    if model.config.tie_word_embeddings and head == config.trainable_token_indices:
        head = ()  # PEFT: equal rows of tied tables are one
    return dataclasses.replace(config, modules_to_save=names, vocabulary=size, head_token_indices=head), notes


def list_endings(paths: tuple[str, ...]) -> set[str]:
    """The paths and their last names."""
    return {*paths, *(path.rsplit(".", 1)[-1] for path in paths)}


def is_whole(name: str, model: Decoder) -> bool:
    """Whether a tensor is the weight of a module of the base."""
    path, _, last = name.removeprefix(ROOT).rpartition(".")
    return last == "weight" and name.startswith(ROOT) and path in dict(model.named_modules())


def list_modules(model: Decoder, name: str) -> list[str]:
    """The modules with parameters that a name names."""
    try:
        return find_modules(model, name, list_leaves(model))
    except InputError:
        return []


def list_saved_shapes(model: Decoder, config: LoRAConfig) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the parts of the base that the file must hold."""
    shapes: dict[str, tuple[int, ...]] = {}
    targets = choose_ranks(model, config)
    for path, names in plan_saved(model, config, targets).items():
        for name in names:
            shape = tuple(model.get_parameter(f"{path}.{name}").shape)
            if config.vocabulary is not None and path in name_tables(model):
                shape = (config.vocabulary, *shape[1:])
            shapes[f"{ROOT}{path}.{name}"] = shape[::-1] if is_transposed(f"{path}.{name}", model) else shape
    if config.bias != "none":
        biases = {path: model.get_submodule(path)._parameters.get("bias") for path in targets}
        shapes |= {f"{ROOT}{path}{BASE_BIAS}": tuple(b.shape) for path, b in biases.items() if b is not None}
    rows = plan_rows(model, config.trainable_token_indices, config.head_token_indices)
    if model.config.tie_word_embeddings and not config.head_token_indices:
        rows.pop("lm_head", None)
    width = model.embedding.weight.shape[1]
    return shapes | {f"{ROOT}{path}{ROWS}": (len(tokens), width) for path, tokens in rows.items()}


def list_optional_shapes(
    model: Decoder, config: LoRAConfig, given: Mapping[str, Any], header: Mapping[str, TensorInfo]
) -> dict[str, tuple[int, ...]]:
    """The names and shapes of tensors that PEFT may write, and that settle_saved takes out."""
    weight = model.embedding.weight
    targets = choose_ranks(model, config)
    shapes = {f"{ROOT}{path}{BASE}": tuple(weight.shape) for path in name_tables(model) if path in targets}
    if config.vocabulary is not None:
        for path, tokens in read_rows(given, model).items():
            shapes[f"{ROOT}{path}{ROWS}"] = (len(tokens), weight.shape[1])
    return {name: shape for name, shape in shapes.items() if name in header}


def read_rows(given: Mapping[str, Any], model: Decoder) -> dict[str, Any]:
    """The tokens of trainable_token_indices by the table's path; a head without tokens of its own has the other's."""
    fields = read_saved_fields(given)
    embedding, head = name_tables(model)
    tokens = fields["trainable_token_indices"]
    return {embedding: tokens, head: fields["head_token_indices"] or tokens}


def settle_saved(given: Mapping[str, Any], tensors: dict[str, Tensor], model: Decoder, file: Path) -> dict[str, Tensor]:
    """The tensors without the base's own tables, and with trained rows in a resized table.

    Raises:
        InputError: the file's table is not the base's.
    """
    tensors = dict(tensors)
    for path, tokens in read_rows(given, model).items():
        weight: Tensor = model.get_submodule(path).weight  # type: ignore[assignment]
        table = tensors.pop(f"{ROOT}{path}{BASE}", None)
        if table is not None and not torch.equal(table.to(weight), weight.detach()):
            hint = "Merge the adapter into its own base with PEFT, and load that"
            raise InputError("is not the base's", file=file, where=f"tensor '{ROOT}{path}{BASE}'", hint=hint)
        if f"{ROOT}{path}.weight" in tensors and (rows := tensors.pop(f"{ROOT}{path}{ROWS}", None)) is not None:
            tensors[f"{ROOT}{path}.weight"][list(tokens)] = rows
    return tensors


def find_saved_parts(model: Decoder) -> dict[str, Tensor]:
    """The trained parts of the base in the model, by PEFT's names; GPT-2's weights as they are here."""
    parts: dict[str, Tensor] = {}
    for path, module in find_saved_modules(model).items():
        parts |= {f"{ROOT}{path}.{name}": t for name, t in module.copies.items()}
    for path, layer in find_lora_layers(model).items():
        if layer.trained_bias is not None:
            parts[f"{ROOT}{path}{BASE_BIAS}"] = layer.trained_bias
    known: set[int] = set()
    for path, table in find_table_layers(model).items():
        if isinstance(table, LoRAEmbedding):
            parts |= {f"{ROOT}{path}.{name}": t for name, t in table.own_tensors().items()}
        elif id(table.token_rows) not in known:
            parts[f"{ROOT}{path}{ROWS}"] = table.token_rows
            known.add(id(table.token_rows))
    return parts


def list_saved_tensors(model: Decoder) -> dict[str, Tensor]:
    """The trained parts of the base as the file holds them."""
    held = find_saved_parts(model)
    return {name: t.t() if is_transposed(name.removeprefix(ROOT), model) else t for name, t in held.items()}


@torch.no_grad()
def fill_saved(model: Decoder, tensors: Mapping[str, Tensor]) -> None:
    """Copy loaded tensors into the trained parts of the base."""
    for name, part in find_saved_parts(model).items():
        read = tensors[name]
        part.copy_(read.t() if is_transposed(name.removeprefix(ROOT), model) else read)
