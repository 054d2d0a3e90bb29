"""Modules of the base that are trained whole beside an adapter (PEFT's modules_to_save and bias), and a new vocabulary.

    modules_to_save=("lm_head", "norm")    every parameter of these modules
    bias="all"                             every bias; bias="lora_only": those of the adapted linears (lora.py)
    vocabulary=32002                       embedding and head, with rows added or cut

A SavedModule computes what the module does, with float32 copies of the trained parameters. The base's own keep their
names and bytes, so that removing the adapter restores the model, and a tied weight stays tied. The copies of embedding
and head are two tensors, also where the base ties them: as in PEFT, training unties them, and so does merging.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from minipeft.adapters.surgery import replace
from minipeft.adapters.trainable import TrainableModule
from minipeft.errors import InputError
from minipeft.models import Decoder
from minipeft.models.quantized import QuantizedWeight

BIASES = ("none", "lora_only", "all")
COPY = "saved_"  # prefix of a trained copy's name


class SavedModule(TrainableModule):
    """A module of the base, computed with trained copies of the parameters in `names`."""

    def __init__(self, module: nn.Module, names: Iterable[str], rows: int | None = None):
        """Copy the parameters `names`; with `rows`, copies of so many rows, new ones the mean of the others."""
        super().__init__()
        self.kept = (module,)  # in a tuple: its code is used, its parameters are registered here
        for name, p in module.named_parameters():
            self.register_parameter(name, p)
        for name in names:
            self.register_parameter(COPY + name, nn.Parameter(resize(getattr(module, name).detach().float(), rows)))

    @property
    def adopted(self) -> tuple[str, ...]:
        return tuple(name for name in self._parameters if not name.startswith(COPY))

    @property
    def copies(self) -> dict[str, Tensor]:
        """The trained copies, by the names of the base's parameters."""
        return {name.removeprefix(COPY): t for name, t in self.own_tensors().items()}

    def used(self) -> dict[str, Tensor]:
        """The parameters that the module computes with, in the base's dtype."""
        base = {name: getattr(self, name) for name in self.adopted}
        return base | {name: t.to(base[name].dtype) for name, t in self.copies.items()}

    def forward(self, *arguments: Any) -> Any:
        return functional_call(self.kept[0], self.used(), arguments)

    def head_parts(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, of a head. [V, C], [V]"""
        used = self.used()
        return used["weight"], used.get("bias")

    def merged_tensors(self) -> list[tuple[str, Tensor]]:
        """The trained parameters, in float32."""
        return list(self.copies.items())

    def plain(self) -> nn.Module:
        """The module, with the base's parameters."""
        module = self.kept[0]
        for name in self.adopted:
            setattr(module, name, getattr(self, name))
        if isinstance(module, nn.Embedding):
            module.num_embeddings = len(module.weight)
        elif isinstance(module, nn.Linear):
            module.out_features = len(module.weight)
        return module

    def extra_repr(self) -> str:
        return f"{self.kept[0]!r}, trained: {', '.join(self.copies)}"


def resize(table: Tensor, rows: int | None) -> Tensor:
    """A copy with so many rows; a new one is the mean of the others (Hewitt 2021). [V, ...] -> [rows, ...]"""
    if rows is None or rows <= len(table):
        return table[:rows].clone()
    return torch.cat([table, table.mean(0, keepdim=True).expand(rows - len(table), *table.shape[1:])])


def name_tables(model: Decoder) -> tuple[str, str]:
    """The paths of embedding and head."""
    return model.family.embedding, "lm_head"


def plan_saved(model: Decoder, config: Any, adapted: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The modules to train whole, by path, each with the names of its trained parameters. `adapted`: paths of targets,
    whose biases their own layers train.

    Raises:
        InputError: a name matches nothing, or a target; a weight is quantized.
    """
    leaves = list_leaves(model)
    found: dict[str, tuple[str, ...]] = {}
    if config.bias == "all":
        found = {path: ("bias",) for path, m in leaves.items() if m._parameters.get("bias") is not None}
    whole = dict.fromkeys(name_tables(model)) if config.vocabulary is not None else {}
    for name in config.modules_to_save:
        whole |= dict.fromkeys(find_modules(model, name, leaves))
    for path in whole:
        if path in adapted:
            raise InputError(f"{path!r} is also a target", where="modules_to_save")
        found[path] = tuple(name for name, _ in leaves[path].named_parameters())
        if isinstance(leaves[path]._parameters.get("weight"), QuantizedWeight):
            raise InputError(f"{path!r} is quantized and cannot be trained", where="modules_to_save")
    return {path: found[path] for path in leaves if path in found and (path in whole or path not in adapted)}


def list_leaves(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that have parameters of their own, by path."""
    return {path: m for path, m in model.named_modules() if any(p is not None for p in m._parameters.values())}


def find_modules(model: Decoder, name: str, leaves: Mapping[str, nn.Module]) -> list[str]:
    """The modules with parameters that are this name, end in "." + it, or lie within such a module.

    Raises:
        InputError: there is none.
    """
    roots = [path for path, _ in model.named_modules() if path == name or path.endswith("." + name)]
    found = [path for path in leaves if any(path == root or path.startswith(root + ".") for root in roots)]
    if not name or not found:
        known = sorted({path.rsplit(".", 1)[-1] for path in leaves})
        raise InputError(f"no module is named {name!r}; this model has {known}", where="modules_to_save")
    return found


def add_saved(model: Decoder, config: Any, planned: Mapping[str, tuple[str, ...]]) -> None:
    """Put a SavedModule in the place of each planned module; with `vocabulary` the config has that size."""
    tables = name_tables(model) if config.vocabulary is not None else ()
    for path, names in planned.items():
        rows = config.vocabulary if path in tables else None
        replace(model, path, SavedModule(model.get_submodule(path), names, rows).train(model.training))
    if tables:
        model.config = dataclasses.replace(model.config, vocab_size=config.vocabulary)


def find_saved_modules(model: nn.Module) -> dict[str, SavedModule]:
    """The model's SavedModules by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, SavedModule)}


def count_saved(model: Decoder, config: Any, planned: Mapping[str, tuple[str, ...]]) -> int:
    """Count the parameters of the copies."""
    tables = name_tables(model) if config.vocabulary is not None else ()
    count = 0
    for path, names in planned.items():
        for name in names:
            p = model.get_parameter(f"{path}.{name}")
            count += p.numel() if path not in tables else p.numel() // len(p) * config.vocabulary
    return count
