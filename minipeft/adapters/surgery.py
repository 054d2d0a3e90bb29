"""Which linears an adapter stands at, and how one module takes another's place: what LoRA, (IA)3 and the bank share.

    "all-linear"                every linear of the blocks, never the head
    "default"                   HF PEFT's choice for the family and the method
    ("q_proj", "attn.c_proj")   the linears whose path is this name, or ends in "." + this name
    r".*\\.[02]\\.mlp\\..*"     any other text: a regular expression over the whole path

A module that stands in a linear's place adopts its Parameters, and merging or removing hands them back to a plain
nn.Linear: the names in state_dict(), ties, and every byte of the base stay as they were.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from minipeft.errors import InputError
from minipeft.models import Decoder

T = TypeVar("T")
Targets = str | tuple[str, ...]
HARMLESS = re.compile(r"[\w.\\^$-]*")  # a pattern of these alone is matched in linear time
DEADLINE = 2.0  # seconds for a pattern over all paths of a model, the start of the process that tries it included
TRY = "import json,re,sys; p, names = json.load(sys.stdin); print(json.dumps([n for n in names if re.fullmatch(p, n)]))"


def linear_paths(model: nn.Module) -> list[str]:
    """The paths of the linears that may be adapted, plain or adapted already, in the model's order."""
    is_linear = lambda m: isinstance(m, nn.Linear) or getattr(m, "adopts_linear", False)
    return [name for name, m in model.named_modules() if is_linear(m) and name != "lm_head"]


def targeted(
    model: Decoder, targets: Targets, default: Mapping[str, tuple[str, ...]], layers: tuple[int, ...] | None = None
) -> list[str]:
    """The paths that `targets` names, in the model's order; with `layers`, only those in these blocks.

    Raises:
        InputError: a name, the pattern or a layer matches nothing (with what would), or names an embedding or the head.
    """
    paths = linear_paths(model)
    if targets == "default":
        targets = default[model.config.model_type]
    if targets == "all-linear":
        chosen = set(paths)
    elif isinstance(targets, str):
        refused = [name for name, m in model.named_modules() if isinstance(m, nn.Embedding) or name == "lm_head"]
        found = matching(targets, paths + refused, "targets")
        if not found:
            hint = "A text is a regular expression over the whole path; give plain names as a list"
            raise InputError(f"{targets!r} matches no linear layer, such as {paths[0]!r}", where="targets", hint=hint)
        for name in refused:
            if name in found:
                refuse(model, name)
        chosen = set(found)
    else:
        chosen = {path for name in targets for path in named(model, name, paths)}
    if layers is not None:
        check_layers(layers, len(model.blocks))
        chosen = {path for path in chosen if layer_of(path) in layers}
    return [path for path in paths if path in chosen]


def named(model: Decoder, name: str, paths: list[str]) -> list[str]:
    """The paths that are `name` or end in it."""
    found = [path for path in paths if path == name or path.endswith("." + name)]
    if not found:
        for path, module in model.named_modules():
            if (path == name or path.endswith("." + name)) and (isinstance(module, nn.Embedding) or path == "lm_head"):
                refuse(model, path)
        known = sorted({path.rsplit(".", 1)[-1] for path in paths})
        raise InputError(f"no linear layer is named {name!r}; this model has {known}", where="targets")
    return found


def refuse(model: Decoder, path: str) -> None:
    """Say why an embedding or the head is not adapted."""
    if path == "lm_head":
        raise InputError("'lm_head' is not adapted: the loss and the tied embedding use its weight", where="targets")
    kind = type(model.get_submodule(path)).__name__
    raise InputError(f"{path!r} is an {kind.lower()}: a table that is looked up, not a linear layer", where="targets")


def check_layers(layers: tuple[int, ...], count: int) -> None:
    """Refuse a block that the model does not have."""
    for layer in layers:
        if not 0 <= layer < count:
            raise InputError(f"no layer {layer}: this model has 0 to {count - 1}", where="layers")


def layer_of(path: str) -> int:
    """The number of the block that a path lies in: its first numeric part."""
    return next(int(part) for part in path.split(".") if part.isdigit())


