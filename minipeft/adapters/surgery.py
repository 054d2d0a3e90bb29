"""Replace, restore and merge linears, for LoRA, (IA)3, VeRA and the bank.

A module that replaces a linear adopts its Parameters, and merging or removing returns them to a plain nn.Linear: the
names in state_dict(), ties, and every byte of the base stay the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.adapters.verdict import MergeReport
from minipeft.errors import InputError


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`."""
    parent, _, last = path.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def restore(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Replace each adapted linear by a plain nn.Linear with the same Parameters.

    The original linear is not reused: it may hold an old weight, if the model was loaded again since.
    """
    for path, layer in layers.items():
        out, width = layer.weight.shape  # type: ignore[misc]
        linear = nn.Linear(int(width), int(out), bias=layer.bias is not None, device="meta")
        linear.weight, linear.bias = layer.weight, layer.bias  # type: ignore[assignment]
        replace(model, path, linear.train(model.training))


def merge(model: nn.Module, layers: Mapping[str, Any]) -> MergeReport:
    """Give each adapted linear the weight and bias of its `merged()`, summed in float32 and rounded once to nearest
    (results/merge-rounding/report.md: no other rounding brings the merged model nearer as it is run).

    Each is computed twice: first all are checked, so that a refusal touches nothing, then they are written. Only one
    stands in memory at a time.

    Raises:
        InputError: a weight is tied to another module's, or the merged weight would not be finite in its dtype.
    """
    check_ties(model, layers)
    largest, missed, whole = 0.0, 0.0, 0.0
    with torch.no_grad():
        for path, layer in layers.items():
            for old, new in compute_merged(path, layer):
                result = new.to(old.dtype)
                if not torch.isfinite(result).all():
                    raise InputError(f"cannot merge into {path!r}: the merged weight would not be finite")
                change, update = result.float() - old.float(), new - old.float()
                largest = max(largest, change.abs().max().item())
                missed += (change - update).square().sum().item()
                whole += update.square().sum().item()
                del new, result, change, update
        for path, layer in layers.items():
            for old, new in compute_merged(path, layer):
                old.copy_(new)
                del new
    restore(model, layers)
    return MergeReport(len(layers), largest, math.sqrt(missed / whole) if whole else 0.0)


def check_ties(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Refuse to merge into a weight that another module shares.

    Raises:
        InputError: names both.
    """
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    for path, layer in layers.items():
        others = [name for name in names[id(layer.weight)] if name != f"{path}.weight"]
        if others:
            raise InputError(f"cannot merge into {path!r}: its weight is also {others}", hint="Untie it first")


def compute_merged(path: str, layer: Any) -> list[tuple[Tensor, Tensor]]:
    """Compute the merged weight and bias, each paired with the parameter that it replaces.

    Raises:
        InputError: the adapter has a bias, and the base has none to put it in.
    """
    weight, bias = layer.merged()
    if bias is not None and layer.bias is None:
        raise InputError(f"cannot merge into {path!r}: the adapter has a bias and the base has none there")
    return [(layer.weight, weight)] + ([] if bias is None else [(layer.bias, bias)])
