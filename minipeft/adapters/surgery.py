"""Replace, restore and merge linears and tables, for LoRA, (IA)3, VeRA and the bank.

A module that replaces a linear adopts its Parameters, and merging or removing returns them to a plain nn.Linear: the
names in state_dict(), ties, and every byte of the base stay the same. A layer of another kind says by `plain()` what
stands there without it, and by `compute_merged()` what the base's parameters become. If a merge makes embedding and
head of a tied base differ, it unties them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from minipeft.adapters.verdict import MergeReport
from minipeft.errors import InputError


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`."""
    parent, _, last = path.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def restore(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Replace each adapted linear by a plain nn.Linear with the same Parameters, another module by its `plain()`.

    The original linear is not reused: it may hold an old weight, if the model was loaded again since.
    """
    for path, layer in layers.items():
        if hasattr(layer, "plain"):
            replace(model, path, cast(Any, layer).plain().train(model.training))
            continue
        out, width = layer.weight.shape  # type: ignore[misc]
        linear = nn.Linear(int(width), int(out), bias=layer.bias is not None, device="meta")
        linear.weight, linear.bias = layer.weight, layer.bias  # type: ignore[assignment]
        replace(model, path, linear.train(model.training))


def merge(model: nn.Module, layers: Mapping[str, Any]) -> MergeReport:
    """Give each adapted module the parameters of its merged form, summed in float32 and rounded once to nearest
    (results/merge-rounding/report.md: no other rounding brings the merged model nearer as it is run).

    Each is computed twice: first all are checked, so that a refusal touches nothing, then they are written. Only one
    stands in memory at a time.

    Raises:
        InputError: a weight is tied to another module's, or the merged weight would not be finite in its dtype.
    """
    tables = find_tied_tables(model)
    check_ties(model, layers, tables)
    largest, missed, whole = 0.0, 0.0, 0.0
    with torch.no_grad():
        for path, layer in layers.items():
            for name, new in compute_merged(path, layer):
                old = getattr(layer, name)
                result = new.to(old.dtype)
                if not torch.isfinite(result).all():
                    raise InputError(f"cannot merge into {path!r}: the merged weight would not be finite")
                rows = min(len(old), len(new))  # of a resized vocabulary, those that were there
                change, update = result[:rows].float() - old[:rows].float(), new[:rows] - old[:rows].float()
                largest = max(largest, change.abs().max().item())
                missed += (change - update).square().sum().item()
                whole += update.square().sum().item()
                del old, new, result, change, update
        tied = bool(tables) and stays_tied(layers, tables)
        if tables and not tied:
            untie(model)
        for path, layer in layers.items():
            shared = tied and path == tables[1] and tables[0] in layers  # the embedding writes the shared weight
            write_merged(path, layer, skipped=("weight",) if shared else ())
    restore(model, layers)
    if tied:
        model.tie()  # type: ignore[operator]
    return MergeReport(len(layers), largest, math.sqrt(missed / whole) if whole else 0.0)


def write_merged(path: str, layer: Any, skipped: tuple[str, ...] = ()) -> None:
    """Write the merged parameters of a layer; one of another size, after a resized vocabulary, is a new Parameter."""
    for name, new in compute_merged(path, layer):
        old = getattr(layer, name)
        if name in skipped:
            continue
        if old.shape == new.shape:
            old.copy_(new)
        else:
            setattr(layer, name, nn.Parameter(new.to(old.dtype)))
        del old, new


def find_tied_tables(model: nn.Module) -> tuple[str, ...]:
    """The paths of embedding and head, if they share a weight."""
    head, family = getattr(model, "lm_head", None), getattr(model, "family", None)
    if head is None or family is None or head.weight is not model.get_submodule(family.embedding).weight:
        return ()
    return family.embedding, "lm_head"


def stays_tied(layers: Mapping[str, Any], tables: tuple[str, ...]) -> bool:
    """Whether the merged embedding and head are equal: neither is adapted, or both have the same trained values."""
    adapted = [layers[path] for path in tables if path in layers]
    if not adapted:
        return True
    if len(adapted) == 1:
        return not any(name == "weight" for name, _ in compute_merged(tables[0], adapted[0]))
    first, second = (dict(compute_merged(path, layers[path])).get("weight") for path in tables)
    return first is not None and second is not None and torch.equal(first, second)


def untie(model: nn.Module) -> None:
    """Give the head a weight of its own; config.json will say so."""
    head, config = cast(Any, model.lm_head), cast(Any, model.config)
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.config = dataclasses.replace(config, tie_word_embeddings=False)


def check_ties(model: nn.Module, layers: Mapping[str, Any], tables: tuple[str, ...]) -> None:
    """Refuse to merge into a weight that another module shares; embedding and head (`tables`) are untied instead.

    Raises:
        InputError: names both.
    """
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    for path, layer in layers.items():
        allowed = [f"{table}.weight" for table in tables] if path in tables else [f"{path}.weight"]
        others = [name for name in names[id(layer.weight)] if name not in allowed]
        if others:
            raise InputError(f"cannot merge into {path!r}: its weight is also {others}", hint="Untie it first")


def compute_merged(path: str, layer: Any) -> list[tuple[str, Tensor]]:
    """The parameters of the base that the layer changes by name, as a plain module that computes the same holds them.

    Raises:
        InputError: the adapter has a bias, and the base has none to put it in.
    """
    if hasattr(layer, "merged_tensors"):
        return cast(list[tuple[str, Tensor]], layer.merged_tensors())
    weight, bias = layer.merged()
    if bias is not None and layer.bias is None:
        raise InputError(f"cannot merge into {path!r}: the adapter has a bias and the base has none there")
    return [("weight", weight)] + ([] if bias is None else [("bias", bias)])