def matching(pattern: str, paths: Sequence[str], where: str, ending: bool = False) -> list[str]:
    """The paths that the regular expression matches whole; `ending`: whose end it matches, from a dot on.

    A pattern from a file may take years ("(a+)+$"), and Python's matcher cannot be interrupted from another thread. So
    one that could is tried in a process of its own, which can be killed.

    Raises:
        InputError: the pattern is invalid, or takes longer than DEADLINE.
    """
    whole = rf"(.*\.)?({pattern})" if ending else pattern
    try:
        compiled = re.compile(whole)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"{pattern!r} is not a regular expression: {error}", where=where) from error
    if HARMLESS.fullmatch(pattern):
        return [path for path in paths if compiled.fullmatch(path)]
    given = json.dumps([whole, list(paths)])
    command = [sys.executable, "-I", "-c", TRY]
    try:
        tried = subprocess.run(command, input=given, capture_output=True, text=True, timeout=DEADLINE, check=True)
    except subprocess.TimeoutExpired as error:
        hint = "Avoid repeated groups that contain repetitions"
        raise InputError(f"{pattern!r} took longer than {DEADLINE} s to match", where=where, hint=hint) from error
    except subprocess.CalledProcessError as error:
        raise InputError(f"{pattern!r} cannot be matched: {error.stderr.strip()[-200:]}", where=where) from error
    found: list[str] = json.loads(tried.stdout)
    return found


def by_pattern(patterns: Mapping[str, T], paths: Sequence[str], where: str) -> dict[str, T]:
    """The value for each path that a pattern matches: HF PEFT's rank_pattern and alpha_pattern.

    A key is a regular expression for the end of a path, from a dot on ("q_proj", "0.attn.c_attn", "^model.layers.1.*");
    the first that matches counts.

    Raises:
        InputError: a key matches none of `paths`.
    """
    values: dict[str, T] = {}
    for key, value in patterns.items():
        found = matching(key, paths, where, ending=True)
        if not found:
            raise InputError(f"{key!r} matches none of the targets, such as {paths[0]!r}", where=where)
        values = {**dict.fromkeys(found, value), **values}
    return values


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`."""
    parent, _, last = path.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def restore(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put a plain nn.Linear with the same Parameters in the place of each adapted one.

    A new one: the linear that was replaced may hold an old weight, if the model has been loaded again since.
    """
    for path, layer in layers.items():
        out, width = layer.weight.shape  # type: ignore[misc]
        linear = nn.Linear(int(width), int(out), bias=layer.bias is not None, device="meta")
        linear.weight, linear.bias = layer.weight, layer.bias  # type: ignore[assignment]
        replace(model, path, linear.train(model.training))


def keep_float32(module: nn.Module, names: Sequence[str], apply: Callable[[], nn.Module]) -> None:
    """Run `apply`, a move or cast of the module's tensors; then undo the cast of the named ones, not the move."""
    kept = {name: getattr(module, name).detach() for name in names}
    apply()
    for name, tensor in kept.items():
        parameter = getattr(module, name)
        if parameter.dtype != tensor.dtype:
            parameter.data = tensor.to(parameter.device)


@dataclass(frozen=True)
class MergeReport:
    """What merging did: how many weights, the largest change of one, and how much of the update rounding took away."""

    modules: int
    largest_change: float
    relative_error: float  # |W_new - W_old - update| / |update|, over all modules: the rounding to the weight's dtype


def merge(model: nn.Module, layers: Mapping[str, Any]) -> MergeReport:
    """Give each adapted linear the weight and bias of its `merged()`, summed in float32 and rounded once.

    Raises:
        InputError: a weight is also another's (tied), or what is merged would not be finite; nothing is touched then.
    """
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    for path, layer in layers.items():
        others = [name for name in names[id(layer.weight)] if name != f"{path}.weight"]
        if others:
            raise InputError(f"cannot merge into {path!r}: its weight is also {others}", hint="Untie it first")
        if not all(torch.isfinite(t).all() for t in merged(path, layer) if t is not None):
            raise InputError(f"cannot merge into {path!r}: the merged weight would not be finite")
    largest, missed, whole = 0.0, 0.0, 0.0
    with torch.no_grad():
        for path, layer in layers.items():
            for old, new in zip((layer.weight, layer.bias), merged(path, layer)):
                if new is None:
                    continue
                before = old.to(torch.float32, copy=True)
                old.copy_(new)
                change, update = old.float() - before, new - before
                largest = max(largest, change.abs().max().item())
                missed += (change - update).square().sum().item()
                whole += update.square().sum().item()
    restore(model, layers)
    return MergeReport(len(layers), largest, math.sqrt(missed / whole) if whole else 0.0)


def merged(path: str, layer: Any) -> tuple[Tensor, Tensor | None]:
    """What the layer would hold after merging, rounded to the weight's dtype and widened again, or why it cannot."""
    with torch.no_grad():
        weight, bias = layer.merged()
    if bias is not None and layer.bias is None:
        raise InputError(f"cannot merge into {path!r}: the adapter has a bias and the base has none there")
    return weight, bias
